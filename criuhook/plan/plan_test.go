// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

func ptr[T any](v T) *T { return &v }

var me = sockpeer.Identity{UID: 1000, GID: 1000, Groups: []uint32{4, 27}}

// snapshot is a scan of one connection to /run/d, held by process 10, with
// process 11 beside it; change makes it a special one.
func snapshot(change func(*sockpeer.Connection, map[int]sockpeer.Process)) *sockpeer.Snapshot {
	c := sockpeer.Connection{
		Inode: 77, Type: sockpeer.Stream, Netns: 4026531840,
		Peer:    sockpeer.Peer{Inode: 78, Name: "/run/d", PID: 5, UID: 0, Exe: "/usr/sbin/d"},
		Holders: []sockpeer.Holder{{PID: 10, TID: 10, FD: 3, Cloexec: true}},
	}
	procs := map[int]sockpeer.Process{
		10: {PID: 10, NSPID: []int{10, 1}, Comm: "app", Identity: me},
		11: {PID: 11, NSPID: []int{11, 2}, Comm: "child", Identity: me},
	}
	if change != nil {
		change(&c, procs)
	}
	return &sockpeer.Snapshot{Connections: []sockpeer.Connection{c}, Processes: procs}
}

func shared(other sockpeer.Identity) func(*sockpeer.Connection, map[int]sockpeer.Process) {
	return func(c *sockpeer.Connection, procs map[int]sockpeer.Process) {
		c.Holders = append(c.Holders, sockpeer.Holder{PID: 11, TID: 11, FD: 4})
		p := procs[11]
		p.Identity = other
		procs[11] = p
	}
}

func mixed(pid int) func(*sockpeer.Connection, map[int]sockpeer.Process) {
	return func(_ *sockpeer.Connection, procs map[int]sockpeer.Process) {
		p := procs[pid]
		p.MixedIdentity = true
		procs[pid] = p
	}
}

