// SPDX-License-Identifier: Apache-2.0

package known_test

import (
	"path"
	"slices"
	"strings"
	"testing"

	"criuhook/criuhook/known"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

const lib = "/usr/lib/x86_64-linux-gnu/"

func to(name, exe string, holders ...int) *sockpeer.Connection {
	c := &sockpeer.Connection{Type: sockpeer.Stream, Peer: sockpeer.Peer{Name: sockpeer.Name(name), PID: 5, Exe: exe}}
	if holders == nil {
		holders = []int{10}
	}
	for _, pid := range holders {
		c.Holders = append(c.Holders, sockpeer.Holder{PID: pid, TID: pid, FD: 3})
	}
	return c
}

func TestDescribe(t *testing.T) {
	const pipes = "/var/lib/sss/pipes/"
	libc := lib + "libc.so.6"
	for _, tt := range []struct {
		name, exe string
		mapped    []string // of process 10; nil: not known
		want      string
	}{
		{pipes + "nss", "/usr/libexec/sssd/sssd_nss", []string{"/bin/app", libc, lib + "libnss_sss.so.2"},
			"sssd, name service (nss pipe), opened by libnss_sss.so.2"},
		{pipes + "nss", "", []string{lib + "libsss_nss_idmap.so.0.6.0", lib + "libnss_sss.so.2"},
			"sssd, name service (nss pipe), opened by libnss_sss.so.2 or libsss_nss_idmap.so.0"},
		{pipes + "nss", "", []string{"/bin/app", libc}, "sssd, name service (nss pipe), perhaps inherited: no library that opens it is mapped"},
		{pipes + "nss", "", nil, "sssd, name service (nss pipe)"},
		{pipes + "nss", "", []string{lib + "libnss_sss.so.20", lib + "xlibnss_sss.so.2"}, "sssd, name service (nss pipe), perhaps inherited: no library that opens it is mapped"},
		{pipes + "pam", "", []string{lib + "security/pam_sss.so"}, "sssd, authentication (pam pipe), opened by pam_sss.so"},
		{pipes + "private/pam", "", []string{lib + "security/pam_sss.so"}, "sssd, authentication of root's processes (private/pam pipe), opened by pam_sss.so"},
		{pipes + "sudo", "", []string{"/usr/lib/libsss_sudo.so"}, "sssd, sudo rules (sudo pipe), opened by libsss_sudo.so"},
		{pipes + "autofs", "", []string{lib + "sssd/modules/libsss_autofs.so"}, "sssd, automounter maps (autofs pipe), opened by libsss_autofs.so"},
		{pipes + "ssh", "", []string{libc}, "sssd, ssh keys (ssh pipe)"},
		{pipes + "pac", "", []string{lib + "krb5/plugins/authdata/sssd_pac_plugin.so"}, "sssd, Kerberos PAC (pac pipe), opened by sssd_pac_plugin.so"},

		{"/var/run/nscd/socket", "/usr/sbin/nscd", []string{libc}, "nscd, name service cache, opened by libc.so.6"},
		{"/run/nscd/socket", "/usr/sbin/unscd", []string{"/lib/libc-2.31.so"}, "unscd, name service cache, opened by libc-2.31.so"},
		{"/run/nscd/socket", "/usr/sbin/nscd", []string{"/bin/static"}, "nscd, name service cache"},
		{"/var/lib/pbis/.lsassd", "/opt/pbis/sbin/lwsmd", []string{"/lib64/libnss_lsass.so.2", "/opt/pbis/lib64/liblsaclient.so.0.0.0"},
			"PBIS lsass, name service and authentication, opened by libnss_lsass.so.2 or liblsaclient.so.0"},
		{"/var/lib/pbis/.lsassd", "", []string{libc}, "PBIS lsass, name service and authentication, perhaps inherited: no library that opens it is mapped"},
		{"/var/lib/pbis/.lwiod", "", []string{"/opt/pbis/lib64/liblwioclient.so.0.0.0"}, "PBIS lwio, SMB files and pipes (lwmsg), opened by liblwioclient.so.0"},
		{"/var/lib/pbis/.newone", "", []string{libc}, "PBIS, lwmsg"},
		{"/var/lib/likewise/.lsassd", "", nil, "Likewise lsass, name service and authentication"},
		{"/run/samba/winbindd/pipe", "", []string{lib + "libnss_winbind.so.2"}, "winbind, name service and authentication, opened by libnss_winbind.so.2"},
		{"/run/nslcd/socket", "", []string{lib + "libnss_ldap.so.2"}, "nslcd, LDAP name service and authentication, opened by libnss_ldap.so.2"},
		{"/run/systemd/userdb/io.systemd.DynamicUser", "", []string{lib + "libnss_systemd.so.2"}, "systemd, user database (varlink), opened by libnss_systemd.so.2"},
		{"/run/avahi-daemon/socket", "", []string{lib + "libnss_mdns4_minimal.so.2"}, "avahi, host names of the local network, opened by libnss_mdns4_minimal.so.2"},

		{"/run/systemd/journal/dev-log", "", []string{libc}, "syslog, log messages, opened by libc.so.6"},
		{"/run/systemd/journal/stdout", "/usr/lib/systemd/systemd-journald", []string{libc}, "journald, standard output or error, as systemd opened it for a service"},
		{"/run/systemd/journal.web/stdout", "", nil, "journald, standard output or error, as systemd opened it for a service"},
		{"/run/dbus/system_bus_socket", "", []string{lib + "libgio-2.0.so.0.8400.4", lib + "libdbus-1.so.3.38.3"}, "D-Bus, system bus, opened by libdbus-1.so.3 or libgio-2.0.so.0"},
		{"/run/user/1000/bus", "", []string{lib + "libsystemd.so.0.40.0"}, "D-Bus, session bus, opened by libsystemd.so.0"},
		{"\x00/tmp/dbus-Ab1", "", []string{"/bin/zbus"}, "D-Bus, session bus"},
		{"\x00/tmp/.X11-unix/X0", "", []string{lib + "libxcb.so.1.1.0"}, "X server, display (X11), opened by libxcb.so.1"},
		{"/run/user/1000/wayland-0", "", nil, "Wayland compositor, display"},
		{"/var/run/docker.sock", "", nil, "Docker, API"},
		{"/var/run/docker.sock", "", []string{"/jdk/lib/libnio.so"}, "Docker, API, perhaps opened by Java itself (libnio.so)"},
		{pipes + "nss", "", []string{"/jdk/lib/libnio.so"}, "sssd, name service (nss pipe), perhaps inherited: no library that opens it is mapped"},
		{"/run/user/1000/gnupg/S.gpg-agent.ssh", "", nil, "gpg-agent, secret keys"},
		{"/tmp/ssh-XXXXabc/agent.17", "", nil, "ssh-agent, ssh keys"},
		{"/var/run/postgresql/.s.PGSQL.5432", "", []string{lib + "libpq.so.5.17"}, "PostgreSQL, database, opened by libpq.so.5"},
		{"/run/mysqld/mysqld.sock", "", []string{lib + "libmysqlclient.so.24.0.1"}, "MySQL or MariaDB, database, opened by libmysqlclient.so.24.0.1"},
		{"/run/user/1000/pipewire-0", "", nil, "PipeWire, sound and video"},

		{"/run/d", "/usr/sbin/d\x1b", []string{libc}, `unknown: /usr/sbin/d\x1b (process 5) at /run/d`},
		{"/run/d\n", "", nil, `unknown: process 5 at /run/d\n`},
		{"\x00d", "/d", []string{"/jdk/lib/server/libjvm.so", "/jdk/lib/libnio.so", "/jdk/lib/libnet.so"}, "unknown: /d (process 5) at @d, perhaps opened by Java itself (libnio.so or libnet.so)"},
		{"", "/d", nil, "unknown: /d (process 5), without a name, as from socketpair"},
		{"var/lib/sss/pipes/nss", "/d", nil, "unknown: /d (process 5) at var/lib/sss/pipes/nss"},
		{"@/tmp/dbus-1", "/d", nil, "unknown: /d (process 5) at @/tmp/dbus-1"}, // a relative path
		{"\x00/run/nscd/socket", "/d", nil, "unknown: /d (process 5) at @/run/nscd/socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := known.Describe(to(tt.name, tt.exe), map[int]sockpeer.Process{10: {PID: 10, Mapped: tt.mapped}})
			if d.String() != tt.want {
				t.Errorf("got  %s\nwant %s", d, tt.want)
			}
			if unknown := strings.HasPrefix(tt.want, "unknown"); unknown != (d.Daemon == "") || unknown != (d.Service == "") {
				t.Errorf("%+v", d)
			}
			if d.Inherited != strings.Contains(tt.want, "inherited") || d.Telling() != (d.Daemon != "" || strings.Contains(tt.want, "opened")) {
				t.Errorf("%+v", d)
			}
		})
	}
}

