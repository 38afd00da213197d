// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"criuhook/proto"
)

// fieldDaemons are the processes of the daemons below.
var fieldDaemons = []string{"rsyslogd", "systemd-journal", busDaemon, "winbindd", "nslcd", "systemd-userdbd", "avahi-daemon"}

// TestFieldCycles: one application that asks all of these daemons, dumped and
// restored twenty times: between two rounds of questions, while one daemon
// after another owes it an answer, or while all of them do.
func TestFieldCycles(t *testing.T) {
	need(t)
	all := []string{"rsyslog", "journald", "dbus", "winbind", "nslcd", "userdb", "avahi"}
	runDaemons(t, all...)
	nameSources(t, "passwd: files ldap systemd", "group: files winbind", "hosts: files mdns4_minimal", "services: files ldap")
	install(t, busReconnect)
	ways(t, func(t *testing.T) {
		var before []int
		for _, comm := range fieldDaemons {
			before = append(before, running(comm)...)
		}
		sockets := socketsOf(t, "rsyslogd", "systemd-journal")
		t.Run("idle", fieldCyclesIdle)
		t.Run("busy", fieldCyclesBusy)
		t.Run("busy with all", fieldCyclesAllBusy)
		// Nobody connects to these in the way that wantAllUnconnected counts.
		if now := socketsOf(t, "rsyslogd", "systemd-journal"); now != sockets {
			t.Errorf("the log daemons had %d sockets, now they have %d", sockets, now)
		}
		wantStill(t, before, fieldDaemons...)
		nothingLeft(t)
	})
}

// journalStream is where journald takes what programs write to their stdout.
const journalStream = "/run/systemd/journal/stdout"

// socketsOf counts the sockets that processes of these names have open, once
// journald has closed what its clients have: it looks when it has time for it.
func socketsOf(t testing.TB, comms ...string) (n int) {
	t.Helper()
	steady(t, journalStream)
	for _, comm := range comms {
		for _, pid := range running(comm) {
			links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			for _, link := range links {
				if name, _ := os.Readlink(link); strings.HasPrefix(name, "socket:") {
					n++
				}
			}
		}
	}
	return n
}

const fieldCycles = 20

// fieldListeners are who accepts connections of the application, by whom.
func fieldListeners() []nameService {
	return slices.Concat(nameServices, []nameService{
		{daemon: "dbus", comms: []string{busDaemon}, listener: systemBus, what: "bus", fails: 1}, winbindPrivileged,
	})
}

// wantAllUnconnected waits until no daemon has a connection.
func wantAllUnconnected(t *testing.T) {
	t.Helper()
	for _, s := range fieldListeners() {
		s.wantNobody(t)
	}
}

var askAll = []string{"user=lara", "user=udora", `group=BUILTIN\users`, "uid", "host=sandbox.local", "syslog", "journal", "bus"}

const askAllNames = "libnss_ldap, libnss_systemd, libnss_winbind, libwbclient, libnss_mdns4, syslog(3), sd_journal_print and libdbus in one process"

// cycle dumps and restores, without stock CRIU in between, which would log.
func (a *Asker) cycle(t testing.TB, between func()) (*proto.Record, time.Time) {
	t.Helper()
	dir := images(t)
	a.TryDump(t, dir).want(t, "dump", 0)
	a.Gone(t)
	awaitFree(t, a.dumpedThreads(dir))
	between()
	a.Restore(t, dir)
	return record(t, dir), time.Now()
}

func fieldCyclesIdle(t *testing.T) {
	syslog, journal := len(rsyslogHas(t)), len(journalHas(t))
	a := startAskerAs(t, mayUsePrivileged(t), nil, askAll...)
	fds := a.fds(t)
	first := map[string]waits{}
	var identity string
	for range fieldCycles {
		a.awaitRead(t)
		rec, _ := a.cycle(t, func() {})
		// winbindd's two, the bus and /dev/log
		if len(rec.Connections) != 4 || slices.ContainsFunc(rec.Connections, func(c *proto.Connection) bool {
			return c.Action != proto.Action_ACTION_RECONNECT
		}) {
			t.Fatalf("recorded: %v; expected four connections to make again", rec.Connections)
		}
		a.seenBy(t, systemBus, busDaemon)
		a.seenBy(t, winbindPrivileged.listener, winbindPrivileged.comms...)
		identity = a.seenBy(t, nameServices[0].listener, nameServices[0].comms...)
		a.rounds(t, 1)
		for _, what := range askAll {
			first[what] = append(first[what], a.answer(t, what).last)
		}
	}
	a.wantFailed(t, fmt.Sprintf("in %d cycles", fieldCycles), 0)
	a.wantAllLogged(t, syslog, journal, fieldCycles+1)
	var most time.Duration
	for _, what := range askAll {
		t.Logf("%s: longest %v", what, first[what].longest())
		first[what].wantMost(t, what, atOnce)
		most = max(most, first[what].longest())
	}
	observeSoon(t, Observation{
		Client: askAllNames, Policy: "each its own; libdbus: reconnect, prelude dbus", State: fmt.Sprintf("idle, %d cycles", fieldCycles),
		Failed: a.failed(t), Longest: most, FDsLeaked: a.leaked(t, fds), Identity: identity,
	})
	a.Kill(t)
	wantAllUnconnected(t)
}

