// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// sessionBus is where a session's bus listens.
type sessionBus struct {
	where    string // people's words
	address  string // as dbus-daemon takes it
	rule     string // the built-in one
	pattern  string // a rule's path
	listener sockpeer.Name
	pid      int
}

// sessionBuses are the names that there are: systemd's and the desktops' since,
// dbus-launch's, and what dbus-launch had before dbus 1.15.
var sessionBuses = []sessionBus{
	{where: "/run/user/UID/bus", address: "unix:path=/run/user/1000/bus", rule: "dbus-session", pattern: "/run/user/*/bus"},
	{where: "/tmp/dbus-XXXX", address: "unix:tmpdir=/tmp", rule: "dbus-session-tmp", pattern: "/tmp/dbus-*"},
	{where: "@/tmp/dbus-XXXX", address: "unix:abstract=/tmp/dbus-criuhook", rule: "dbus-session-abstract", pattern: "@/tmp/dbus-*"},
}

// start starts alice's bus for the length of a test, and makes it that of what
// the test starts.
func (b *sessionBus) start(t *testing.T) {
	t.Helper()
	const dir = "/run/user/1000"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, int(alice.UID), int(alice.GID)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--address="+b.address, "--print-address")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: alice.UID, Gid: alice.GID}}
	cmd.Dir = "/"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatalf("start dbus-daemon at %s: %v", b.address, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	// Nothing comes if it fails: then the pipe ends.
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		_ = cmd.Wait()
		t.Fatalf("dbus-daemon at %s says no address: %v\n%s", b.address, err, stderr.String())
	}
	address := strings.TrimSpace(line)
	kind, name, _ := strings.Cut(strings.TrimPrefix(address, "unix:"), "=")
	name, _, _ = strings.Cut(name, ",")
	if kind == "abstract" {
		name = "\x00" + name
	}
	b.listener, b.pid = sockpeer.Name(name), cmd.Process.Pid
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", address)
}

// choose installs a rule for the bus.
func (b *sessionBus) choose(t *testing.T, action string) {
	t.Helper()
	install(t, fmt.Sprintf("rules: [{name: t-session, path: %q, %s}]", b.pattern, action))
}

func (b *sessionBus) wantRecord(t testing.TB, rec *proto.Record, action proto.Action) {
	t.Helper()
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v; expected one connection", rec.Connections)
	}
	c := rec.Connections[0]
	if c.Action != action || c.Rule != "t-session" || string(c.Peer.Name) != string(b.listener) || c.Identity.Uid != alice.UID {
		t.Errorf("recorded: %v; expected %v", c, action)
	}
}

// TestSessionBus: a user's own bus, wherever it listens. Nobody having chosen,
// the dump is refused; after a choice the application goes on.
func TestSessionBus(t *testing.T) {
	need(t)
	runDaemons(t) // none, but alice is known
	for i := range sessionBuses {
		b := &sessionBuses[i]
		t.Run(b.rule, func(t *testing.T) {
			b.start(t)
			ways(t, func(t *testing.T) {
				t.Run("refused", b.refused)
				t.Run("hangup", b.hangup)
				t.Run("reconnect", b.reconnect)
				t.Run("busy", b.busy)
				t.Run("sd-bus", b.sdbus)
				t.Run("idle cycles", func(t *testing.T) { b.cycles(t, false) })
				t.Run("busy cycles", func(t *testing.T) { b.cycles(t, true) })
				wantStill(t, []int{b.pid}, busDaemon)
				wantUnconnected(t, b.listener, busDaemon)
				nothingLeft(t)
			})
		})
	}
}

func (b *sessionBus) refused(t *testing.T) {
	a := startAsker(t, "bus", "bus-unique", "bus-own", "bus-match")
	r := a.TryDump(t, images(t))
	if r.Code == 0 {
		t.Errorf("the dump succeeded\n%s", r.Output)
	}
	r.wantMessage(t, b.listener.String(), b.rule, "idle: hangup", "idle: reconnect with prelude: dbus")
	wantScan(t, a.PID, "D-Bus, session bus, opened by libdbus-1.so.3")
	a.rounds(t, 3)
	a.wantFailed(t, "after the refused dump", 0)
	a.Kill(t)
}

func (b *sessionBus) observe(t *testing.T, o Observation) {
	t.Helper()
	o.Daemon = busDaemon + " --session at " + b.where
	observeSoon(t, o)
}

// hangup: one call fails, and then there is another connection.
func (b *sessionBus) hangup(t *testing.T) {
	b.choose(t, "idle: hangup")
	a := startAsker(t, "bus", "bus-unique", "bus-own", "bus-match")
	fds := a.fds(t)
	dir := a.Dump(t)
	b.wantRecord(t, record(t, dir), proto.Action_ACTION_HANGUP)
	a.Restore(t, dir)
	a.rounds(t, 1)
	first := a.answer(t, "bus").last
	a.rounds(t, 2)
	failed := a.failed(t)
	if failed > 1 {
		t.Errorf("%d calls failed, expected the first at most", failed)
	}
	b.observe(t, Observation{
		Client: "libdbus, connects anew", Policy: "hangup (opt-in)", State: "idle",
		Failed: failed, Longest: first, FDsLeaked: a.leaked(t, fds),
	})
	a.Kill(t)
	wantUnconnected(t, b.listener, busDaemon)
}

