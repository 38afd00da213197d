// SPDX-License-Identifier: Apache-2.0

package rule

import "criuhook/sockpeer"

// BuiltInSource is the Source of the built-in rules.
const BuiltInSource = "built-in"

// BuiltIn returns the built-in rules in order, a fresh copy each time. They
// do not ask for the listener's uid: sssd, for one, need not run as root. A
// restore compares it with the recorded one all the same.
func BuiltIn() []Rule {
	var rules []Rule
	add := func(name, path string, why reasons, t sockpeer.Type, idle Action, prelude string) {
		r := Rule{Name: name, Path: path, Type: &t, Idle: idle, Why: why.why, About: why.About, Source: BuiltInSource}
		if idle != Refuse {
			r.Busy = Hangup
		}
		if idle == Reconnect {
			r.Prelude, r.Timeout = prelude, DefaultTimeout
		}
		rules = append(rules, r)
	}
	reconnect := func(name, path, prelude string, why reasons) {
		add(name, path, why, sockpeer.Stream, Reconnect, prelude)
	}
	datagrams := func(name, path string) { add(name, path, aboutLog, sockpeer.Dgram, Reconnect, "none") }
	hangup := func(name, path string, why reasons) { add(name, path, why, sockpeer.Stream, Hangup, "") }
	refuse := func(name, path string, why reasons) { add(name, path, why, sockpeer.Stream, Refuse, "") }

	// Of private/ only pam: its other sockets (sbus-*) join the parts of
	// sssd itself and speak D-Bus.
	reconnect("sssd", "/var/lib/sss/pipes/*", "sssd", aboutSSSD)
	reconnect("sssd-private-pam", "/var/lib/sss/pipes/private/pam", "sssd", aboutSSSD)

	// unscd listens at the same name.
	reconnect("nscd", "/run/nscd/socket", "none", aboutNSCD)
	reconnect("nscd-var-run", "/var/run/nscd/socket", "none", aboutNSCD)

	reconnect("pbis-lsassd", "/var/lib/pbis/.lsassd", "lwmsg", aboutLSASS)
	reconnect("pbis-netlogond", "/var/lib/pbis/.netlogond", "lwmsg", aboutLWMsg)
	reconnect("pbis-eventlog", "/var/lib/pbis/.eventlog", "lwmsg", aboutLWMsg)
	hangup("pbis-other", "/var/lib/pbis/.*", aboutPBISOther)
	hangup("likewise", "/var/lib/likewise/.*", aboutLikewise)
	hangup("likewise-open", "/var/lib/likewise-open/.*", aboutLikewise)

	reconnect("winbind", "/run/samba/winbindd/pipe", "none", aboutWinbind)
	reconnect("winbind-var-run", "/var/run/samba/winbindd/pipe", "none", aboutWinbind)
	reconnect("winbind-privileged", "/var/lib/samba/winbindd_privileged/pipe", "none", aboutWinbind)

	hangup("nslcd", "/run/nslcd/socket", aboutNSLCD)
	hangup("nslcd-var-run", "/var/run/nslcd/socket", aboutNSLCD)
	hangup("systemd-userdb", "/run/systemd/userdb/*", aboutUserDB)
	hangup("avahi", "/run/avahi-daemon/socket", aboutAvahi)
	hangup("avahi-var-run", "/var/run/avahi-daemon/socket", aboutAvahi)

	datagrams("syslog", "/dev/log")
	datagrams("journald-dev-log", "/run/systemd/journal/dev-log")
	datagrams("journald", "/run/systemd/journal/socket")
	datagrams("journald-syslog", "/run/systemd/journal/syslog")
	refuse(stdoutRule, "/run/systemd/journal/stdout", aboutStdout)

	refuse("dbus-system", "/run/dbus/system_bus_socket", aboutDBus)
	refuse("dbus-system-var-run", "/var/run/dbus/system_bus_socket", aboutDBus)
	refuse("dbus-session", "/run/user/*/bus", aboutDBus)
	refuse("dbus-session-abstract", "@/tmp/dbus-*", aboutDBus)
	refuse("dbus-session-tmp", "/tmp/dbus-*", aboutDBus)
	return rules
}

// stdoutRule is the one whose streams cannot be made again.
const stdoutRule = "journald-stdout"