func fieldCyclesBusy(t *testing.T) {
	// A winbindd that is stopped owes the first of its two questions.
	owing := slices.DeleteFunc(fieldListeners(), func(s nameService) bool { return s.what == winbindPrivileged.what })
	syslog, journal := len(rsyslogHas(t)), len(journalHas(t))
	a := startAskerAs(t, mayUsePrivileged(t), nil, askAll...)
	fds := a.fds(t)
	longest, failed := map[string]time.Duration{}, 0
	for n := range fieldCycles {
		s := owing[n%len(owing)]
		thaw := freezeAll(t, s.comms...)
		asked := a.answer(t, s.what).asked
		a.ask(t)
		a.awaitBusy(t, s.listener)
		rec, restored := a.cycle(t, thaw)
		if !slices.ContainsFunc(rec.Connections, func(c *proto.Connection) bool {
			return string(c.Peer.Name) == string(s.listener) && c.Action == proto.Action_ACTION_HANGUP && c.Busy != ""
		}) {
			t.Errorf("recorded: %v; expected a hangup of %s", rec.Connections, s.listener)
		}
		eventually(t, "the question that was under way", func() bool { return a.answer(t, s.what).asked > asked })
		longest[s.what] = max(longest[s.what], time.Since(restored))
		failed += s.fails
		// The rest of that round, and one more.
		last := askAll[len(askAll)-1]
		eventually(t, "the round to end", func() bool { return a.answer(t, last).asked == 2*n+2 })
		under := a.failed(t)
		a.rounds(t, 1)
		a.wantFailed(t, "after the question that was under way", under)
	}
	if n := a.failed(t); n > failed {
		t.Errorf("%d questions failed, %d were hung up", n, failed)
	}
	a.wantAllLogged(t, syslog, journal, 2*fieldCycles+1)
	identity := a.seenBy(t, nameServices[0].listener, nameServices[0].comms...)
	var most time.Duration
	for _, s := range owing {
		t.Logf("%s: %d of %d under way failed, longest %v", s.what, a.answer(t, s.what).failed, fieldCycles/len(owing), longest[s.what])
		most = max(most, longest[s.what])
	}
	observeSoon(t, Observation{
		Client: askAllNames, Policy: "hangup of one, reconnect of the others",
		State:  fmt.Sprintf("busy with one after another, %d cycles", fieldCycles),
		Failed: a.failed(t), Longest: most, FDsLeaked: a.leaked(t, fds), Identity: identity,
	})
	a.Kill(t)
	wantAllUnconnected(t)
}

// wantAllLogged checks that both log daemons have every message once, as the
// application's. The numbers say what they had before.
func (a *Asker) wantAllLogged(t testing.TB, syslog, journal, rounds int) {
	t.Helper()
	for _, l := range []struct {
		name string
		read func(testing.TB) []logged
		from int
	}{{"rsyslog", rsyslogHas, syslog}, {"journald", journalHas, journal}} {
		a.wantAllLoggedBy(t, l.name, l.read, l.from, rounds)
	}
}

func (a *Asker) wantAllLoggedBy(t testing.TB, name string, read func(testing.TB) []logged, from, rounds int) {
	t.Helper()
	var want []logged
	for n := range rounds {
		want = append(want, logged{roundText(n + 1), fmt.Sprint(alice.UID), fmt.Sprint(a.PID)})
	}
	var got []logged
	for end := time.Now().Add(patience); time.Now().Before(end) && len(got) < rounds; time.Sleep(time.Millisecond) {
		if all := read(t); len(all) > from { // journalctl may have failed for a moment
			got = all[from:]
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s has %v, expected %d messages of process %d", name, got, rounds, a.PID)
	}
}
