// SPDX-License-Identifier: Apache-2.0

package known

// service is a daemon's socket with a conventional name.
type service struct {
	// names are globs as rules have them (path.Match, "@…" for abstract
	// names), with /run for /var/run.
	names           []string
	daemon, service string
	// libraries open such connections: sonames, or globs of file names.
	libraries []string
	// own: programs open such connections without any of these libraries.
	own bool
	// variant is a program that serves the same socket in the daemon's place.
	variant string
}

// javaLibraries are the JDK's own code for sockets (sun.nio.ch.UnixDomainSockets
// is in libnio; libnet holds the rest).
var javaLibraries = []string{"libnio.so", "libnet.so"}

var (
	libc  = []string{"libc.so.6", "libc-2.*.so", "ld-musl-*.so.1"}
	dbus  = []string{"libdbus-1.so.3", "libgio-2.0.so.0", "libsystemd.so.0"}
	lsass = []string{"libnss_lsass.so.2", "pam_lsass.so", "liblsaclient.so.0"}
	lwmsg = []string{"liblwmsg.so.0", "liblwmsg_nothr.so.0"}
	nslcd = []string{"libnss_ldap.so.2", "pam_ldap.so"}
	pipes = "/var/lib/sss/pipes/"
)

// winbind's libraries each hold the client's code (nsswitch/wb_common.c).
var winbind = []string{"libnss_winbind.so.2", "libnss_wins.so.2", "pam_winbind.so", "libwbclient.so.0"}