func TestMake(t *testing.T) {
	type conn = sockpeer.Connection
	type procs = map[int]sockpeer.Process
	reconnect := rule.Rule{Name: "d", Path: "/run/d", Idle: rule.Reconnect, Busy: rule.Hangup, Prelude: "none"}
	with := func(change func(*rule.Rule)) *rule.Rule {
		r := reconnect
		change(&r)
		return &r
	}
	anything := with(func(r *rule.Rule) { r.Path, r.Exe = "", "/usr/sbin/d" })
	inbound := with(func(r *rule.Rule) {
		r.Path, r.Direction, r.Idle = "/run/me", sockpeer.Inbound, rule.Hangup
	})
	accepted := func(c *conn, _ procs) { c.Direction, c.Name, c.Peer.Name = sockpeer.Inbound, "/run/me", "" }
	unread := func(c *conn, _ procs) { c.RecvQueue = 5 }

	for _, tt := range []struct {
		name   string
		change func(*conn, procs)
		rule   *rule.Rule
		set    rule.Set
		want   rule.Action
		reason string
	}{
		{name: "idle", rule: &reconnect, want: rule.Reconnect},
		{name: "busy", change: unread, rule: &reconnect, want: rule.Hangup},
		{name: "busy refuses", change: unread, rule: with(func(r *rule.Rule) { r.Busy = rule.Refuse }), want: rule.Refuse, reason: "while it is busy: 5 bytes"},
		{name: "busy waits", change: unread, rule: with(func(r *rule.Rule) { r.Busy = rule.Wait }), want: rule.Wait},
		{name: "busy must not reconnect", change: unread, rule: with(func(r *rule.Rule) { r.Busy = rule.Reconnect }), want: rule.Hangup, reason: "never reconnected"},
		{name: "unaccepted", change: func(c *conn, _ procs) { c.Unaccepted = true }, rule: &reconnect, want: rule.Hangup},
		{name: "rule refuses", rule: with(func(r *rule.Rule) { r.Idle, r.Busy, r.Why = rule.Refuse, rule.Refuse, "because" }), want: rule.Refuse, reason: "because"},
		{name: "no rule", want: rule.Refuse, reason: "no rule covers it, and unknown is refuse"},
		{name: "no rule, unknown hangup", set: rule.Set{Unknown: rule.Hangup}, want: rule.Hangup},
		{name: "no rule, nonsense", set: rule.Set{Unknown: rule.Reconnect}, want: rule.Refuse, reason: "no rule"},
		{name: "inbound", change: accepted, rule: inbound, want: rule.Hangup},
		{name: "inbound, no rule", change: accepted, set: rule.Set{Unknown: rule.Hangup}, want: rule.Refuse, reason: "inbound is refuse"},
		{name: "inbound hangup", change: accepted, set: rule.Set{Inbound: rule.Hangup}, want: rule.Hangup},

		{name: "no name", change: func(c *conn, _ procs) { c.Peer.Name = "" }, rule: anything, want: rule.Refuse, reason: "no name to connect to"},
		{name: "relative name", change: func(c *conn, _ procs) { c.Peer.Name = "d" }, rule: anything, want: rule.Refuse, reason: "relative"},
		{name: "relative name, to", change: func(c *conn, _ procs) { c.Peer.Name = "d" },
			rule: with(func(r *rule.Rule) { r.Path, r.Exe, r.To = "", "/usr/sbin/d", "/run/e" }), want: rule.Reconnect},
		{name: "prelude on datagrams", change: func(c *conn, _ procs) { c.Type = sockpeer.Dgram },
			rule: with(func(r *rule.Rule) { r.Prelude = "sssd" }), want: rule.Refuse, reason: "needs a stream"},
		{name: "half closed", change: func(c *conn, _ procs) { c.Shutdown = 2 }, rule: &reconnect, want: rule.Hangup, reason: "half closed"},
		{name: "half closed will not heal", change: func(c *conn, _ procs) { c.Shutdown = 1 },
			rule: with(func(r *rule.Rule) { r.Busy = rule.Wait }), want: rule.Refuse, reason: "half closed"},
		{name: "listener unknown", change: func(c *conn, _ procs) { c.Peer.UID = -1 }, rule: &reconnect, want: rule.Hangup, reason: "user is not known"},

		{name: "shared by equals", change: shared(sockpeer.Identity{UID: 1000, GID: 1000, Groups: []uint32{27, 4}}), rule: &reconnect, want: rule.Reconnect},
		{name: "other uid", change: shared(sockpeer.Identity{UID: 0, GID: 1000, Groups: me.Groups}), rule: &reconnect, want: rule.Hangup, reason: "processes 10 and 11"},
		{name: "other gid", change: shared(sockpeer.Identity{UID: 1000, GID: 0, Groups: me.Groups}), rule: &reconnect, want: rule.Hangup, reason: "different rights"},
		{name: "other groups", change: shared(sockpeer.Identity{UID: 1000, GID: 1000}), rule: &reconnect, want: rule.Hangup, reason: "different rights"},
		{name: "other capabilities", change: shared(sockpeer.Identity{UID: 1000, GID: 1000, Groups: me.Groups, CapEff: 1}), rule: &reconnect, want: rule.Hangup, reason: "different rights"},
		{name: "unequal, but hung up", change: shared(sockpeer.Identity{}), rule: with(func(r *rule.Rule) { r.Idle = rule.Hangup }), want: rule.Hangup},

		{name: "mixed identity", change: mixed(10), rule: &reconnect, want: rule.Hangup, reason: "the threads of process 10 have different rights"},
		{name: "mixed identity of another holder", change: func(c *conn, p procs) { shared(me)(c, p); mixed(11)(c, p) },
			rule: &reconnect, want: rule.Hangup, reason: "the threads of process 11 have different rights"},
		{name: "mixed identity of no holder", change: mixed(11), rule: &reconnect, want: rule.Reconnect},

		{name: "elsewhere", change: func(c *conn, _ procs) { c.Peer.Elsewhere = true }, rule: &reconnect, want: rule.Hangup,
			reason: "for process 10 the name leads to another file than the daemon's, or could not be looked up in time; give the rule a to"},
		{name: "elsewhere, under another name", change: func(c *conn, _ procs) { c.Peer.Elsewhere, c.Peer.Path = true, "/inside/d" },
			rule: &reconnect, want: rule.Reconnect},
		{name: "a rule for the name inside", change: func(c *conn, _ procs) { c.Peer.Path = "/inside/d" },
			rule: with(func(r *rule.Rule) { r.Path = "/inside/*" }), want: rule.Reconnect},
		{name: "elsewhere, to", change: func(c *conn, _ procs) { c.Peer.Elsewhere = true },
			rule: with(func(r *rule.Rule) { r.To = "/run/e" }), want: rule.Reconnect},

		{name: "fd table of a thread", change: func(c *conn, _ procs) { c.Holders[0].TID = 12 }, rule: &reconnect, want: rule.Refuse, reason: "thread 12 of process 10"},
		{name: "no process", change: func(_ *conn, p procs) { delete(p, 10) }, rule: &reconnect, want: rule.Refuse, reason: "nothing of process 10"},
		{name: "no holder", change: func(c *conn, _ procs) { c.Holders = nil }, rule: &reconnect, want: rule.Refuse, reason: "no process"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.rule != nil {
				tt.set.Rules = []rule.Rule{*tt.rule}
			}
			p := plan.Make(snapshot(tt.change), &tt.set)
			if len(p.Decisions) != 1 || p.Empty() {
				t.Fatalf("%d decisions", len(p.Decisions))
			}
			d := p.Decisions[0]
			if d.Action != tt.want || !strings.Contains(d.Reason, tt.reason) || (tt.reason == "") != (d.Reason == "") {
				t.Errorf("%s: %q, want %s: %q", d.Action, d.Reason, tt.want, tt.reason)
			}
			if d.Action == rule.Refuse && d.Reason == "" {
				t.Error("refused without a reason")
			}
			if (tt.rule == nil) != (d.Rule == nil) {
				t.Errorf("rule %v", d.Rule)
			}
			if got := len(p.Refused()) == 1; got != (tt.want == rule.Refuse) {
				t.Errorf("refused: %v", got)
			}
			if got := len(p.Waiting()) == 1; got != (tt.want == rule.Wait) {
				t.Errorf("waiting: %v", got)
			}
			if got := p.Explain() != ""; got != (tt.want == rule.Refuse) {
				t.Errorf("explained: %v", got)
			}
		})
	}
}

