// SPDX-License-Identifier: Apache-2.0

package rule_test

import (
	"strings"
	"testing"

	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

func to(name string) *sockpeer.Connection {
	return &sockpeer.Connection{Type: sockpeer.Stream, Peer: sockpeer.Peer{Name: sockpeer.Name(name), UID: 0, Exe: "/usr/sbin/d"}}
}

func TestBuiltIn(t *testing.T) {
	set := &rule.Set{Rules: rule.BuiltIn()}
	names := make(map[string]bool)
	for _, r := range set.Rules {
		if names[r.Name] || r.Why == "" || r.Source != rule.BuiltInSource || r.UID != nil {
			t.Errorf("%+v", r)
		}
		names[r.Name] = true
		if r.Idle != rule.Refuse && r.Busy != rule.Hangup {
			t.Errorf("%s: busy is %s", r.Name, r.Busy)
		}
	}
	for _, tt := range []struct {
		name    string
		typ     sockpeer.Type
		idle    rule.Action
		prelude string
	}{
		{"/var/lib/sss/pipes/nss", sockpeer.Stream, rule.Reconnect, "sssd"},
		{"/var/lib/sss/pipes/private/pam", sockpeer.Stream, rule.Reconnect, "sssd"},
		{"/run/nscd/socket", sockpeer.Stream, rule.Reconnect, "none"},
		{"/var/run/nscd/socket", sockpeer.Stream, rule.Reconnect, "none"},
		{"/var/lib/pbis/.lsassd", sockpeer.Stream, rule.Reconnect, "lwmsg"},
		{"/var/lib/pbis/.netlogond", sockpeer.Stream, rule.Reconnect, "lwmsg"},
		{"/var/lib/pbis/.eventlog", sockpeer.Stream, rule.Reconnect, "lwmsg"},
		{"/var/lib/pbis/.lwiod", sockpeer.Stream, rule.Hangup, ""},
		{"/var/lib/likewise/.lsassd", sockpeer.Stream, rule.Hangup, ""},
		{"/run/samba/winbindd/pipe", sockpeer.Stream, rule.Reconnect, "none"},
		{"/run/nslcd/socket", sockpeer.Stream, rule.Hangup, ""},
		{"/run/systemd/userdb/io.systemd.DynamicUser", sockpeer.Stream, rule.Hangup, ""},
		{"/run/avahi-daemon/socket", sockpeer.Stream, rule.Hangup, ""},
		{"/dev/log", sockpeer.Dgram, rule.Reconnect, "none"},
		{"/run/systemd/journal/dev-log", sockpeer.Dgram, rule.Reconnect, "none"},
		{"/run/systemd/journal/socket", sockpeer.Dgram, rule.Reconnect, "none"},
		{"/run/systemd/journal/syslog", sockpeer.Dgram, rule.Reconnect, "none"},
		{"/run/systemd/journal/stdout", sockpeer.Stream, rule.Refuse, ""},
		{"/run/dbus/system_bus_socket", sockpeer.Stream, rule.Refuse, ""},
		{"/run/user/1000/bus", sockpeer.Stream, rule.Refuse, ""},
		{"\x00/tmp/dbus-Ab1", sockpeer.Stream, rule.Refuse, ""},
	} {
		c := to(tt.name)
		c.Type = tt.typ
		r := set.Match(c)
		if r == nil || r.Idle != tt.idle || r.Prelude != tt.prelude {
			t.Errorf("%q: %+v", tt.name, r)
		}
	}
	for _, name := range []string{"/dev/log", "/var/lib/sss/pipes/private/sbus-monitor", "@/tmp/dbus-1", "", "\x00"} {
		if r := set.Match(to(name)); r != nil {
			t.Errorf("%q falls under %s", name, r.Name)
		}
	}
}

func TestMatch(t *testing.T) {
	inbound := to("")
	inbound.Direction, inbound.Name = sockpeer.Inbound, "/run/me"
	inside := to("/run/d")
	inside.Peer.Path = "/inside/d"
	for _, tt := range []struct {
		name string
		rule rule.Rule
		c    *sockpeer.Connection
		want bool
	}{
		{"all conditions", rule.Rule{Path: "/a/*", Type: ptr(sockpeer.Stream), Exe: "/usr/*/d", UID: ptr(uint32(0))}, to("/a/b"), true},
		{"star stops at a slash", rule.Rule{Path: "/a/*"}, to("/a/b/c"), false},
		{"other type", rule.Rule{Path: "/a", Type: ptr(sockpeer.Dgram)}, to("/a"), false},
		{"other exe", rule.Rule{Exe: "/bin/*"}, to("/a"), false},
		{"other uid", rule.Rule{UID: ptr(uint32(1))}, to("/a"), false},
		{"exe alone, no name", rule.Rule{Exe: "/usr/sbin/d"}, to(""), true},
		{"abstract", rule.Rule{Path: "@a?"}, to("\x00ab"), true},
		{"abstract is not a path", rule.Rule{Path: "/a"}, to("\x00/a"), false},
		{"relative path that looks abstract", rule.Rule{Path: "@a"}, to("@a"), false},
		{"the daemon's name", rule.Rule{Path: "/run/*"}, inside, true},
		{"the application's name for it", rule.Rule{Path: "/inside/*"}, inside, true},
		{"neither", rule.Rule{Path: "/*"}, inside, false},
		{"inbound by our own name", rule.Rule{Path: "/run/*", Direction: sockpeer.Inbound}, inbound, true},
		{"inbound wants an inbound rule", rule.Rule{Path: "/run/*"}, inbound, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set := &rule.Set{Rules: []rule.Rule{tt.rule, {Name: "second"}}}
			if got := set.Match(tt.c) == &set.Rules[0]; got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestMatchFirstWins(t *testing.T) {
	set := &rule.Set{Rules: []rule.Rule{{Name: "a", Path: "/x"}, {Name: "b", Path: "/y"}, {Name: "c", Path: "/y"}}}
	if r := set.Match(to("/y")); r == nil || r.Name != "b" {
		t.Errorf("%+v", r)
	}
	if r := set.Match(to("/z")); r != nil {
		t.Errorf("%+v", r)
	}
}

var oddNames = []string{
	"/run/proxy/a.sock", "/run/nscd", "/nscd", "/a b", "/it's \"quoted\" #no: comment", "/line\nbreak\ttab", "/glob*[x]?\\y",
	"/\xff\xfe\x80bytes", "/\ufffd", "/€/𝄞", "\x00", "\x00abs/tract\x00\x00", "\x00*", "\x00\xff", "/", "/" + strings.Repeat("x", 106),
	"/run/dbus/system_bus_socket", "/yes", "/\u2028\u0085\ufeff",
}

func TestSnippet(t *testing.T) {
	for _, name := range oddNames {
		for _, direction := range []sockpeer.Direction{sockpeer.Outbound, sockpeer.Inbound} {
			for _, uid := range []int64{-1, 0, 1000} {
				checkSnippet(t, name, "/usr/sbin/d", direction, uid)
			}
		}
	}
	for _, exe := range []string{"/usr/bin/we ird*\xff (deleted)", ""} {
		for _, name := range []string{"", "relative", "@relative"} {
			checkSnippet(t, name, exe, sockpeer.Outbound, 0)
			checkSnippet(t, name, exe, sockpeer.Inbound, -1)
		}
	}
}

func FuzzSnippet(f *testing.F) {
	for _, name := range oddNames {
		f.Add(name, "/usr/sbin/d", false, int64(0))
	}
	f.Fuzz(func(t *testing.T, name, exe string, inbound bool, uid int64) {
		direction := sockpeer.Outbound
		if inbound {
			direction = sockpeer.Inbound
		}
		checkSnippet(t, name, exe, direction, uid)
	})
}

// checkSnippet: the snippet is a file in order, and allows its connection.
func checkSnippet(t *testing.T, name, exe string, direction sockpeer.Direction, uid int64) {
	t.Helper()
	c := to(name)
	c.Direction, c.Peer.Exe, c.Peer.UID = direction, exe, uid
	c.RecvQueue = 3
	if direction == sockpeer.Inbound {
		c.Name, c.Peer.Name = c.Peer.Name, ""
	}
	text := rule.Snippet(c)
	f, err := rule.Parse("f", strings.NewReader(text))
	if err != nil {
		t.Fatalf("%q: %v\n%s", name, err, text)
	}
	if err := f.Clashes(); err != nil {
		t.Errorf("%q: %v\n%s", name, err, text)
	}
	if len(f.Rules) == 0 {
		given := f.Unknown
		if direction == sockpeer.Inbound {
			given = f.Inbound
		}
		if given == nil || *given != rule.Hangup {
			t.Errorf("%q is not allowed by\n%s", name, text)
		}
		return
	}
	r := (&rule.Set{Rules: f.Rules}).Match(c)
	if r == nil || r.Idle == rule.Refuse || r.Busy != rule.Hangup || r.Name != rule.SnippetName(c) {
		t.Errorf("%q is not allowed by\n%s", name, text)
	}
	if r != nil && r.Idle == rule.Reconnect && (direction == sockpeer.Inbound || uid < 0) {
		t.Errorf("%q cannot be reconnected:\n%s", name, text)
	}
}

func TestSnippetText(t *testing.T) {
	const want = `rules:
  - name: run-proxy-a
    path: /run/proxy/a.sock
    type: stream
    uid: 0
    idle: reconnect     # a new connection, without any greeting; or hangup: the application finds it dead
    busy: hangup        # or refuse, or wait
`
	if got := rule.Snippet(to("/run/proxy/a.sock")); got != want {
		t.Errorf("got\n%s", got)
	}
	half := to("/run/proxy/a.sock")
	half.Shutdown = 1
	for c, why := range map[*sockpeer.Connection]string{half: "half closed", to("/run/systemd/journal/stdout"): "EPIPE"} {
		if got := rule.Snippet(c); !strings.Contains(got, "    idle: hangup ") || !strings.Contains(got, why) {
			t.Errorf("got\n%s", got)
		}
	}
	if got := rule.Snippet(to("/run/user/0/bus")); !strings.Contains(got, "    prelude: dbus\n") || !strings.Contains(got, "match rules are lost") {
		t.Errorf("got\n%s", got)
	}
}

func TestEscapeGlob(t *testing.T) {
	for in, want := range map[string]string{"/a": "/a", `/*?[\`: `/\*\?\[\\`, "/\xff\ufffd": "/?\ufffd"} {
		if got := rule.EscapeGlob(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
