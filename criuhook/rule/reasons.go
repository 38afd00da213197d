// SPDX-License-Identifier: Apache-2.0

package rule

// reasons are why built-in rules are as they are. docs/rules.md is made of
// them (TestRulesPage). Plain ASCII: they are printed as they stand.
//
// "Measured": seen with the real client, of Debian 13 where it has one (glibc and
// nscd 2.41, sssd 2.10.1, samba 4.22, dbus 1.16). A test that is named shows it.
type reasons struct {
	why string
	About
}

var aboutSSSD = reasons{
	why: "A new connection that begins with the version exchange is as good as the old one. Without it sssd_pam crashes on the " +
		"first command, and sudo's service shares that code. A request under way would wait for its answer for a minute and " +
		"a half, so a busy connection is hung up.",
	About: About{
		Client: "libnss_sss (names), pam_sss, libsss_sudo, libsss_autofs and Kerberos' PAC plugin share one client: each thread that " +
			"has asked keeps a connection (in older versions, the process keeps one), begun with a version exchange. Before a " +
			"request newer ones compare pid, /proc/self and the socket with what they remember; after a restore these differ, and " +
			"they connect anew by themselves, leaving the old fd open. Older ones go on with the connection that they find.",
		Cost: "Idle: no lookup fails, the first one takes some milliseconds. The library leaves one fd open for each thread and " +
			"restore, until the process ends, whatever the rule. By this rule these, too, are connected anew at each restore, so that " +
			"sssd has one connection more for each thread and restore (after twenty restores of two threads 42), until " +
			"it hangs up on those that were idle for its client_idle_timeout (60 seconds by default; it looks every 30) and has as many as " +
			"before (2). Where restores follow each other faster than that, hang up instead, which fails no lookup either: " +
			"rules: [{name: sssd-hangup, path: /var/lib/sss/pipes/*, idle: hangup}]. Busy: the lookup under way fails at " +
			"once, the next one works; sssd keeps its end until client_idle_timeout, as of every client that goes away " +
			"during a request.",
		Known: "sssd: src/sss_client/common.c (sss_cli_check_socket, sss_cli_check_version, sss_cli_recv_rep), sss_cli.h. Measured; " +
			"TestSSSDServices, TestSSSDServicesMidRequest, TestSSSDTwentyCycles, TestSSSDIdleTimeout, TestSSSDForked.",
	},
}

var aboutNSCD = reasons{
	why: "There is no greeting: a new connection is as good as the old one. A request under way would wait 5 seconds for its " +
		"answer, so a busy connection is hung up, and glibc asks the sources itself.",
	About: About{
		Client: "glibc itself opens a connection for each request and closes it after the answer; between requests there is none, " +
			"only the mapped database. unscd listens at the same name and speaks the same protocol, without the database; Debian " +
			"installs it as /usr/sbin/nscd, and there scan cannot tell the two apart.",
		Cost: "Idle: none. Busy: none but time, the lookup under way is answered from the sources of nsswitch.conf, and so are the " +
			"hundred after it: then glibc asks nscd again.",
		Known: "glibc: nscd/nscd_helper.c (__nscd_open_socket, wait_on_socket), nscd/nscd-client.h. Measured; " +
			"TestNSCD, TestNSCDVariants, TestUnscd, TestUnscdCycles.",
	},
}

var aboutLSASS = reasons{
	why: "With the greeting made anew the client loses no call; without it its connection stays busy for ever. A call under way " +
		"would hang, so a busy connection is hung up.",
	About: About{
		Client: "libnss_lsass and liblsaclient (lwmsg's assoc client) keep one connection, begun with a greeting (a connect packet, " +
			"answered by an accept packet), and remember nothing of it but the fd. There is no timeout for an answer.",
		Cost: "Idle: no call fails. But an enumeration (getpwent, getgrent) that is between two calls holds a handle of the server, " +
			"which cannot be seen from outside; the server never answers a handle it does not know, and the enumeration hangs. " +
			"Where programs enumerate, give this name a rule with idle: hangup: one lookup fails, the next one works. Busy: the " +
			"call under way fails.",
		Known: "pbis-open: lwmsg/src (assoc.c, assoc-session.c, connection-wire.c, peer-task.c), lsass/client, " +
			"lsass/interop/nsswitch. Measured.",
	},
}

