// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"criuhook/criuhook/rule"
	"criuhook/proto"
)

// leftAlone is a client that is asked nothing, from the restore until sssd has
// hung up on it.
type leftAlone struct {
	*Lookup
	fds int
	dir string
}

// TestSSSDIdleTimeout: sssd was restarted with another client_idle_timeout
// between dump and restore, the shortest that it takes, ten seconds (it looks
// every five). Then
//   - it hangs up on the new connections when they were idle so long, and the
//     application is dumped again, with what is left of them;
//   - it hangs up on the connections that its libraries have forgotten after a
//     restore (they find pid and /proc/self changed), which criuhook has made anew
//     at each: then it has as many as there are threads, as before the first dump;
//   - it closes its ends of those whose client went away during a request.
//
// By all ways and policies at once, because all wait for the same.
func TestSSSDIdleTimeout(t *testing.T) {
	need(t)
	d := startServices(t)
	d.do(t, "stop", "nscd") // a client of sssd
	for _, s := range byLibrary(false) {
		if n := steady(t, s.pipe()); n > 0 {
			t.Fatalf("%s has %d clients that are not of this test", s.pipe(), n)
		}
	}
	every := []way{byScript, byRPC, byDropin}
	of := services()
	var left []*leftAlone
	for _, w := range every {
		l := &leftAlone{Lookup: startClient(t, root, 2*len(of), of...)}
		l.dumpBy, l.restoreBy = w, w
		l.fds, l.dir = len(l.Lookup.fds(t)), l.Dump(t)
		left = append(left, l)
	}
	d.do(t, "stop", "sssd")
	d.edit(t, "sssd.conf", "client_idle_timeout = 36000", "client_idle_timeout = 10")
	d.do(t, "start", "sssd")
	before := responders(t)
	for _, l := range left {
		l.Restore(t, l.dir)
		if open := l.open(t); !maps.Equal(open, forEach(2, of)) {
			t.Errorf("by %s: after the restore the client has the connections %v, expected two of each kind", l.restoreBy, open)
		}
	}

	// Now others are asked, dumped and restored.
	var live []*Lookup
	want := map[string]int{}
	add := func(w way, u User, each int, of []service) *Lookup {
		l := startClient(t, u, each*len(of), of...)
		l.dumpBy, l.restoreBy = w, w
		if open := l.open(t); !maps.Equal(open, forEach(each, of)) {
			t.Errorf("by %s: the client has the connections %v, expected %d of each kind", w, open, each)
		}
		live = append(live, l)
		for name, n := range forEach(each, of) {
			want[name] += n
		}
		return l
	}
	for _, w := range every {
		l := add(w, root, 1, of)
		l.busyCycle(t, of)
	}
	t.Logf("after hangups during requests sssd has the connections %v, of which have another end %v",
		perService(t, allConnected), perService(t, allAlive))
	for _, w := range every {
		twentyOfLibraries(t, add(w, alice, 2, byLibrary(true)), sssdPolicy)
	}
	install(t, advice(t))
	for _, w := range every {
		twentyOfLibraries(t, add(w, alice, 2, byLibrary(true)), "hangup")
	}

	begun := time.Now()
	var now map[string]int
	for end := begun.Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		for _, l := range live { // so that they stay
			failed := l.failed(t)
			l.rounds(t, 1)
			l.wantFailed(t, "while sssd hangs up on others", failed)
		}
		if now = perService(t, allConnected); maps.Equal(now, want) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a minute after the last restore sssd has the connections %v, its clients %v", now, want)
		}
	}
	t.Logf("%.0f s after the last restore sssd has the connections %v, one for each thread", time.Since(begun).Seconds(), now)

	for _, l := range left {
		if open := l.open(t); len(open) > 0 {
			t.Errorf("by %s: sssd has not hung up on %v", l.restoreBy, open)
		}
		dir := l.Dump(t) // of halves that are dead
		for _, c := range record(t, dir).Connections {
			if c.Action == proto.Action_ACTION_RECONNECT {
				t.Errorf("recorded: %v; expected none that is made anew", c)
			}
		}
		l.Restore(t, dir)
		o := Observation{By: l.restoreBy, Longest: l.rounds(t, 2), Failed: l.failed(t), FDsLeaked: len(l.Lookup.fds(t)) - l.fds}
		l.wantFailed(t, "by "+l.restoreBy.String(), 0)
		observeAll(t, everyClient, "as it was: closed", "idle, sssd hung up before the dump", o)
	}
	wantResponders(t, before)
	nothingLeft(t)
}

// twentyOfLibraries dumps and restores a client of sssd's libraries twenty times
// and asks it in between. The connections that they forget are made anew by the
// built-in rule, so that sssd has more after each restore, and are gone with the
// other; the client keeps their fds either way.
func twentyOfLibraries(t testing.TB, l *Lookup, policy string) {
	t.Helper()
	of := byLibrary(true)
	fds := len(l.fds(t))
	var first []time.Duration
	var open []map[string]int
	for i := range sssdCycles {
		l.cycle(t, func() {})
		first = append(first, l.rounds(t, 1))
		l.wantFailed(t, fmt.Sprintf("by %s, %s, after restore %d", l.restoreBy, policy, i+1), 0)
		now := l.open(t)
		for name, n := range forEach(2, of) {
			if most := n * (i + 2); policy == "hangup" && now[name] != n || now[name] < n || now[name] > most {
				t.Errorf("by %s, %s: after restore %d the client has %d connections to %s", l.restoreBy, policy, i+1, now[name], name)
			}
		}
		open = append(open, now)
	}
	wantMedian(t, first, soonIdle)
	o := Observation{By: l.restoreBy, Longest: slices.Max(first), Failed: l.failed(t), FDsLeaked: len(l.fds(t)) - fds}
	t.Logf("by %s, %s: sssd's connections after the first restore %v, after the last %v", l.restoreBy, policy, open[0], open[sssdCycles-1])
	observeAll(t, "libnss_sss, pam_sss and libsss_autofs, two threads each", policy, "idle, twenty cycles", o)
}

// advice is the rule that the reasons of the built-in one name.
func advice(t testing.TB) string {
	t.Helper()
	for _, r := range rule.BuiltIn() {
		if r.Name == "sssd" {
			if _, rest, ok := strings.Cut(r.About.Cost, "rules: ["); ok {
				text, _, _ := strings.Cut(rest, "]")
				return "rules: [" + text + "]"
			}
		}
	}
	t.Fatal("the reasons of the built-in rule for sssd name no other rule")
	return ""
}
