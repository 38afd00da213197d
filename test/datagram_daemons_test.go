// SPDX-License-Identifier: Apache-2.0

package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// logged is a message of the client's as its log daemon got it.
type logged struct{ text, uid, pid string }

// logger is a log daemon and a client of it.
type logger struct {
	daemon   string // of test/daemons
	comm     string
	client   string
	what     string
	listener sockpeer.Name
	rule     string
	// connects: the client's socket is connected. sd_journal_print's is not: it
	// names the daemon with each message, and CRIU needs no help with it.
	connects bool
	// twenty: TestFieldCycles has no such client.
	twenty bool
	read   func(t testing.TB) []logged
}

var loggers = []logger{
	{"rsyslog", "rsyslogd", "syslog(3)", "syslog", "/dev/log", "syslog", true, false, rsyslogHas},
	{"journald", "systemd-journal", "syslog(3)", "syslog", "/run/systemd/journal/dev-log", "journald-dev-log", true, true, journalHas},
	{"journald", "systemd-journal", "sd_journal_print", "journal", "/run/systemd/journal/socket", "journald", false, false, journalHas},
}

func rsyslogHas(t testing.TB) (out []logged) {
	t.Helper()
	b, err := os.ReadFile("/var/log/test.log")
	if err != nil {
		return nil // nothing so far
	}
	for line := range strings.Lines(string(b)) {
		var m logged
		//  criuhook-test round 1 uid=1000 pid=71
		text, ids, ok := strings.Cut(strings.TrimSpace(line), " uid=")
		if m.uid, m.pid, _ = strings.Cut(strings.TrimSpace(ids), " pid="); ok {
			m.text = text
			out = append(out, m)
		}
	}
	return out
}

func journalHas(t testing.TB) (out []logged) {
	t.Helper()
	b, err := exec.Command("journalctl", "--no-pager", "-q", "-o", "json", "_UID=1000").Output()
	if err != nil {
		return nil // nothing so far
	}
	for line := range strings.Lines(string(b)) {
		var m struct {
			Text string `json:"MESSAGE"`
			UID  string `json:"_UID"`
			PID  string `json:"_PID"`
		}
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("journalctl: %q: %v", line, err)
		}
		out = append(out, logged{m.Text, m.UID, m.PID})
	}
	return out
}

// wantLogged waits for a message of the client's that was not there before and
// says how the daemon sees the sender, which must be the application itself: the
// kernel tells that with each message.
func (l logger) wantLogged(t testing.TB, a *Asker, text string, before int) string {
	t.Helper()
	var m logged
	eventually(t, fmt.Sprintf("%s to have %q of process %d", l.daemon, text, a.PID), func() bool {
		all := l.read(t)
		i := slices.IndexFunc(all[min(before, len(all)):], func(m logged) bool { return m.text == text })
		if i >= 0 {
			m = all[before+i]
		}
		return i >= 0
	})
	if m.uid != fmt.Sprint(alice.UID) || m.pid != fmt.Sprint(a.PID) {
		t.Errorf("%s got %+v, expected it of process %d, uid %d", l.daemon, m, a.PID, alice.UID)
	}
	return theApplications
}

// wantRecord checks what was recorded.
func (l logger) wantRecord(t testing.TB, rec *proto.Record, action proto.Action) {
	t.Helper()
	if !l.connects {
		if len(rec.Connections) != 0 {
			t.Errorf("recorded: %v; expected nothing", rec.Connections)
		}
		return
	}
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v; expected one connection", rec.Connections)
	}
	c := rec.Connections[0]
	if c.Action != action || c.Rule != l.rule || string(c.Peer.Name) != string(l.listener) || (c.Busy != "") != (action == proto.Action_ACTION_HANGUP) {
		t.Errorf("recorded: %v", c)
	}
}

// roundText is the text of the client's round N, counted from 1.
func roundText(n int) string { return fmt.Sprintf("criuhook-test round %d", n) }

// TestLogDaemons: real rsyslogd and systemd-journald. Not a message is lost, and
// each is seen to come from the application.
func TestLogDaemons(t *testing.T) {
	need(t)
	for _, l := range loggers {
		t.Run(l.daemon+" "+l.client, func(t *testing.T) {
			runDaemons(t, l.daemon)
			ways(t, func(t *testing.T) {
				before := running(l.comm)
				t.Run("idle", func(t *testing.T) { l.idle(t, "idle", func() {}) })
				t.Run("busy", l.busy)
				if l.twenty {
					t.Run("idle cycles", func(t *testing.T) { l.cycles(t, false) })
					t.Run("busy cycles", func(t *testing.T) { l.cycles(t, true) })
				}
				wantStill(t, before, l.comm)
				t.Run("restarted", func(t *testing.T) {
					l.idle(t, "idle, daemon restarted", func() { doDaemons(t, "restart", l.daemon) })
				})
				nothingLeft(t)
			})
		})
	}
}

func (l logger) policy(action string) string {
	if !l.connects {
		return "nothing to do"
	}
	return action
}