var aboutLWMsg = reasons{
	why: "With the greeting made anew the client loses no call, and this service gives out no handles. A call under way would " +
		"hang, so a busy connection is hung up.",
	About: About{
		Client: "The client keeps one connection for the process, begun with a greeting (a connect packet, answered by an accept packet).",
		Cost:   "Idle: no call fails. Busy: the call under way fails.",
		Known: "pbis-open: lwmsg/src (connection-wire.c, peer-session.c, peer-task.c), netlogon, eventlog. " +
			"Measured.",
	},
}

var aboutPBISOther = reasons{
	why: "The client may hold a handle of the server, which no new connection brings back: a call with one would never be " +
		"answered. After a hangup it connects anew by itself.",
	About: About{
		Client: "The clients of lwio, lwreg, ntlm and lwsm (lwmsg's peer client) keep one connection for the process and nearly always " +
			"hold handles of the server: open files, registry keys, contexts.",
		Cost: "A call with a handle from before the dump fails with a clean error, all others succeed over a connection that the " +
			"client opens by itself. Busy: the call under way fails.",
		Known: "pbis-open: lwmsg/src (peer.c, peer-session.c, peer-task.c, session.c), lwio, lwreg, lwsm. " +
			"Measured.",
	},
}

var aboutLikewise = reasons{
	why: "Old Likewise speaks an older lwmsg, in which both ends begin with a greeting of another format. After a hangup the " +
		"client connects anew by itself.",
	About: About{
		Client: "As with PBIS: one connection for the process.",
		Cost:   "Of a client that waits for nothing one call may fail, the next one works. Busy: the call under way fails.",
		Known:  "likewise-open: lwmsg/src (read, not run).",
	},
}

var aboutWinbind = reasons{
	why: "The client takes a new connection as it is, without any greeting. A request under way would wait " +
		"half a minute for its answer, so a busy connection is hung up.",
	About: About{
		Client: "libnss_winbind, pam_winbind and libwbclient keep a connection each; once connected they ask for the interface's version, " +
			"and, if a request needs it, for the name of the privileged pipe, to which they then change; both are ordinary requests. " +
			"The privileged pipe lies in a directory that only root and the group winbindd_priv may enter. Before each request they look whether the connection was closed, " +
			"and then open another.",
		Cost: "Idle: none, the same fd goes on. But an enumeration (getpwent, getgrent) that is between two calls ends early, as after " +
			"a hangup: the server keeps its place with the connection. Busy: the request under way is asked again over another " +
			"connection, or fails, and the next one works.",
		Known: "samba: nsswitch/wb_common.c (winbind_open_pipe_sock, winbind_write_sock, winbind_read_sock, " +
			"winbindd_request_response), source3/winbindd/winbindd_getpwent.c. Measured, but for the enumeration; " +
			"TestNameServices, TestWinbindPrivileged, TestFieldCycles.",
	},
}

var aboutNSLCD = reasons{
	why: "The client holds a connection only while it asks, so one that is found belongs to a request under way, which no new " +
		"connection could answer.",
	About: About{
		Client: "libnss_ldap and pam_ldap open a connection for each request and close it after the answer; an enumeration (getpwent) " +
			"keeps its own until its end.",
		Cost: "The request under way, or the enumeration, fails at once; the next one works. Without the hangup it would wait 60 seconds.",
		Known: "nss-pam-ldapd: common/nslcd-prot.c (nslcd_client_open, READ_TIMEOUT), nss/common.h (the 60 seconds and the enumeration are read, not " +
			"run). Measured; TestNameServices, TestFieldCycles.",
	},
}

var aboutUserDB = reasons{
	why: "The client holds a connection only while it asks, so one that is found belongs to a request under way, which no new " +
		"connection could answer.",
	About: About{
		Client: "libnss_systemd opens varlink connections for each request, to the multiplexer or to each service, and closes them after " +
			"the answer; an enumeration keeps its own until its end.",
		Cost: "The request under way fails at once in this source, and nsswitch.conf's next one is asked; the next request works.",
		Known: "systemd: src/shared/userdb.c (userdb_connect, userdb_start_query), src/nss-systemd (the enumeration is read, not " +
			"run). Measured; TestNameServices, TestFieldCycles.",
	},
}