func TestExpire(t *testing.T) {
	set := &rule.Set{Rules: []rule.Rule{{Name: "d", Path: "/run/d", Idle: rule.Hangup, Busy: rule.Wait, Patience: 2 * time.Second}}}
	p := plan.Make(snapshot(func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.RecvQueue = 1 }), set)
	p.Expire(time.Second)
	if len(p.Waiting()) != 1 {
		t.Fatal("gave up too early")
	}
	p.Expire(2 * time.Second)
	if len(p.Waiting()) != 0 || len(p.Refused()) != 1 || !strings.Contains(p.Decisions[0].Reason, "busy for the 2s") {
		t.Errorf("%+v", p.Decisions[0])
	}
}

func TestEmpty(t *testing.T) {
	p := plan.Make(&sockpeer.Snapshot{}, &rule.Set{})
	rec, err := p.Record(&sockpeer.Snapshot{}, 1)
	if !p.Empty() || err != nil || len(rec.Connections) != 0 || p.Explain() != "" {
		t.Errorf("%+v, %v, %v", p, rec, err)
	}
}

// What a refusal advises must lift it.
func TestAdvice(t *testing.T) {
	for _, name := range []sockpeer.Name{"/run/d", "\x00odd*\xff\n", "/run/dbus/system_bus_socket", "/run/systemd/journal/stdout", "relative", ""} {
		snap := snapshot(func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.Peer.Name = name })
		before := plan.Make(snap, &rule.Set{Rules: rule.BuiltIn()})
		if len(before.Refused()) != 1 {
			t.Fatalf("%q is not refused", name)
		}
		text := before.Decisions[0].Explain()
		_, yaml, ok := strings.Cut(text, "is right):\n")
		if !ok {
			t.Fatalf("no advice:\n%s", text)
		}
		yaml = strings.ReplaceAll(yaml, "\n    ", "\n")[4:]
		f, err := rule.Parse("f", strings.NewReader(yaml))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		set := &rule.Set{Rules: append(f.Rules, rule.BuiltIn()...)}
		if after := plan.Make(snap, set); len(after.Refused()) != 0 {
			t.Errorf("%q is still refused: %s", name, after.Explain())
		}
	}
}

