// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/proto"
)

// fill fills the queue of a datagram socket, which nobody empties.
func fill(t testing.TB, name string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// As syslog has it, and for journald a field and its value.
	const message = "<14>PRIORITY=6: filler\n"
	for range 10000 {
		err := unix.Sendto(fd, []byte(message), 0, &unix.SockaddrUnix{Name: name})
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatalf("fill the queue of %s: %v", name, err)
		}
	}
	t.Fatalf("the queue of %s does not fill", name)
}

// sending is how many threads of a process wait in the kernel to send.
func sending(pid int) (n int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", pid))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && (strings.Contains(string(b), "unix_wait_for_peer") || strings.Contains(string(b), "sock_alloc_send")) {
			n++
		}
	}
	return n
}

// fieldCyclesAllBusy: a thread for each daemon, all daemons stopped: at the dump
// each thread waits for an answer, or for room in a log daemon's queue.
func fieldCyclesAllBusy(t *testing.T) {
	// No source comes behind another one that is stopped.
	nameSources(t, "passwd: files systemd", "group: files winbind", "hosts: files mdns4_minimal", "services: files ldap")
	syslog, journal := len(rsyslogHas(t)), len(journalHas(t))
	owing := fieldListeners()
	for i := range owing {
		if owing[i].daemon == "nslcd" {
			owing[i].what = "service=testd"
		}
	}
	logs := []string{"syslog", "journal"}
	what := slices.Clone(logs)
	comms := []string{"rsyslogd", "systemd-journal"}
	wanted := []string{"/dev/log"}
	fails := map[string]int{}
	for _, s := range owing {
		what, comms, wanted = append(what, s.what), append(comms, s.comms...), append(wanted, string(s.listener))
		fails[s.what] = s.fails
	}
	a := startAskerAs(t, mayUsePrivileged(t), []string{"-t"}, what...)
	fds := a.fds(t)
	under, next := map[string]waits{}, map[string]waits{}
	for n := range fieldCycles {
		thaw := freezeAll(t, comms...)
		for _, queue := range []string{"/dev/log", "/run/systemd/journal/socket"} {
			fill(t, queue)
		}
		a.ask(t)
		for _, s := range owing {
			a.awaitBusy(t, s.listener)
		}
		eventually(t, "both messages to wait for room", func() bool { return sending(a.PID) == len(logs) })
		rec, restored := a.cycle(t, thaw)
		var hungUp []string
		for _, c := range rec.Connections {
			if c.Action == proto.Action_ACTION_HANGUP && c.Busy != "" {
				hungUp = append(hungUp, string(c.Peer.Name))
			}
		}
		slices.Sort(hungUp)
		slices.Sort(wanted)
		if !slices.Equal(hungUp, wanted) {
			t.Fatalf("recorded: %v; expected hangups of %q", rec.Connections, wanted)
		}
		left := slices.Clone(what)
		eventually(t, "the questions that were under way", func() bool {
			left = slices.DeleteFunc(left, func(w string) bool {
				answered := a.answer(t, w).asked == 2*n+2
				if answered {
					under[w] = append(under[w], time.Since(restored))
				}
				return answered
			})
			return len(left) == 0
		})
		failed := a.failed(t)
		a.rounds(t, 1)
		a.wantFailed(t, "after the questions that were under way", failed)
		for _, w := range what {
			next[w] = append(next[w], a.answer(t, w).last)
		}
	}
	identity := a.seenBy(t, nameServices[0].listener, nameServices[0].comms...)
	a.seenBy(t, systemBus, busDaemon)
	a.seenBy(t, winbindPrivileged.listener, winbindPrivileged.comms...)
	var most time.Duration
	for _, w := range what {
		got := a.answer(t, w).failed
		t.Logf("%s: %d of %d under way failed, longest %v, then %v", w, got, fieldCycles, under[w].longest(), next[w].longest())
		if got > fails[w]*fieldCycles {
			t.Errorf("%s: %d of %d failed", w, got, fieldCycles)
		}
		under[w].wantMost(t, w+", under way", soon)
		next[w].wantMost(t, w+", the next one", soon)
		most = max(most, under[w].longest(), next[w].longest())
	}
	a.wantAllLogged(t, syslog, journal, 2*fieldCycles+1)
	observeSoon(t, Observation{
		Client: askAllNames, Policy: "hangup of all",
		State:  fmt.Sprintf("busy with all of them, a thread each, %d cycles", fieldCycles),
		Failed: a.failed(t), Longest: most, FDsLeaked: a.leaked(t, fds), Identity: identity,
	})
	a.Kill(t)
	wantAllUnconnected(t)
}
