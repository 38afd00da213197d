// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"criuhook/proto"
)

const sssdCycles = 20

// cycle dumps and restores, without stock CRIU in between.
func (l *Lookup) cycle(t testing.TB, between func()) (dir string) {
	t.Helper()
	dir = images(t)
	l.TryDump(t, dir).want(t, "dump", 0)
	l.Gone(t)
	awaitFree(t, l.dumpedThreads(dir))
	between()
	l.Restore(t, dir)
	return dir
}

// forEach counts by the name of sssd's service.
func forEach(n int, of []service) map[string]int {
	out := map[string]int{}
	for _, s := range of {
		out[s.name] += n
	}
	return out
}

// perService counts the connections of sssd's services.
func perService(t testing.TB, count func(testing.TB) map[string]int) map[string]int {
	t.Helper()
	all, out := count(t), map[string]int{}
	for _, s := range byLibrary(false) {
		out[s.name] = all[s.pipe()]
	}
	return out
}

// awaitServices waits until sssd's services have as many connections as before.
func awaitServices(t testing.TB, when string, count func(testing.TB) map[string]int, want map[string]int) {
	t.Helper()
	now := map[string]int{}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if now = perService(t, count); maps.Equal(now, want) {
			return
		}
	}
	t.Fatalf("%s sssd's services have the connections %v, expected %v", when, now, want)
}

// observeAll notes what was observed of all services at once.
func observeAll(t testing.TB, client, policy, state string, o Observation) {
	t.Helper()
	o.Client, o.Daemon, o.Policy, o.State = client, "sssd, all services", policy, state
	t.Logf("%s, %s: %+v", policy, state, o)
	observe(t, o)
}

// TestSSSDTwentyCycles: a process with a connection to each of sssd's services,
// dumped and restored between its requests, or while all of them are under way.
// After each cycle each service has as many connections as at the beginning.
func TestSSSDTwentyCycles(t *testing.T) {
	ways(t, func(t *testing.T) {
		startServices(t)
		for _, s := range byLibrary(false) {
			steady(t, s.pipe())
		}
		none, before := perService(t, allConnected), responders(t)
		t.Run("idle", sssdCyclesIdle)
		awaitServices(t, "after the idle cycles", allConnected, none)
		t.Run("busy", sssdCyclesBusy)
		awaitServices(t, "after the busy cycles", allAlive, none)
		wantResponders(t, before)
		nothingLeft(t)
	})
}

func sssdCyclesIdle(t *testing.T) {
	of := byLibrary(false)
	l := startClient(t, root, len(of), of...)
	fds, before := len(l.fds(t)), perService(t, allConnected)
	if open := l.open(t); !maps.Equal(open, forEach(1, of)) {
		t.Fatalf("the client has the connections %v, expected one to each service", open)
	}
	var first []time.Duration
	for i := range sssdCycles {
		wantActions(t, l.cycle(t, func() {}), len(of), proto.Action_ACTION_RECONNECT)
		awaitServices(t, fmt.Sprintf("after restore %d", i+1), allConnected, before)
		first = append(first, l.rounds(t, 1))
		l.wantFailed(t, fmt.Sprintf("after restore %d", i+1), 0)
		awaitServices(t, fmt.Sprintf("after the requests of cycle %d", i+1), allConnected, before)
	}
	wantMedian(t, first, soonIdle)
	o := Observation{Longest: slices.Max(first), Failed: l.failed(t), FDsLeaked: len(l.fds(t)) - fds}
	if o.FDsLeaked != 0 {
		t.Errorf("%d fds more than before", o.FDsLeaked)
	}
	observeAll(t, keepsSocket, sssdPolicy, "idle, twenty cycles", o)
	l.Kill(t)
}

func sssdCyclesBusy(t *testing.T) {
	of := services()
	l := startClient(t, root, len(of), of...)
	fds, before := len(l.fds(t)), perService(t, allAlive)
	var first []time.Duration
	for i := range sssdCycles {
		first = append(first, l.busyCycle(t, of))
		awaitServices(t, fmt.Sprintf("after cycle %d", i+1), allAlive, before)
		if open := l.open(t); !maps.Equal(open, forEach(1, of)) {
			t.Errorf("after cycle %d the client has the connections %v", i+1, open)
		}
	}
	wantMedian(t, first, soonBusy)
	o := Observation{Longest: slices.Max(first), Failed: l.failed(t), FDsLeaked: len(l.fds(t)) - fds}
	if o.FDsLeaked != 0 {
		t.Errorf("%d fds more than before", o.FDsLeaked)
	}
	observeAll(t, everyClient, "hangup", "busy, twenty cycles", o)
	l.Kill(t)
}

// busyCycle dumps and restores a client of which each thread waits for an answer,
// and returns how long they waited for it after the restore.
func (l *Lookup) busyCycle(t testing.TB, of []service) time.Duration {
	t.Helper()
	var thaws []func()
	for _, s := range byLibrary(false) {
		thaws = append(thaws, freezeAll(t, "sssd_"+s.name))
	}
	n, failed, _ := l.count(t)
	l.ask(t)
	eventually(t, "a thread that waits on each connection", func() bool {
		waited := 0
		for _, c := range l.connections(t) {
			if len(c.Waiters) > 0 {
				waited++
			}
		}
		return waited == len(of)
	})
	dir := l.cycle(t, func() {
		for _, thaw := range thaws {
			thaw()
		}
	})
	restored := time.Now()
	wantActions(t, dir, len(of), proto.Action_ACTION_HANGUP)
	eventually(t, "the requests that were under way", func() bool { now, _, _ := l.count(t); return now >= n+l.perRound })
	took := time.Since(restored)
	under := l.failed(t)
	if under > failed+len(of) {
		t.Errorf("%d requests failed, %d were under way", under-failed, len(of))
	}
	l.rounds(t, 1)
	l.wantFailed(t, "later", under)
	return took
}
