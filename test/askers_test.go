// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// atOnce is what the first answer takes of a daemon that owes nothing.
const atOnce = 50 * time.Millisecond

// soon is how long a first answer may take after a restore. What goes wrong
// takes five seconds and more: those are the clients' own timeouts.
const soon = time.Second

// runDaemons starts daemons of test/daemons; after the test they are gone.
func runDaemons(t testing.TB, names ...string) {
	t.Helper()
	t.Cleanup(func() { doDaemons(t, "stop", names...) })
	doDaemons(t, "start", names...)
}

func doDaemons(t testing.TB, action string, names ...string) {
	t.Helper()
	cmd := exec.Command("daemons/daemons", append([]string{action}, names...)...)
	// Not a pipe: the daemons would keep it.
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		b, _ := os.ReadFile(out.Name())
		t.Fatalf("daemons %s %v: %v\n%s", action, names, err, b)
	}
}

// nameSources are the lines of nsswitch.conf for the length of a test.
func nameSources(t testing.TB, lines ...string) {
	t.Helper()
	const file = "/etc/nsswitch.conf"
	before, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0o644); err != nil {
			t.Error(err)
		}
	})
}

// askerBinary is test/daemons/client.c, built once.
var askerBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "asker")
	if err != nil {
		return "", err
	}
	flags, err := exec.Command("pkg-config", "--cflags", "--libs", "dbus-1", "libsystemd").Output()
	if err != nil {
		return "", fmt.Errorf("pkg-config: %w", err)
	}
	bin := filepath.Join(dir, "client")
	args := append([]string{"-O2", "-Wall", "-Werror", "-pthread", "-o", bin, "daemons/client.c"}, strings.Fields(string(flags))...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build client: %w\n%s", err, out)
	}
	return bin, os.Chmod(dir, 0o755)
})

// Asker is a running test/daemons/client.c. Its rounds are those of a paused
// lookup.
type Asker struct {
	*Lookup
	what []string
	// inPlace: by no way can its connection be made before its process exists.
	inPlace bool
}

// startAsker starts the client as alice and waits until all was asked once.
func startAsker(t testing.TB, what ...string) *Asker {
	t.Helper()
	return startAskerAs(t, alice, nil, what...)
}

// startAskerAs starts the client as u, with options.
func startAskerAs(t testing.TB, u User, options []string, what ...string) *Asker {
	t.Helper()
	bin, err := askerBinary()
	if err != nil {
		t.Fatal(err)
	}
	a := &Asker{Lookup: &Lookup{stats: filepath.Join(folder(t), "stats"), perRound: len(what)}, what: what}
	a.Process = start(t, u, nil, bin, slices.Concat(options, []string{a.stats}, what)...)
	a.writes = []string{a.stats}
	a.alive = func(t testing.TB) { t.Helper(); a.rounds(t, 1) }
	eventually(t, "the first round", func() bool { n, _, all := a.count(t); return n == a.perRound && all })
	a.wantFailed(t, "before all", 0)
	return a
}

// answer is how it went with one thing that is asked.
type answer struct {
	asked, failed int
	last          time.Duration // how long the last one took
	errno         unix.Errno    // of the last that failed
}

func (a *Asker) answer(t testing.TB, what string) answer {
	t.Helper()
	b, err := os.ReadFile(a.stats)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for i, w := range a.what {
		if w != what || i >= len(lines) {
			continue
		}
		var out answer
		var thread, longest, us, errno, uid int
		if _, err := fmt.Sscanf(strings.Join(strings.Fields(lines[i]), " "), "thread %d lookups %d failed %d longest_us %d errno %d uid %d round_us %d",
			&thread, &out.asked, &out.failed, &longest, &errno, &uid, &us); err != nil {
			t.Fatalf("%s: %q: %v", a.stats, lines[i], err)
		}
		out.last, out.errno = time.Duration(us)*time.Microsecond, unix.Errno(errno)
		return out
	}
	t.Fatalf("%s is not among %v", what, a.what)
	return answer{}
}

// leaked is how many fds the process has more than before.
func (a *Asker) leaked(t testing.TB, before map[int]string) int {
	t.Helper()
	now := a.fds(t)
	if len(now) > len(before) {
		t.Logf("fds: before %v, now %v", before, now)
	}
	return len(now) - len(before)
}

// awaitRead waits until the daemons have read all that the process has sent. A
// connection is busy as long as they have not.
func (a *Asker) awaitRead(t testing.TB) {
	t.Helper()
	eventually(t, "everything sent to be read", func() bool {
		return !slices.ContainsFunc(a.connections(t), func(c sockpeer.Connection) bool { return c.SendQueue > 0 })
	})
}

// accepted is a connection at its daemon's end.
type accepted struct {
	by   int // the daemon's pid
	peer unix.Ucred
}

// acceptedBy lists what processes of these names have accepted on a listener, with
// what SO_PEERCRED tells them of the client. A trailing * stands for any rest.
func acceptedBy(t testing.TB, listener sockpeer.Name, comms ...string) (out []accepted) {
	t.Helper()
	for _, comm := range comms {
		for _, pid := range runningLike(comm) {
			out = append(out, acceptedIn(pid, listener.Pattern())...)
		}
	}
	return out
}