// services are tried in order. The libraries are those of the projects' own
// build files and headers: sssd (Makefile.am, src/sss_client/sss_cli.h), samba
// (nsswitch/wscript_build), pbis-open (MakeKitBuild), nss-pam-ldapd, systemd
// (src/nss-systemd, src/nss-resolve), nss-mdns.
var services = []service{
	{names: []string{pipes + "nss"}, daemon: "sssd", service: "name service (nss pipe)",
		libraries: []string{"libnss_sss.so.2", "libsss_nss_idmap.so.0", "libsubid_sss.so"}},
	{names: []string{pipes + "pam"}, daemon: "sssd", service: "authentication (pam pipe)", libraries: []string{"pam_sss.so", "pam_sss_gss.so"}},
	{names: []string{pipes + "private/pam"}, daemon: "sssd", service: "authentication of root's processes (private/pam pipe)",
		libraries: []string{"pam_sss.so", "pam_sss_gss.so"}},
	{names: []string{pipes + "sudo"}, daemon: "sssd", service: "sudo rules (sudo pipe)", libraries: []string{"libsss_sudo.so"}},
	{names: []string{pipes + "autofs"}, daemon: "sssd", service: "automounter maps (autofs pipe)", libraries: []string{"libsss_autofs.so"}},
	// sss_ssh_authorizedkeys and sss_ssh_knownhosts are programs.
	{names: []string{pipes + "ssh"}, daemon: "sssd", service: "ssh keys (ssh pipe)", own: true},
	{names: []string{pipes + "pac"}, daemon: "sssd", service: "Kerberos PAC (pac pipe)", libraries: []string{"sssd_pac_plugin.so"}},
	{names: []string{pipes + "private/sbus-*"}, daemon: "sssd", service: "between parts of sssd (sbus)", own: true},

	// Also musl speaks nscd's protocol.
	{names: []string{"/run/nscd/socket"}, daemon: "nscd", service: "name service cache", libraries: libc, own: true, variant: "unscd"},

	{names: []string{"/run/samba/winbindd/pipe"}, daemon: "winbind", service: "name service and authentication", libraries: winbind},
	{names: []string{"/var/lib/samba/winbindd_privileged/pipe"}, daemon: "winbind", service: "name service and authentication (privileged pipe)",
		libraries: winbind},
	{names: []string{"/run/nslcd/socket"}, daemon: "nslcd", service: "LDAP name service and authentication", libraries: nslcd},

	{names: []string{"/var/lib/pbis/.lsassd"}, daemon: "PBIS lsass", service: "name service and authentication", libraries: lsass},
	{names: []string{"/var/lib/pbis/.netlogond"}, daemon: "PBIS netlogon", service: "domain controllers (lwmsg)",
		libraries: []string{"liblwnetclientapi.so.0"}, own: true},
	{names: []string{"/var/lib/pbis/.eventlog"}, daemon: "PBIS eventlog", service: "event log (lwmsg)", libraries: lwmsg, own: true},
	{names: []string{"/var/lib/pbis/.lwiod"}, daemon: "PBIS lwio", service: "SMB files and pipes (lwmsg)",
		libraries: []string{"liblwioclient.so.0"}, own: true},
	{names: []string{"/var/lib/pbis/.regsd"}, daemon: "PBIS lwreg", service: "registry (lwmsg)", libraries: lwmsg, own: true},
	{names: []string{"/var/lib/pbis/.ntlmd"}, daemon: "PBIS ntlm", service: "NTLM authentication (lwmsg)", libraries: lwmsg, own: true},
	{names: []string{"/var/lib/pbis/.lwsm", "/var/lib/pbis/.lwsc"}, daemon: "PBIS lwsm", service: "service manager (lwmsg)", libraries: lwmsg, own: true},
	{names: []string{"/var/lib/pbis/.*"}, daemon: "PBIS", service: "lwmsg", libraries: lwmsg, own: true},
	{names: []string{"/var/lib/likewise/.lsassd", "/var/lib/likewise-open/.lsassd"}, daemon: "Likewise lsass",
		service: "name service and authentication", libraries: lsass},
	{names: []string{"/var/lib/likewise/.*", "/var/lib/likewise-open/.*"}, daemon: "Likewise", service: "lwmsg", libraries: lwmsg, own: true},

	{names: []string{"/run/systemd/userdb/*"}, daemon: "systemd", service: "user database (varlink)", libraries: []string{"libnss_systemd.so.2"}, own: true},
	{names: []string{"/run/systemd/resolve/io.systemd.Resolve"}, daemon: "systemd-resolved", service: "host names (varlink)",
		libraries: []string{"libnss_resolve.so.2"}, own: true},
	{names: []string{"/run/avahi-daemon/socket"}, daemon: "avahi", service: "host names of the local network",
		libraries: []string{"libnss_mdns.so.2", "libnss_mdns[46].so.2", "libnss_mdns*_minimal.so.2"}, own: true},

	{names: []string{"/run/systemd/journal/stdout", "/run/systemd/journal.*/stdout"}, daemon: "journald",
		service: "standard output or error, as systemd opened it for a service", own: true},
	{names: []string{"/dev/log", "/run/systemd/journal/dev-log", "/run/systemd/journal.*/dev-log", "/run/systemd/journal/syslog"},
		daemon: "syslog", service: "log messages", libraries: libc, own: true},
	{names: []string{"/run/systemd/journal/socket", "/run/systemd/journal.*/socket"}, daemon: "journald", service: "log messages, journald's own format",
		libraries: []string{"libsystemd.so.0"}, own: true},
	{names: []string{"/run/systemd/notify", "/run/user/*/systemd/notify", "@/org/freedesktop/systemd1/notify"}, daemon: "systemd",
		service: "state of a service (sd_notify)", own: true},
	{names: []string{"/run/systemd/private", "/run/user/*/systemd/private"}, daemon: "systemd", service: "management (D-Bus)", libraries: dbus, own: true},

	{names: []string{"/run/dbus/system_bus_socket"}, daemon: "D-Bus", service: "system bus", libraries: dbus, own: true},
	{names: []string{"/run/user/*/at-spi/bus*"}, daemon: "D-Bus", service: "accessibility bus", libraries: dbus, own: true},
	{names: []string{"/run/user/*/bus", "@/tmp/dbus-*", "/tmp/dbus-*"}, daemon: "D-Bus", service: "session bus", libraries: dbus, own: true},

	{names: []string{"/tmp/.X11-unix/X*", "@/tmp/.X11-unix/X*"}, daemon: "X server", service: "display (X11)", libraries: []string{"libxcb.so.1"}, own: true},
	{names: []string{"@/tmp/.ICE-unix/*", "/tmp/.ICE-unix/*"}, daemon: "session manager", service: "desktop session (ICE)",
		libraries: []string{"libICE.so.6"}, own: true},
	{names: []string{"/run/user/*/wayland-*"}, daemon: "Wayland compositor", service: "display", libraries: []string{"libwayland-client.so.0"}, own: true},
	{names: []string{"/run/user/*/pulse/native", "/run/pulse/native", "/tmp/pulse-*/native"}, daemon: "PulseAudio", service: "sound",
		libraries: []string{"libpulse.so.0"}, own: true},
	{names: []string{"/run/user/*/pipewire-*", "/run/pipewire/pipewire-*"}, daemon: "PipeWire", service: "sound and video",
		libraries: []string{"libpipewire-0.3.so.0"}, own: true},

	{names: []string{"/run/docker.sock"}, daemon: "Docker", service: "API", own: true},
	{names: []string{"/run/containerd/containerd.sock*", "/run/docker/containerd/containerd.sock*"}, daemon: "containerd", service: "API", own: true},
	{names: []string{"/run/podman/podman.sock", "/run/user/*/podman/podman.sock"}, daemon: "Podman", service: "API", own: true},
	{names: []string{"/run/crio/crio.sock"}, daemon: "CRI-O", service: "API", own: true},
	{names: []string{"/run/libvirt/*-sock*", "/run/user/*/libvirt/*-sock*"}, daemon: "libvirt", service: "virtual machines",
		libraries: []string{"libvirt.so.0"}, own: true},

	{names: []string{"/run/user/*/gnupg/S.gpg-agent*", "/run/user/*/gnupg/d.*/S.gpg-agent*", "/home/*/.gnupg/S.gpg-agent*", "/root/.gnupg/S.gpg-agent*"},
		daemon: "gpg-agent", service: "secret keys", libraries: []string{"libassuan.so.0", "libassuan.so.9"}, own: true},
	{names: []string{"/tmp/ssh-*/agent.*", "/run/user/*/ssh-agent*", "/run/user/*/openssh_agent", "/run/user/*/keyring/ssh", "/run/user/*/keyring/.ssh", "/home/*/.ssh/agent/s.*"},
		daemon: "ssh-agent", service: "ssh keys", own: true},
	{names: []string{"/run/.heim_org.h5l.kcm-socket"}, daemon: "KCM", service: "Kerberos tickets", libraries: []string{"libkrb5.so.3", "libkrb5.so.26"}, own: true},
	{names: []string{"/run/munge/munge.socket.2"}, daemon: "munge", service: "credentials", libraries: []string{"libmunge.so.2"}, own: true},
	{names: []string{"/run/pcscd/pcscd.comm"}, daemon: "pcscd", service: "smart cards", libraries: []string{"libpcsclite.so.1", "libpcsclite_real.so.1"}, own: true},

	{names: []string{"/run/postgresql/.s.PGSQL.*", "/tmp/.s.PGSQL.*"}, daemon: "PostgreSQL", service: "database", libraries: []string{"libpq.so.5"}, own: true},
	{names: []string{"/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock"}, daemon: "MySQL or MariaDB", service: "database",
		libraries: []string{"libmariadb.so.3", "libmysqlclient.so.*"}, own: true},
	{names: []string{"/run/redis/redis*.sock"}, daemon: "Redis", service: "database", own: true},
	{names: []string{"/run/cups/cups.sock"}, daemon: "CUPS", service: "printing", libraries: []string{"libcups.so.2"}, own: true},
	{names: []string{"/run/rpcbind.sock"}, daemon: "rpcbind", service: "RPC services", libraries: []string{"libtirpc.so.3"}, own: true},
}
