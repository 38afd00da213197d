// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"criuhook/proto"
)

// unscd runs unscd in nscd's place, until the test ends. Debian installs it as
// /usr/sbin/nscd; here it is what its authors call it.
func unscd(t testing.TB) {
	t.Helper()
	nameSources(t, "passwd: files", "group: files", "hosts: files", "services: files")
	runDaemons(t, "unscd")
}

// forget makes a name service cache ask its sources again.
func forget(t testing.TB, program string) {
	t.Helper()
	if out, err := exec.Command(program, "-i", "group").CombinedOutput(); err != nil {
		t.Fatalf("%s -i group: %v\n%s", program, err, out)
	}
}

// awaitLookup lets a paused lookup ask, and waits until it waits for the cache.
func (l *Lookup) awaitLookup(t testing.TB) {
	t.Helper()
	l.ask(t)
	l.awaitBusy(t, nscdSocket)
}

// wantNSCDHangup checks that the only connection recorded is one to hang up.
func wantNSCDHangup(t testing.TB, rec *proto.Record) {
	t.Helper()
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v; expected one connection", rec.Connections)
	}
	c := rec.Connections[0]
	if c.Action != proto.Action_ACTION_HANGUP || c.Busy == "" || c.Rule != "nscd-var-run" || string(c.Peer.Name) != nscdSocket {
		t.Errorf("recorded: %v; expected a hangup by the rule of nscd", c)
	}
}

// wantNothing checks that nothing at all is recorded.
func wantNothing(t testing.TB, rec *proto.Record) {
	t.Helper()
	if len(rec.Connections)+len(rec.Caches) != 0 {
		t.Errorf("recorded: %v; expected neither connection nor cache", rec)
	}
}

// TestUnscd: to glibc it is an nscd that shares no database: no connection is
// held between lookups, nothing is mapped, and what it owes at the dump, or when
// it is away, glibc gets from the sources.
func TestUnscd(t *testing.T) {
	need(t)
	unscd(t)
	ways(t, func(t *testing.T) {
		before := running("unscd")
		t.Run("idle", func(t *testing.T) { unscdIdle(t, "idle", func() {}) })
		t.Run("busy", unscdBusy)
		wantStill(t, before, "unscd")
		t.Run("restarted", func(t *testing.T) {
			unscdIdle(t, "idle, daemon restarted", func() { doDaemons(t, "restart", "unscd") })
		})
		t.Run("gone", func(t *testing.T) {
			unscdIdle(t, "idle, no unscd at the restore", func() { doDaemons(t, "stop", "unscd") })
		})
		doDaemons(t, "start", "unscd")
		wantUnconnected(t, nscdSocket, "unscd")
		nothingLeft(t)
	})
}

func unscdIdle(t *testing.T, state string, between func()) {
	l := startLookup(t, "-p", "-g", "alice")
	fds := len(l.fds(t))
	if n := l.socketCount(t); n != 0 || len(l.mappings(t)) != 0 {
		t.Errorf("a client of unscd holds %d sockets and maps %v", n, l.mappings(t))
	}
	dir := l.Dump(t)
	wantNothing(t, record(t, dir))
	between()
	l.Restore(t, dir)
	first := l.rounds(t, 1)
	l.rounds(t, 4)
	l.wantFailed(t, "after the restore", 0)
	observeSoon(t, Observation{
		Client: "glibc", Daemon: "unscd", Policy: "nothing to do", State: state,
		Failed: l.failed(t), Longest: first, FDsLeaked: len(l.fds(t)) - fds,
	})
	l.Kill(t)
}

func unscdBusy(t *testing.T) {
	l := startLookup(t, "-p", "-g", "alice")
	fds := len(l.fds(t))
	forget(t, "/usr/sbin/unscd")
	thaw := freezeAll(t, "unscd")
	l.awaitLookup(t)
	wantScan(t, l.PID, "unscd, name service cache")
	l.alive = nil // as long as unscd is frozen
	dir := l.Dump(t)
	wantNSCDHangup(t, record(t, dir))
	thaw()
	n, _, _ := l.count(t)
	l.Restore(t, dir)
	longest := l.awaitAnswer(t, n)
	longest = max(longest, l.rounds(t, 5))
	l.wantFailed(t, "after the restore", 0)
	observeSoon(t, Observation{
		Client: "glibc", Daemon: "unscd", Policy: "hangup", State: "busy",
		Failed: l.failed(t), Longest: longest, FDsLeaked: len(l.fds(t)) - fds,
	})
	l.Kill(t)
}

// wantScan checks what criuhook scan says of a process.
func wantScan(t testing.TB, pid int, says string) {
	t.Helper()
	// Its status says whether a dump would be refused.
	out, err := exec.Command(criuhook, "scan", "--pid", fmt.Sprint(pid)).CombinedOutput()
	if !strings.Contains(string(out), says) {
		t.Errorf("criuhook scan --pid %d: %v; expected %q in\n%s", pid, err, says, out)
	}
}

// TestUnscdCycles: a client of unscd, dumped and restored twenty times between two
// lookups, and twenty times in the middle of one.
func TestUnscdCycles(t *testing.T) {
	need(t)
	unscd(t)
	ways(t, func(t *testing.T) {
		nscdCycles(t, "unscd", "", "nothing to do")
		nothingLeft(t)
	})
}

// nscdCycles does so with the client of a daemon, which is as its variant says.
// policy is that of an idle client.
func nscdCycles(t *testing.T, daemon, variant, policy string) {
	before := running(daemon)
	nscdCyclesOf(t, daemon, Observation{Daemon: daemon + variant, Policy: policy, State: "idle"})
	nscdCyclesOf(t, daemon, Observation{Daemon: daemon + variant, Policy: "hangup", State: "busy"})
	wantUnconnected(t, nscdSocket, daemon)
	wantStill(t, before, daemon)
}

func nscdCyclesOf(t *testing.T, daemon string, o Observation) {
	busy := o.State == "busy"
	// Once it was refused, glibc asks nscd again only after a hundred lookups: two
	// of these rounds.
	l := startLookup(t, append([]string{"-p"}, strings.Fields(strings.Repeat("-g alice ", nscdRetry/2))...)...)
	fds := len(l.fds(t))
	var under, first waits
	for range fieldCycles {
		thaw := func() {}
		if busy {
			forget(t, "/usr/sbin/"+daemon)
			thaw = freezeAll(t, daemon)
			l.awaitLookup(t)
		}
		n, _, _ := l.count(t)
		dir := images(t)
		l.TryDump(t, dir).want(t, "dump", 0)
		l.Gone(t)
		awaitFree(t, l.dumpedThreads(dir))
		if busy {
			wantNSCDHangup(t, record(t, dir))
		} else if c := record(t, dir).Connections; len(c) != 0 {
			t.Errorf("%d connections recorded of an idle client", len(c))
		}
		thaw()
		l.Restore(t, dir)
		if busy {
			under = append(under, l.awaitAnswer(t, n))
		}
		first = append(first, l.rounds(t, 2))
	}
	l.wantFailed(t, fmt.Sprintf("in %d cycles", fieldCycles), 0)
	bound := atOnce
	if busy {
		bound = soon
		under.wantMost(t, daemon+", the lookup under way", soon)
	}
	first.wantMost(t, daemon+", the next lookups", bound)
	o.Client, o.State = "glibc", fmt.Sprintf("%s, %d cycles", o.State, fieldCycles)
	o.Failed, o.FDsLeaked = l.failed(t), len(l.fds(t))-fds
	o.Longest = max(slices.Max(append(under, 0)), first.longest())
	observeSoon(t, o)
	l.Kill(t)
}