// acceptedIn names a listener as package unix does: @ for an abstract one.
func acceptedIn(pid int, listener string) (out []accepted) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // has just ended
	}
	defer unix.Close(pidfd)
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, link := range links {
		if name, _ := os.Readlink(link); !strings.HasPrefix(name, "socket:") {
			continue
		}
		n, _ := strconv.Atoi(filepath.Base(link))
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue
		}
		bound, err1 := unix.Getsockname(fd)
		listens, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		peer, err3 := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if at, ok := bound.(*unix.SockaddrUnix); ok && err1 == nil && err2 == nil && err3 == nil && listens == 0 && at.Name == listener {
			out = append(out, accepted{pid, *peer})
		}
		unix.Close(fd)
	}
	return out
}

// ofNobodyElse leaves out what other processes have connected, which are alive:
// daemons are clients of each other. What is left is the application's, or was
// made for it by somebody who has ended.
func ofNobodyElse(all []accepted, pid int) []accepted {
	return slices.DeleteFunc(all, func(a accepted) bool {
		return int(a.peer.Pid) != pid && stateOf(int(a.peer.Pid)) != ""
	})
}

// wantUnconnected waits until no client but other daemons has a connection.
func wantUnconnected(t testing.TB, listener sockpeer.Name, comms ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to have no connection at %s", comms[0], listener), func() bool {
		return len(ofNobodyElse(acceptedBy(t, listener, comms...), 0)) == 0
	})
}

// seenBy is the client of a daemon's only connection, as SO_PEERCRED tells the
// daemon. It must be the application; of its pid only who connects before it
// exists can tell, which an action script cannot.
func (a *Asker) seenBy(t testing.TB, listener sockpeer.Name, comms ...string) string {
	t.Helper()
	var got []accepted
	eventually(t, fmt.Sprintf("%s to have one connection at %s", comms[0], listener), func() bool {
		got = ofNobodyElse(acceptedBy(t, listener, comms...), a.PID)
		return len(got) == 1
	})
	p := got[0].peer
	if p.Uid != a.User.UID || p.Gid != a.User.GID || wayOf(t) != byScript && !a.inPlace && int(p.Pid) != a.PID {
		t.Errorf("%s sees %+v as its client, expected process %d of %+v", comms[0], p, a.PID, a.User)
	}
	return seenAs(p.Uid, a.User)
}

// runningLike lists the processes with a name.
func runningLike(comm string) (pids []int) {
	prefix, any := strings.CutSuffix(comm, "*")
	if !any {
		return running(comm)
	}
	files, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.HasPrefix(b, []byte(prefix)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// freezeAll stops processes, and what they have forked, until the returned
// function is called.
func freezeAll(t testing.TB, comms ...string) (thaw func()) {
	t.Helper()
	var pids []int
	thaw = sync.OnceFunc(func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	})
	t.Cleanup(thaw)
	// One that was forked meanwhile would answer: until there is none.
	eventually(t, fmt.Sprintf("every thread of %v to stop", comms), func() bool {
		stopped := !slices.ContainsFunc(pids, runs)
		more := slices.DeleteFunc(family(comms), func(pid int) bool { return slices.Contains(pids, pid) })
		for _, pid := range more {
			_ = unix.Kill(pid, unix.SIGSTOP) // it may have ended
		}
		pids = append(pids, more...)
		return stopped && len(more) == 0 && len(pids) > 0
	})
	return thaw
}

// family lists the processes with these names, and their children.
func family(comms []string) (pids []int) {
	for _, comm := range comms {
		pids = append(pids, runningLike(comm)...)
	}
	for i := 0; i < len(pids); i++ {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, f := range files {
			b, _ := os.ReadFile(f) // none if it has ended
			for _, child := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(child); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// runs reports whether a thread of a process is neither stopped nor ended.
func runs(pid int) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	return slices.ContainsFunc(stats, func(stat string) bool {
		b, err := os.ReadFile(stat)
		if err != nil {
			return false
		}
		state := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))[0]
		return !strings.Contains("TZX", state)
	})
}

// wantStill waits until the processes with these names are those that they were
// before. Some daemons have another one for a moment, of which it takes over the
// name: unscd for each question that it has no answer to.
func wantStill(t testing.TB, before []int, comms ...string) {
	t.Helper()
	var now []int
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		now = nil
		for _, comm := range comms {
			now = append(now, runningLike(comm)...)
		}
		if slices.Equal(now, before) {
			return
		}
	}
	t.Errorf("%v were the processes %v, now they are %v", comms, before, now)
}

// waits are how long first answers took, one after each restore.
type waits []time.Duration

func (w waits) longest() time.Duration { return slices.Max(w) }

// wantMost checks that half of them are below a bound, and that none took as
// long as what goes wrong does: single ones say something of the machine, too.
func (w waits) wantMost(t testing.TB, what string, bound time.Duration) {
	t.Helper()
	sorted := slices.Sorted(slices.Values(w))
	if m := sorted[len(sorted)/2]; m >= bound || w.longest() >= soon {
		t.Errorf("%s: the median of %d first answers is %v, the longest %v; expected less than %v and %v",
			what, len(w), m, w.longest(), bound, soon)
	}
}

// observeSoon notes an observation, and that what goes wrong would take longer.
func observeSoon(t testing.TB, o Observation) {
	t.Helper()
	observe(t, o)
	t.Logf("%+v", o)
	if o.Longest > soon {
		t.Errorf("%s, %s: the first answer after the restore took %v", o.Client, o.State, o.Longest)
	}
}