// The daemon is bound to a name of its own container's, say, and the application
// sees it where its library looks.
func TestDescribePath(t *testing.T) {
	c := to("/data/sock", "/d")
	c.Peer.Path = "/var/lib/sss/pipes/nss"
	if d := known.Describe(c, nil); d.String() != "sssd, name service (nss pipe)" {
		t.Errorf("got %s", d)
	}
}

func TestDescribeShared(t *testing.T) {
	sss := []string{lib + "libnss_sss.so.2"}
	for _, tt := range []struct {
		name          string
		first, second []string
		want          string
	}{
		{"by both", sss, sss, "opened by libnss_sss.so.2"},
		{"by the second", []string{"/bin/sh"}, sss, "opened by libnss_sss.so.2 of process 11"},
		{"by neither", []string{"/bin/sh"}, []string{"/bin/sh"}, "perhaps inherited: no library that opens it is mapped"},
		{"one is not known", []string{"/bin/sh"}, nil, ""},
	} {
		d := known.Describe(to("/var/lib/sss/pipes/nss", "", 10, 11),
			map[int]sockpeer.Process{10: {Mapped: tt.first}, 11: {Mapped: tt.second}})
		_, got, _ := strings.Cut(d.String(), "pipe)")
		if strings.TrimPrefix(got, ", ") != tt.want {
			t.Errorf("%s: %s", tt.name, d)
		}
	}
}

