// SPDX-License-Identifier: Apache-2.0

package rule_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

func ptr[T any](v T) *T { return &v }

func TestParse(t *testing.T) {
	f, err := rule.Parse("f.yaml", strings.NewReader(`# a file
criu: /opt/criu/sbin/criu
rules:
  - name: session-proxy
    path: /run/proxy/*.sock
    type: stream
    exe: /usr/sbin/*
    uid: 0
    direction: outbound
    idle: reconnect
    busy: wait
    patience: 1500ms
    prelude: dbus
    to: "@new"
    timeout: 5m
    absent: fail
  - {name: short, path: "@x[ab]", idle: reconnect}
  - name: served
    direction: inbound
    path: /run/me
    idle: hangup
    busy: wait
  - name: never
    exe: /opt/*/bin
    idle: refuse
unknown: hangup
inbound: refuse
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []rule.Rule{{
		Name: "session-proxy", Path: "/run/proxy/*.sock", Type: ptr(sockpeer.Stream), Exe: "/usr/sbin/*", UID: ptr(uint32(0)),
		Idle: rule.Reconnect, Busy: rule.Wait, Patience: 1500 * time.Millisecond,
		Prelude: "dbus", To: "@new", Timeout: 5 * time.Minute, Absent: rule.AbsentFail, Source: "f.yaml:4",
	}, {
		Name: "short", Path: "@x[ab]", Idle: rule.Reconnect, Busy: rule.Hangup,
		Prelude: "none", Timeout: rule.DefaultTimeout, Source: "f.yaml:17",
	}, {
		Name: "served", Path: "/run/me", Direction: sockpeer.Inbound, Idle: rule.Hangup, Busy: rule.Wait,
		Patience: rule.DefaultPatience, Source: "f.yaml:18",
	}, {
		Name: "never", Exe: "/opt/*/bin", Idle: rule.Refuse, Busy: rule.Refuse, Source: "f.yaml:23",
	}}
	if diff := cmp.Diff(want, f.Rules); diff != "" {
		t.Error(diff)
	}
	if f.CRIU != "/opt/criu/sbin/criu" || f.Unknown == nil || *f.Unknown != rule.Hangup || f.Inbound == nil || *f.Inbound != rule.Refuse {
		t.Errorf("criu %q, unknown %v, inbound %v", f.CRIU, f.Unknown, f.Inbound)
	}
}

func TestParseNothing(t *testing.T) {
	for _, in := range []string{"", "\n", "# only a comment\n", "---\n", "rules:\n", "rules: []\n", "{}\n"} {
		f, err := rule.Parse("f", strings.NewReader(in))
		if err != nil || len(f.Rules) != 0 || f.Unknown != nil {
			t.Errorf("%q: %+v, %v", in, f, err)
		}
	}
}

// one is a file with one good rule and more lines in it, which start in line 5.
func one(more string) string {
	return "rules:\n  - name: a\n    path: /a\n    idle: reconnect\n" + more
}

func TestParseErrors(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	for _, tt := range []struct {
		name, in string
		want     []string // start of each error line
	}{
		{"unknown top key", "unknwon: hangup\n", []string{`f:1:1: unknown key "unknwon" in the file: did you mean "unknown"?`}},
		{"unknown far key", "zzzzzz: 1\n", []string{`f:1:1: unknown key "zzzzzz" in the file: known are rules, unknown, inbound, criu`}},
		{"unknown rule key", one("    preludes: sssd\n"), []string{`f:5:5: unknown key "preludes" in a rule: did you mean "prelude"?`}},
		{"duplicate key", one("    idle: hangup\n"), []string{`f:5:5: key "idle" is there twice, first in line 4`}},
		{"duplicate top key", "unknown: refuse\nunknown: refuse\n", []string{`f:2:1: key "unknown" is there twice`}},
		{"not a mapping", "- a\n", []string{`f:1:1: the file must be a mapping (key: value), not a list`}},
		{"rules not a list", "rules: {a: b}\n", []string{`f:1:8: rules must be a list`}},
		{"rule not a mapping", "rules: [x]\n", []string{`f:1:9: a rule must be a mapping (key: value), not a string`}},
		{"key not a word", "[a]: b\n", []string{`f:1:1: a key of the file must be a word, not a list`}},
		{"no name", "rules:\n  - path: /a\n    idle: hangup\n", []string{`f:2:5: the rule has no name`}},
		{"bad name", "rules:\n  - name: a b\n    path: /a\n    idle: hangup\n", []string{`f:2:11: bad name "a b"`}},
		{"number as name", "rules:\n  - name: 12\n    path: /a\n    idle: hangup\n", []string{`f:2:11: name must be a string, not a number: put it in quotes`}},
		{"no idle", "rules:\n  - name: a\n    path: /a\n", []string{`f:2:5: the rule has no idle: say idle: reconnect, hangup or refuse`}},
		{"everything", "rules:\n  - name: a\n    idle: hangup\n", []string{`f:2:5: the rule matches everything: give it a path, exe, uid or type, or set "unknown"`}},
		{"everything inbound", "rules:\n  - name: a\n    direction: inbound\n    idle: hangup\n", []string{`f:2:5: the rule matches everything: give it a path, exe, uid or type, or set "inbound"`}},
		{"same name twice", one("  - name: a\n    path: /b\n    idle: hangup\n"), []string{`f:5:11: a second rule named "a", the first is in line 2`}},
		{"relative path", "rules:\n  - {name: a, path: run/x, idle: hangup}\n", []string{`f:2:21: path must start with / or, for an abstract name, with @: "run/x"`}},
		{"empty path", "rules:\n  - {name: a, path: '', idle: hangup}\n", []string{`f:2:21: path is empty`}},
		{"bad glob", "rules:\n  - {name: a, path: '/x[', idle: hangup}\n", []string{`f:2:21: path "/x[": bad glob`}},
		{"glob of two stars", "rules:\n  - {name: a, path: '/x/**', idle: hangup}\n", []string{`f:2:21: path "/x/**": bad glob: ** is not known`}},
		{"escaped stars", "rules:\n  - {name: a, path: '/x/\\**[**]\\*\\*', idle: hangup}\n", nil},
		{"bad exe", one("    exe: bin/x\n"), []string{`f:5:10: exe must start with /: "bin/x"`}},
		{"bad exe glob", one("    exe: '/[a'\n"), []string{`f:5:10: exe "/[a": bad glob`}},
		{"bad type", one("    type: tcp\n"), []string{`f:5:11: type must be stream, seqpacket or dgram, not "tcp"`}},
		{"uid is a word", one("    uid: root\n"), []string{`f:5:10: uid must be a number, not a string`}},
		{"uid too large", one("    uid: 4294967295\n"), []string{`f:5:10: uid must be a decimal number from 0 to 4294967294`}},
		{"uid octal", one("    uid: 010\n"), []string{`f:5:10: uid must be a decimal number`}},
		{"uid negative", one("    uid: -1\n"), []string{`f:5:10: uid must be a decimal number`}},
		{"bad direction", one("    direction: out\n"), []string{`f:5:16: direction must be outbound or inbound, not "out"`}},
		{"bad idle", "rules:\n  - {name: a, path: /a, idle: wait}\n", []string{`f:2:31: idle must be reconnect, hangup or refuse, not "wait"`}},
		{"bad busy", one("    busy: reconnect\n"), []string{`f:5:11: busy must be hangup, refuse or wait, not "reconnect"`}},
		{"null busy", one("    busy:\n"), []string{`f:5:10: busy must be hangup, refuse or wait, not nothing`}},
		{"bad absent", one("    absent: wait\n"), []string{`f:5:13: absent must be hangup or fail`}},
		{"bad prelude", one("    prelude: nscd\n"), []string{`f:5:14: prelude must be none, sssd, lwmsg or dbus`}},
		{"bad unknown", "unknown: wait\ninbound: reconnect\n", []string{`f:1:10: unknown must be refuse or hangup, not "wait"`, `f:2:10: inbound must be`}},
		{"number as duration", one("    timeout: 2\n"), []string{`f:5:14: timeout must be a duration with a unit, such as 2s or 500ms, not "2"`}},
		{"zero duration", one("    timeout: 0s\n"), []string{`f:5:14: timeout must be more than 0 and at most 5m0s, not 0s`}},
		{"negative duration", one("    timeout: -1s\n"), []string{`f:5:14: timeout must be more than 0`}},
		{"endless duration", one("    timeout: 301s\n"), []string{`f:5:14: timeout must be more than 0 and at most`}},
		{"duration is a list", one("    timeout: [1s]\n"), []string{`f:5:14: timeout must be a duration such as 2s, not a list`}},
		{"inbound reconnect", one("    direction: inbound\n"), []string{`f:4:11: idle: reconnect is not possible with direction: inbound`}},
		{"hangup with reconnect's keys", "rules:\n  - name: a\n    path: /a\n    idle: hangup\n    prelude: none\n    to: /b\n    timeout: 2s\n    absent: fail\n",
			[]string{"f:5:14: prelude means", "f:6:9: to means", "f:7:14: timeout means", "f:8:13: absent means"}},
		{"patience without wait", one("    patience: 2s\n"), []string{`f:5:15: patience means something only with busy: wait`}},
		{"refuse but busy hangup", "rules:\n  - {name: a, path: /a, idle: refuse, busy: hangup}\n", []string{`f:2:45: busy: hangup makes no sense with idle: refuse`}},
		{"prelude of datagrams", one("    type: dgram\n    prelude: sssd\n"), []string{`f:6:14: prelude: sssd is not possible with type: dgram`}},
		{"to glob", one("    to: /b*\n"), []string{`f:5:9: to: "/b*": must be one name, not a glob`}},
		{"to relative", one("    to: b\n"), []string{`f:5:9: to: "b": must start with /`}},
		{"to nobody", one("    to: '@'\n"), []string{`f:5:9: to: "@": the abstract name is empty`}},
		{"to too long", one("    to: " + long + "\n"), []string{`f:5:9: to: "` + long + `": longer than 107 bytes`}},
		{"abstract to just fits", one("    to: '@" + long[1:] + "'\n"), nil},
		{"criu relative", "criu: bin/criu\n", []string{`f:1:7: criu must be an absolute path, not "bin/criu"`}},
		{"anchor", "unknown: &a hangup\ninbound: *a\n", []string{"f:1:10: an anchor (&a) is not allowed", "f:2:10: an alias (*a) is not allowed"}},
		{"merge key", "<<: {unknown: hangup}\n", []string{"f:1:1: a merge key (<<) is not allowed"}},
		{"tag", "unknown: !!str hangup\n", []string{"f:1:10: a tag (!!str) is not allowed"}},
		{"two documents", "unknown: hangup\n---\ninbound: hangup\n", []string{"f:2:1: a second YAML document"}},
		{"not YAML", "rules:\n  - name: [a\n", []string{"f:"}},
		{"not UTF-8", "# x\n  \xff\n", []string{"f:2:3: not UTF-8"}},
		{"control character", "unknown: \x01\n", []string{"f:1:10: control character U+0001"}},
		{"several at once", "rules:\n  - name: a\n    path: x\n    idle: never\n  - pth: /y\n    name: b\n    uid: 1\n    idle: hangup\nunknwon: x\n",
			[]string{"f:3:11: path must", "f:4:11: idle must", `f:5:5: unknown key "pth"`, `f:9:1: unknown key "unknwon"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := rule.Parse("f", strings.NewReader(tt.in))
			var got []string
			if err != nil {
				got = strings.Split(err.Error(), "\n")
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %q, want %q", got, tt.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("got  %s\nwant %s", got[i], tt.want[i])
				}
			}
			if e := (*rule.Error)(nil); err != nil && !errors.As(err, &e) {
				t.Errorf("%T is no *rule.Error", err)
			}
		})
	}
}