func (l logger) idle(t *testing.T, state string, between func()) {
	before := len(l.read(t))
	a := startAsker(t, l.what)
	fds := a.fds(t)
	a.awaitRead(t)
	dir := a.Dump(t)
	l.wantRecord(t, record(t, dir), proto.Action_ACTION_RECONNECT)
	// The first message, and the second of what stock CRIU has restored.
	eventually(t, l.daemon+" to have two messages", func() bool { return len(l.read(t)) >= before+2 })
	between()
	seen := len(l.read(t))
	a.Restore(t, dir)
	a.rounds(t, 1)
	first := a.answer(t, l.what).last
	identity := l.wantLogged(t, a, roundText(2), seen)
	if !l.connects {
		identity = "" // of no connection
	}
	a.rounds(t, 1)
	l.wantLogged(t, a, roundText(3), seen)
	observeSoon(t, Observation{
		Client: l.client, Daemon: l.daemon, Policy: l.policy("reconnect"), State: state,
		Failed: a.failed(t), Longest: first, FDsLeaked: a.leaked(t, fds), Identity: identity,
	})
	a.wantFailed(t, "after the restore", 0)
	a.Kill(t)
}

// busy: the daemon's queue is full, and the client waits for room in it.
func (l logger) busy(t *testing.T) {
	seen := len(l.read(t))
	a := startAsker(t, l.what)
	l.wantLogged(t, a, roundText(1), seen)
	fds := a.fds(t)
	thaw := freezeAll(t, l.comm)
	n := 1
	blocked := func() bool { return inSend(a.PID) }
	for !blocked() {
		n++
		if n > 2000 {
			t.Fatalf("%d messages to a frozen %s, and no wait for room", n, l.daemon)
		}
		a.ask(t)
		eventually(t, "the message to be sent, or to wait", func() bool {
			return a.answer(t, l.what).asked == n || blocked()
		})
	}
	a.alive = nil // as long as the daemon is frozen
	dir := a.Dump(t)
	l.wantRecord(t, record(t, dir), proto.Action_ACTION_HANGUP)
	thaw()
	a.Restore(t, dir)
	restored := time.Now()
	eventually(t, "the message that was under way", func() bool { return a.answer(t, l.what).asked == n })
	longest := time.Since(restored)
	l.wantLogged(t, a, roundText(n), seen)
	for range 3 {
		a.rounds(t, 1)
		n++
		l.wantLogged(t, a, roundText(n), seen)
		longest = max(longest, a.answer(t, l.what).last)
	}
	observeSoon(t, Observation{
		Client: l.client, Daemon: l.daemon, Policy: l.policy("hangup"), State: "busy",
		Failed: a.failed(t), Longest: longest, FDsLeaked: a.leaked(t, fds),
	})
	a.wantFailed(t, "later", 0)
	a.Kill(t)
}

// cycles dumps and restores twenty times, between two messages or while one waits
// for room. Each arrives, once, as the application's.
func (l logger) cycles(t *testing.T, busy bool) {
	seen, sockets := len(l.read(t)), socketsOf(t, l.comm)
	a := startAsker(t, l.what)
	fds := a.fds(t)
	state, policy, action, perCycle := "idle", "reconnect", proto.Action_ACTION_RECONNECT, 1
	if busy {
		state, policy, action, perCycle = "busy", "hangup", proto.Action_ACTION_HANGUP, 2
	}
	var under, next waits
	for n := range fieldCycles {
		thaw := func() {}
		if busy {
			thaw = freezeAll(t, l.comm)
			fill(t, string(l.listener))
			a.ask(t)
			eventually(t, "the message to wait for room", func() bool { return inSend(a.PID) })
		} else {
			a.awaitRead(t)
		}
		rec, restored := a.cycle(t, thaw)
		l.wantRecord(t, rec, action)
		if busy {
			eventually(t, "the message that was under way", func() bool { return a.answer(t, l.what).asked == 2*n+2 })
			under = append(under, time.Since(restored))
		}
		a.rounds(t, 1)
		next = append(next, a.answer(t, l.what).last)
	}
	a.wantFailed(t, fmt.Sprintf("in %d cycles", fieldCycles), 0)
	bound, longest := atOnce, next.longest()
	if busy {
		under.wantMost(t, l.client+", the message under way", soon)
		bound, longest = soon, max(longest, under.longest())
	}
	next.wantMost(t, l.client+", the next message", bound)
	a.wantAllLoggedBy(t, l.daemon, l.read, seen, perCycle*fieldCycles+1)
	o := Observation{
		Client: l.client, Daemon: l.daemon, Policy: policy, State: fmt.Sprintf("%s, %d cycles", state, fieldCycles),
		Failed: a.failed(t), Longest: longest, FDsLeaked: a.leaked(t, fds),
	}
	if !busy {
		o.Identity = theApplications // as wantAllLoggedBy found
	}
	observeSoon(t, o)
	a.Kill(t)
	if now := socketsOf(t, l.comm); now != sockets {
		t.Errorf("%s had %d sockets, now it has %d", l.daemon, sockets, now)
	}
}

// inSend reports whether a process waits in the kernel to send.
func inSend(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", pid))
	return err == nil && strings.Contains(string(b), "unix_wait_for_peer") ||
		err == nil && strings.Contains(string(b), "sock_alloc_send")
}

// TestJournalStream: what goes to journald as a stream begins with lines that say
// whose it is, which only who made the connection knows. No rule matches, so that
// the dump is refused.
func TestJournalStream(t *testing.T) {
	need(t)
	runDaemons(t, "journald")
	ways(t, func(t *testing.T) {
		a := startApp(t, alice, nil)
		a.connect(t, "c", journalStream)
		r := a.TryDump(t, images(t))
		if r.Code == 0 {
			t.Errorf("the dump succeeded\n%s", r.Output)
		}
		r.wantMessage(t, journalStream)
		a.Awake(t)
		nothingLeft(t)
	})
}