func TestDescribeInbound(t *testing.T) {
	c := to("", "/usr/bin/psql")
	c.Direction, c.Name = sockpeer.Inbound, "/run/postgresql/.s.PGSQL.5432"
	d := known.Describe(c, nil)
	if want := "a client of this process at /run/postgresql/.s.PGSQL.5432: /usr/bin/psql (process 5)"; d.String() != want || d.Telling() {
		t.Errorf("got %s", d)
	}
	c.Peer = sockpeer.Peer{UID: -1}
	if got := known.Describe(c, nil).String(); !strings.HasSuffix(got, ": a process that is not visible") {
		t.Errorf("got %s", got)
	}
}

// Whom the built-in rules are for is known.
func TestRulesAreKnown(t *testing.T) {
	for _, r := range rule.BuiltIn() {
		name := strings.ReplaceAll(r.Path, "*", "nss")
		if ok, err := path.Match(r.Path, name); !ok || err != nil {
			t.Fatalf("%s: %q, %v", r.Path, name, err)
		}
		if rest, ok := strings.CutPrefix(name, "@"); ok {
			name = "\x00" + rest
		}
		if d := known.Describe(to(name, ""), nil); d.Daemon == "" {
			t.Errorf("rule %s: %s", r.Name, d)
		}
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add("/var/lib/sss/pipes/nss", "/usr/libexec/sssd/sssd_nss", "/lib/libnss_sss.so.2")
	f.Add("/run/avahi-daemon/socket", "", "/lib/libnss_mdns\x1b_minimal.so.2")
	f.Add("\x00[", "\xff", "/")
	f.Fuzz(func(t *testing.T, name, exe, file string) {
		text := known.Describe(to(name, exe), map[int]sockpeer.Process{10: {Mapped: []string{file}}}).String()
		if text == "" || slices.ContainsFunc([]byte(text), func(b byte) bool { return b < ' ' || b >= 0x7f }) {
			t.Errorf("%q", text)
		}
	})
}
