// SPDX-License-Identifier: Apache-2.0

package rule

import "criuhook/sockpeer"

// BuiltInSource is the Source of the built-in rules.
const BuiltInSource = "built-in"

// What the clients do was measured with sssd 2.10, samba 4.22, nscd 2.41,
// nslcd 0.9, dbus 1.16; lwmsg is the protocol of PBIS and Likewise.
const (
	whySSSD = "libnss_sss asks again over whatever connection it finds, the pam and sudo services expect the " +
		"version exchange first. A request under way would block for a minute and a half, so a busy connection is hung up."
	whyNSCD = "glibc opens a connection for each request and asks the sources itself when it is gone; " +
		"there is no greeting."
	whyLWMsg = "With the protocol's greeting made anew the client loses no call; without it it stays busy for ever. " +
		"A call under way would hang, so a busy connection is hung up."
	whyPBISOther = "The client may hold a handle of the server, which no new connection brings back; " +
		"after a hangup it connects anew by itself and loses no call."
	whyLikewise = "Old Likewise speaks another greeting; after a hangup the client connects anew by itself."
	whyWinbind  = "libnss_winbind takes a new connection as it is, without any greeting."
	whyNSLCD    = "The client opens a connection for each request; after a hangup that request fails at once and the next one works."
	whyUserDB   = "nss-systemd opens a varlink connection for each request; after a hangup the next lookup opens a new one."
	whyAvahi    = "nss-mdns opens a connection for each request; after a hangup the next lookup opens a new one."
	whyLog      = "A log socket is a datagram socket that holds no state: syslog() and the journal's client go on over a new connection."
	whyDBus     = "On a new connection the bus gives another unique name. Choose: idle: hangup (most D-Bus libraries then end the process), " +
		"or idle: reconnect with prelude: dbus (calls work again, but the unique name, the names it owned and its match rules are gone)."
)

// BuiltIn returns the built-in rules in order, a fresh copy each time. They
// do not ask for the listener's uid: sssd, for one, need not run as root. A
// restore compares it with the recorded one all the same.
func BuiltIn() []Rule {
	var rules []Rule
	add := func(name, path, why string, t sockpeer.Type, idle Action, prelude string) {
		r := Rule{Name: name, Path: path, Type: &t, Idle: idle, Why: why, Source: BuiltInSource}
		if idle != Refuse {
			r.Busy = Hangup
		}
		if idle == Reconnect {
			r.Prelude, r.Timeout = prelude, DefaultTimeout
		}
		rules = append(rules, r)
	}
	reconnect := func(name, path, prelude, why string) {
		add(name, path, why, sockpeer.Stream, Reconnect, prelude)
	}
	datagrams := func(name, path, why string) { add(name, path, why, sockpeer.Dgram, Reconnect, "none") }
	hangup := func(name, path, why string) { add(name, path, why, sockpeer.Stream, Hangup, "") }
	refuse := func(name, path, why string) { add(name, path, why, sockpeer.Stream, Refuse, "") }

	// Of private/ only pam: its other sockets (sbus-*) join the parts of
	// sssd itself and speak D-Bus.
	reconnect("sssd", "/var/lib/sss/pipes/*", "sssd", whySSSD)
	reconnect("sssd-private-pam", "/var/lib/sss/pipes/private/pam", "sssd", whySSSD)

	reconnect("nscd", "/run/nscd/socket", "none", whyNSCD)
	reconnect("nscd-var-run", "/var/run/nscd/socket", "none", whyNSCD)

	reconnect("pbis-lsassd", "/var/lib/pbis/.lsassd", "lwmsg", whyLWMsg)
	reconnect("pbis-netlogond", "/var/lib/pbis/.netlogond", "lwmsg", whyLWMsg)
	reconnect("pbis-eventlog", "/var/lib/pbis/.eventlog", "lwmsg", whyLWMsg)
	hangup("pbis-other", "/var/lib/pbis/.*", whyPBISOther)
	hangup("likewise", "/var/lib/likewise/.*", whyLikewise)
	hangup("likewise-open", "/var/lib/likewise-open/.*", whyLikewise)

	reconnect("winbind", "/run/samba/winbindd/pipe", "none", whyWinbind)
	reconnect("winbind-var-run", "/var/run/samba/winbindd/pipe", "none", whyWinbind)
	reconnect("winbind-privileged", "/var/lib/samba/winbindd_privileged/pipe", "none", whyWinbind)

	hangup("nslcd", "/run/nslcd/socket", whyNSLCD)
	hangup("nslcd-var-run", "/var/run/nslcd/socket", whyNSLCD)
	hangup("systemd-userdb", "/run/systemd/userdb/*", whyUserDB)
	hangup("avahi", "/run/avahi-daemon/socket", whyAvahi)
	hangup("avahi-var-run", "/var/run/avahi-daemon/socket", whyAvahi)

	// Not /run/systemd/journal/stdout: such a stream begins with lines that
	// say whose log it is, which nobody but its first owner knows.
	datagrams("syslog", "/dev/log", whyLog)
	datagrams("journald-dev-log", "/run/systemd/journal/dev-log", whyLog)
	datagrams("journald", "/run/systemd/journal/socket", whyLog)
	datagrams("journald-syslog", "/run/systemd/journal/syslog", whyLog)

	refuse("dbus-system", "/run/dbus/system_bus_socket", whyDBus)
	refuse("dbus-system-var-run", "/var/run/dbus/system_bus_socket", whyDBus)
	refuse("dbus-session", "/run/user/*/bus", whyDBus)
	refuse("dbus-session-abstract", "@/tmp/dbus-*", whyDBus)
	refuse("dbus-session-tmp", "/tmp/dbus-*", whyDBus)
	return rules
}