var aboutAvahi = reasons{
	why: "The client holds a connection only while it asks, so one that is found belongs to a request under way, which no new " +
		"connection could answer.",
	About: About{
		Client: "libnss_mdns opens a connection for each name or address, and closes it after the answer.",
		Cost:   "The lookup under way fails at once in this source, and nsswitch.conf's next one is asked; the next lookup works.",
		Known:  "nss-mdns: src/avahi.c (open_socket, avahi_resolve_name). Measured; TestNameServices, TestFieldCycles.",
	},
}

var aboutLog = reasons{
	why: "A datagram socket holds no state: messages go on over a new connection.",
	About: About{
		Client: "syslog() connects one datagram socket at its first message and keeps it; if it cannot send, it connects another and " +
			"sends again. libsystemd's own logging (sd_journal_send) never connects its socket, so that CRIU dumps it as it is.",
		Cost: "Idle: none; what was sent before the dump is in the daemon's hands. Busy (the daemon has not read all yet): hung up, " +
			"which syslog() mends by itself; other programs lose what they send until they connect anew.",
		Known: "glibc: misc/syslog.c (__vsyslog_internal, openlog_internal); systemd: src/libsystemd/sd-journal/journal-send.c " +
			"(journal_fd). Measured; TestLogDaemons, TestFieldCycles.",
	},
}

var aboutStdout = reasons{
	why: "The stream began with lines that tell journald whose log it is, which nobody but systemd knows. Choose: let the service " +
		"write to a file or a pipe (StandardOutput=), or idle: hangup and busy: hangup (all that it prints later is lost: writing " +
		"fails with EPIPE, and SIGPIPE ends a program that does not ignore it).",
	About: About{
		Client: "systemd connects standard output and error of a service before it starts the program (so do systemd-cat and " +
			"sd_journal_stream_fd), shuts the reading half down and writes seven lines: identifier, unit, priority and flags.",
		Cost:  "The dump is refused, and the service runs on.",
		Known: "systemd: src/core/exec-invoke.c (connect_logger_as), src/journal/journald-stream.c (read, not run).",
	},
}

var aboutDBus = reasons{
	why: "On a new connection the bus gives another unique name. Choose: idle: hangup (most D-Bus libraries then end the process), " +
		"or idle: reconnect with prelude: dbus (calls work again, but the unique name, the names it owned and its match rules are gone).",
	About: About{
		Client: "libdbus, GDBus and sd-bus authenticate, say Hello and are given a unique name; the names they own, their match rules and " +
			"their calls under way live in the bus's connection.",
		Cost: "The dump is refused, and the application runs on. By your own rule: after a hangup calls end with NoReply, and then " +
			"libdbus ends the process (exit_on_disconnect); after a reconnect signals no longer arrive, and others do not find its names. " +
			"No rule helps a client by sd-bus (of systemd 257, say): it keeps a pidfd of the process that listens for the bus, and CRIU " +
			"4.1.1 does not dump that (pidfd pid N is not a part of process tree) as long as that process lives.",
		Known: "dbus: dbus/dbus-bus.c (exit_on_disconnect), the D-Bus Specification (Message Bus Specification). Measured; " +
			"TestBusRefused, TestBusHangup, TestBusReconnect, TestBusBusy, TestSessionBus.",
	},
}

// Reason is a part of what explains a rule.
type Reason struct{ Title, Text string }

// Reasons explain the rule, in the order in which they read well; none for a
// rule of one's own.
func (r *Rule) Reasons() []Reason {
	var out []Reason
	for _, x := range []Reason{
		{"Client", r.About.Client}, {"Cost", r.About.Cost}, {"Why", r.Why}, {"Known from", r.About.Known},
	} {
		if x.Text != "" {
			out = append(out, x)
		}
	}
	return out
}

// SameReasons reports whether two rules are explained alike.
func (r *Rule) SameReasons(o *Rule) bool { return r.Why == o.Why && r.About == o.About }