func TestExplain(t *testing.T) {
	twice := snapshot(func(c *sockpeer.Connection, procs map[int]sockpeer.Process) {
		p := procs[10]
		p.Comm = "a\x1bpp"
		procs[10] = p
		c.RecvQueue = 3
	})
	twice.Connections = append(twice.Connections, twice.Connections[0])
	twice.Connections[1].Inode = 79
	twice.Connections[1].Holders = []sockpeer.Holder{{PID: 11, TID: 11, FD: 6}, {PID: 10, TID: 10, FD: 8}}
	const want = `process 10 (a\x1bpp) fd 3: outbound unix stream connection, inode 77: refuse
  peer:   /run/d (process 5, /usr/sbin/d, uid 0)
  busy:   3 bytes not yet read by us
  rule:   no rule
  why:    no rule covers it, and unknown is refuse
process 11 (child) fd 6: outbound unix stream connection, inode 79: refuse
  also:   process 10 fd 8
  peer:   /run/d (process 5, /usr/sbin/d, uid 0)
  busy:   3 bytes not yet read by us
  rule:   no rule
  why:    no rule covers it, and unknown is refuse
  to do:  to allow it, write this to /etc/criuhook/rules.d/run-d.yaml (criuhook rules check FILE tells whether it is right):
    rules:
      - name: run-d
        path: /run/d
        type: stream
        uid: 0
        idle: reconnect     # a new connection, without any greeting; or hangup: the application finds it dead
        busy: hangup        # now: 3 bytes not yet read by us; or wait
`
	p := plan.Make(twice, &rule.Set{})
	if diff := cmp.Diff(want, p.Explain()); diff != "" {
		t.Error(diff)
	}
	line := p.Decisions[0].String()
	if strings.Contains(line, "\n") || line != `process 10 (a\x1bpp) fd 3: outbound unix stream connection, inode 77 to /run/d (process 5, /usr/sbin/d, uid 0): refuse (no rule): no rule covers it, and unknown is refuse` {
		t.Error(line)
	}
}

// TestExplainKnown: a refusal says what the connection is, where that is known.
func TestExplainKnown(t *testing.T) {
	snap := snapshot(func(c *sockpeer.Connection, procs map[int]sockpeer.Process) {
		c.Peer.Name = "/run/dbus/system_bus_socket"
		p := procs[10]
		p.Mapped = []string{"/usr/lib/libdbus-1.so.3.38.3"}
		procs[10] = p
	})
	p := plan.Make(snap, &rule.Set{Rules: rule.BuiltIn()})
	const is = "D-Bus, system bus, opened by libdbus-1.so.3"
	if got := p.Explain(); !strings.Contains(got, ": refuse\n  is:     "+is+"\n  peer:   ") {
		t.Error(got)
	}
	if got := p.Decisions[0].String(); !strings.Contains(got, "uid 0) ["+is+"]: refuse (rule dbus-system, built-in): ") {
		t.Error(got)
	}
}