// reconnect: calls work, of the first on, and the bus sees the application. It
// accepts no other uid than the one that it is told.
func (b *sessionBus) reconnect(t *testing.T) {
	b.choose(t, "idle: reconnect, prelude: dbus")
	a := startAsker(t, "bus")
	fds := a.fds(t)
	dir := a.Dump(t)
	b.wantRecord(t, record(t, dir), proto.Action_ACTION_RECONNECT)
	a.Restore(t, dir)
	identity := a.seenBy(t, b.listener, busDaemon)
	a.rounds(t, 1)
	first := a.answer(t, "bus").last
	a.rounds(t, 2)
	a.wantFailed(t, "after the restore", 0)
	b.observe(t, Observation{
		Client: "libdbus", Policy: "reconnect, prelude dbus (opt-in)", State: "idle",
		Failed: a.failed(t), Longest: first, FDsLeaked: a.leaked(t, fds), Identity: identity,
	})
	a.Kill(t)
	wantUnconnected(t, b.listener, busDaemon)
}

// sdbus: sd-bus keeps a pidfd of who listens for the bus, which CRIU does not
// dump while that process lives outside of the tree. No rule can help, and no
// harm is done.
func (b *sessionBus) sdbus(t *testing.T) {
	b.choose(t, "idle: reconnect, prelude: dbus")
	a := startAsker(t, "sdbus")
	r := a.TryDump(t, images(t))
	if want := fmt.Sprintf("pidfd pid %d is not a part of process tree", b.pid); r.Code == 0 || !strings.Contains(r.Log, want) {
		t.Errorf("dump: exit code %d, expected CRIU's log to say %q\n%s", r.Code, want, r.Log)
	}
	a.rounds(t, 3)
	a.wantFailed(t, "after the dump that failed", 0)
	a.Kill(t)
	wantUnconnected(t, b.listener, busDaemon)
}

// busy: the answer to a call under way will never come. It fails at once.
func (b *sessionBus) busy(t *testing.T) {
	b.choose(t, "idle: reconnect, prelude: dbus")
	a := startAsker(t, "bus")
	fds := a.fds(t)
	thaw := freezeAll(t, busDaemon)
	a.ask(t)
	a.awaitBusy(t, b.listener)
	a.alive = nil // as long as the bus is frozen
	dir := a.Dump(t)
	b.wantRecord(t, record(t, dir), proto.Action_ACTION_HANGUP)
	thaw()
	a.Restore(t, dir)
	restored := time.Now()
	eventually(t, "the call that was under way", func() bool { return a.answer(t, "bus").asked == 2 })
	longest := time.Since(restored)
	failed := a.failed(t)
	if failed > 1 {
		t.Errorf("%d calls failed, one was under way", failed)
	}
	a.rounds(t, 3)
	a.wantFailed(t, "later", failed)
	b.observe(t, Observation{
		Client: "libdbus, connects anew", Policy: "hangup", State: "busy",
		Failed: failed, Longest: longest, FDsLeaked: a.leaked(t, fds),
	})
	a.seenBy(t, b.listener, busDaemon)
	a.Kill(t)
	wantUnconnected(t, b.listener, busDaemon)
}

// cycles dumps and restores twenty times, between two calls or in the middle of
// one, which fails at once.
func (b *sessionBus) cycles(t *testing.T, busy bool) {
	b.choose(t, "idle: reconnect, prelude: dbus")
	a := startAsker(t, "bus")
	fds := a.fds(t)
	o := Observation{Client: "libdbus", Policy: "reconnect, prelude dbus (opt-in)", State: "idle"}
	action := proto.Action_ACTION_RECONNECT
	if busy {
		o = Observation{Client: "libdbus, connects anew", Policy: "hangup", State: "busy"}
		action = proto.Action_ACTION_HANGUP
	}
	var first waits
	for range fieldCycles {
		thaw, asked := func() {}, a.answer(t, "bus").asked
		if busy {
			thaw = freezeAll(t, busDaemon)
			a.ask(t)
			a.awaitBusy(t, b.listener)
		}
		rec, restored := a.cycle(t, thaw)
		b.wantRecord(t, rec, action)
		if busy {
			eventually(t, "the call that was under way", func() bool { return a.answer(t, "bus").asked > asked })
			first = append(first, time.Since(restored))
			a.rounds(t, 1)
		} else {
			o.Identity = a.seenBy(t, b.listener, busDaemon)
			a.rounds(t, 1)
			first = append(first, a.answer(t, "bus").last)
		}
	}
	bound, allowed := atOnce, 0
	if busy {
		bound, allowed = soon, fieldCycles
	}
	first.wantMost(t, b.where, bound)
	o.Failed, o.Longest, o.FDsLeaked = a.failed(t), first.longest(), a.leaked(t, fds)
	if o.Failed > allowed {
		t.Errorf("%d calls failed, expected %d at most", o.Failed, allowed)
	}
	o.State = fmt.Sprintf("%s, %d cycles", o.State, fieldCycles)
	b.observe(t, o)
	a.Kill(t)
	wantUnconnected(t, b.listener, busDaemon)
}