func TestParseBounds(t *testing.T) {
	if _, err := rule.Parse("f", strings.NewReader("#"+strings.Repeat("x", rule.MaxFileSize))); err == nil {
		t.Error("a file that is too large was read")
	}
	_, err := rule.Parse("f", strings.NewReader("rules: ["+strings.Repeat("x, ", 1000)+"x]"))
	if n := strings.Count(err.Error(), "\n"); n > 60 || !strings.Contains(err.Error(), "and 951 more errors") {
		t.Errorf("%d lines of errors: %.2000s", n, err)
	}
}

func TestNearest(t *testing.T) {
	known := []string{"to", "uid", "path", "patience"}
	for word, want := range map[string]string{"paht": "path", "patients": "patience", "guid": "uid", "xx": "", "user": ""} {
		if got := rule.Nearest(word, known); got != want {
			t.Errorf("%s: %q, want %q", word, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	all, err := (&rule.Set{Rules: rule.BuiltIn()}).YAML()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(all[:600]) // the whole takes the fuzzer too long to minimize
	f.Add([]byte(one("    busy: wait\n    to: \"@\\x00\\u20ac\"\n")))
	f.Add([]byte("rules: &a [*a]\n<<: !!x {? a : b}\n--- |\n x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := rule.Parse("f", strings.NewReader(string(data)))
		if err != nil {
			return
		}
		again(t, &rule.Set{Rules: file.Rules, CRIU: file.CRIU})
	})
}

// again writes a set and reads it back.
func again(t *testing.T, set *rule.Set) {
	t.Helper()
	text, err := set.YAML()
	if err != nil {
		t.Fatal(err)
	}
	got, err := rule.Parse("f", strings.NewReader(string(text)))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	want := append([]rule.Rule(nil), set.Rules...)
	for _, rules := range [][]rule.Rule{want, got.Rules} {
		for i := range rules {
			rules[i].Source, rules[i].Why, rules[i].About = "", "", rule.About{}
		}
	}
	if len(want) == 0 {
		want = got.Rules[:0]
	}
	if diff := cmp.Diff(want, got.Rules); diff != "" {
		t.Errorf("%s\n%s", diff, text)
	}
	if *got.Unknown != set.Unknown || *got.Inbound != set.Inbound || got.CRIU != set.CRIU {
		t.Errorf("unknown, inbound or criu changed:\n%s", text)
	}
}

func TestYAML(t *testing.T) {
	rules := append([]rule.Rule{
		{Name: "odd", Path: "@\x00\n\"\\*€𝄞é #: '", Idle: rule.Refuse, Why: "two\nlines", Source: "f:1"},
		{Name: "yes", Exe: "/a b", UID: ptr(uint32(7)), Direction: sockpeer.Inbound, Idle: rule.Hangup, Busy: rule.Wait, Patience: time.Second},
	}, rule.BuiltIn()...)
	again(t, &rule.Set{Rules: rules, Unknown: rule.Hangup, CRIU: "/usr/lib/a b/criu"})
	again(t, &rule.Set{})
}