func TestExplainOwnRule(t *testing.T) {
	for _, tt := range []struct {
		name   string
		rule   rule.Rule
		change func(*sockpeer.Connection, map[int]sockpeer.Process)
		want   string
	}{
		{"refuses", rule.Rule{Idle: rule.Refuse}, nil, "change rule d, f:1: idle: hangup, or idle: reconnect"},
		{"refuses busy", rule.Rule{Idle: rule.Hangup, Busy: rule.Refuse},
			func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.RecvQueue = 1 }, "change rule d, f:1: busy: hangup, or busy: wait"},
		{"half closed", rule.Rule{Idle: rule.Reconnect, Busy: rule.Refuse},
			func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.Shutdown = 1 }, "change rule d, f:1: busy: hangup\n"},
		{"no name", rule.Rule{Idle: rule.Reconnect},
			func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.Peer.Name = "" }, "change rule d, f:1: idle: hangup\n"},
		{"beyond rules", rule.Rule{Idle: rule.Hangup},
			func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.Holders[0].TID = 99 }, "no rule can allow this"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.rule.Name, tt.rule.Source, tt.rule.Exe = "d", "f:1", "/usr/sbin/d"
			p := plan.Make(snapshot(tt.change), &rule.Set{Rules: []rule.Rule{tt.rule}})
			if got := p.Explain(); !strings.Contains(got, tt.want) {
				t.Errorf("got\n%s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestRecord(t *testing.T) {
	snap := snapshot(shared(me))
	snap.Connections = append(snap.Connections, sockpeer.Connection{
		Inode: 90, Type: sockpeer.Dgram, Direction: sockpeer.Inbound, Name: "\x00me", RecvQueue: 1,
		Peer: sockpeer.Peer{UID: -1}, Holders: []sockpeer.Holder{{PID: 11, TID: 11, FD: 9}},
	})
	p11 := snap.Processes[11]
	p11.Comm = "\xffchild"
	snap.Processes[11] = p11
	set := &rule.Set{Inbound: rule.Hangup, Rules: []rule.Rule{{
		Name: "d", Path: "/run/*", UID: ptr(uint32(0)), Idle: rule.Reconnect, Busy: rule.Wait,
		Prelude: "sssd", To: "@new", Timeout: time.Second, Absent: rule.AbsentFail,
	}}}
	p := plan.Make(snap, set)
	got, err := p.Record(snap, 10)
	if err != nil {
		t.Fatal(err)
	}
	id := &proto.Identity{Uid: 1000, Gid: 1000, Groups: []uint32{4, 27}}
	want := &proto.Record{Connections: []*proto.Connection{{
		Inode: 77, Type: 1, Netns: 4026531840,
		Peer:    &proto.Peer{Inode: 78, Name: []byte("/run/d"), Pid: 5, Exe: "/usr/sbin/d"},
		Holders: []*proto.Holder{{Pid: 1, Fd: 3, Cloexec: true, Comm: "app"}, {Pid: 2, Fd: 4, Comm: "\ufffdchild"}},
		Action:  proto.Action_ACTION_RECONNECT, Rule: "d", Identity: id, BusyRefuses: true,
		Reconnect: &proto.Reconnect{To: []byte("\x00new"), Prelude: "sssd", TimeoutNs: 1e9, AbsentFails: true},
	}, {
		Inode: 90, Type: 2, Name: []byte("\x00me"), Peer: &proto.Peer{Uid: -1},
		Holders: []*proto.Holder{{Pid: 2, Fd: 9, Comm: "\ufffdchild"}},
		Action:  proto.Action_ACTION_HANGUP, Busy: "1 bytes not yet read by us", Identity: id,
	}}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if _, err := pb.Marshal(got); err != nil {
		t.Error(err)
	}
}

func TestRecordDefaults(t *testing.T) {
	snap := snapshot(func(c *sockpeer.Connection, _ map[int]sockpeer.Process) { c.Peer.UID = 112 })
	set := &rule.Set{Rules: []rule.Rule{{Name: "d", Path: "/run/d", Idle: rule.Reconnect, Busy: rule.Hangup}}}
	rec, err := plan.Make(snap, set).Record(snap, 10)
	if err != nil {
		t.Fatal(err)
	}
	want := &proto.Reconnect{To: []byte("/run/d"), Prelude: "none", ListenerUid: 112}
	if diff := cmp.Diff(want, rec.Connections[0].Reconnect, protocmp.Transform()); diff != "" || rec.Connections[0].BusyRefuses {
		t.Error(diff)
	}
}

// The names of a daemon that the application sees under another.
func TestRecordPaths(t *testing.T) {
	for _, tt := range []struct {
		name      string
		elsewhere bool
		to        string // of the rule
		wantTo    string
		wantOr    string
	}{
		{name: "not visible by its own", wantTo: "/inside/d", wantOr: "/run/d"},
		{name: "its own leads to another", elsewhere: true, wantTo: "/inside/d"},
		{name: "the rule says", to: "/run/e", wantTo: "/run/e"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			snap := snapshot(func(c *sockpeer.Connection, _ map[int]sockpeer.Process) {
				c.Peer.Path, c.Peer.Elsewhere = "/inside/d", tt.elsewhere
			})
			set := &rule.Set{Rules: []rule.Rule{{Name: "d", Path: "/run/d", Idle: rule.Reconnect, Busy: rule.Hangup, To: tt.to}}}
			p := plan.Make(snap, set)
			rec, err := p.Record(snap, 10)
			if err != nil {
				t.Fatal(err)
			}
			c := rec.Connections[0]
			if string(c.Peer.Name) != "/run/d" || string(c.Peer.Path) != "/inside/d" {
				t.Errorf("recorded peer: %v", c.Peer)
			}
			if string(c.Reconnect.To) != tt.wantTo || string(c.Reconnect.OrTo) != tt.wantOr {
				t.Errorf("recorded: %v", c.Reconnect)
			}
			for _, text := range []string{plan.Describe(c), p.Decisions[0].String()} {
				if !strings.Contains(text, "/run/d") || !strings.Contains(text, "/inside/d") {
					t.Errorf("it says %q", text)
				}
			}
		})
	}
}

func TestRecordPIDs(t *testing.T) {
	hangup := &rule.Set{Unknown: rule.Hangup}
	for _, tt := range []struct {
		name   string
		holder []int
		root   []int // nil: the root is not in the snapshot
		set    *rule.Set
		want   int32
		err    string
	}{
		{"no namespaces", []int{10}, []int{9}, hangup, 10, ""},
		{"root in a namespace", []int{10, 4}, []int{9, 1}, hangup, 4, ""},
		{"holder in one below", []int{10, 4, 1}, []int{9, 1}, hangup, 4, ""},
		{"root unknown, holder beside us", []int{10}, nil, hangup, 10, ""},
		{"root unknown", []int{10, 4}, nil, hangup, 0, "does not tell the pid namespace of the root task 9"},
		{"holder outside", []int{10}, []int{9, 1}, hangup, 0, "process 10 (app) is not in the pid namespace"},
		{"still refused", []int{10}, []int{9}, &rule.Set{}, 0, "refuse"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			snap := snapshot(func(_ *sockpeer.Connection, procs map[int]sockpeer.Process) {
				delete(procs, 11)
				procs[10] = sockpeer.Process{PID: 10, NSPID: tt.holder, Comm: "app"}
				if tt.root != nil {
					procs[9] = sockpeer.Process{PID: 9, NSPID: tt.root}
				}
			})
			rec, err := plan.Make(snap, tt.set).Record(snap, 9)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := rec.Connections[0].Holders[0].Pid; got != tt.want {
				t.Errorf("pid %d, want %d", got, tt.want)
			}
		})
	}
}
