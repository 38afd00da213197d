// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// criuTime bounds one run of CRIU.
const criuTime = time.Minute

// Result is how one dump or restore ended.
type Result struct {
	By     way
	Code   int
	Stdout string
	Output string // stdout and stderr: what a person sees; by swrk, CRIU's log too
	Log    string // CRIU's log
	// restores: it was a restore.
	restores bool
}

// run runs a stock CRIU with a log in dir.
func run(t testing.TB, u User, dir, log string, args ...string) Result {
	t.Helper()
	return stock(append(args, "-D", dir, "-v4", "-o", log)...).run(t, u, filepath.Join(dir, log))
}

// images is a new directory for images, outside of what targets can write to.
func images(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "images")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TryDump dumps by the way of the test. args are CRIU's options.
func (p *Process) TryDump(t testing.TB, dir string, args ...string) Result {
	t.Helper()
	return p.dumpBy.dump(p.PID, dir, append(args, "-v4", "-o", "dump.log")...).run(t, p.User, filepath.Join(dir, "dump.log"))
}

// Dump dumps and fails the test if that fails. Without --leave-running among
// args the process is gone then, and stock CRIU has restored the images once.
func (p *Process) Dump(t testing.TB, args ...string) (dir string) {
	t.Helper()
	dir = images(t)
	r := p.TryDump(t, dir, args...)
	r.want(t, "dump", 0)
	if !strings.Contains(strings.Join(args, " "), "--leave-running") {
		p.Dumped(t, dir)
	}
	return dir
}

// TryRestore restores by the way of the test. args are CRIU's options.
func (p *Process) TryRestore(t testing.TB, dir string, args ...string) Result {
	t.Helper()
	return p.tryRestoreBy(t, p.restoreBy, dir, args...)
}

func (p *Process) tryRestoreBy(t testing.TB, w way, dir string, args ...string) Result {
	t.Helper()
	return w.restore(dir, true, append(args, "-v4", "-o", "restore.log")...).run(t, p.User, filepath.Join(dir, "restore.log"))
}

// Restore restores and fails the test if that fails.
func (p *Process) Restore(t testing.TB, dir string, args ...string) Result {
	t.Helper()
	r := p.TryRestore(t, dir, args...)
	r.want(t, "restore", 0)
	r.wantPID(t, p.PID)
	return r
}

// RestoreStock restores with stock CRIU alone, without any option of ours.
func (p *Process) RestoreStock(t testing.TB, dir string) {
	t.Helper()
	p.tryRestoreBy(t, byStock, dir).want(t, "restore with stock CRIU", 0)
}

// Dumped waits until the process is gone, which a dump ended or the test has
// killed, and checks that its images restore with stock CRIU alone: what was
// in them runs, and does its work. Afterwards all is as before.
func (p *Process) Dumped(t testing.TB, dir string) {
	t.Helper()
	p.Gone(t)
	awaitFree(t, p.dumpedThreads(dir))
	before := map[string][]byte{}
	for _, f := range p.writes {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		before[f] = b
	}
	work := images(t)
	pidfile := filepath.Join(work, "pid")
	byStock.restoreIn(t, p.User, dir, work, append([]string{"--pidfile", pidfile}, p.restoreArgs...)...).want(t, "restore with stock CRIU", 0)
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	q := &Process{User: p.User}
	if q.PID, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		t.Fatal(err)
	}
	defer func() {
		t.Helper()
		q.Kill(t)
		p.Gone(t)
		for f, b := range before {
			if err := os.WriteFile(f, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}()
	eventually(t, fmt.Sprintf("process %d, restored by stock CRIU, to run", q.PID), func() bool {
		switch s := stateOf(q.PID); s {
		case "R", "S", "D":
			return true
		case "", "Z", "X":
			t.Fatalf("process %d, restored by stock CRIU, is in state %q", q.PID, s)
		}
		return false
	})
	if p.alive != nil {
		p.alive(t)
	}
}

// dumpedThreads are the threads in images, by CRIU's core-TID.img; none if they
// are numbered in a pid namespace of their own.
func (p *Process) dumpedThreads(dir string) (tids []int) {
	cores, _ := filepath.Glob(filepath.Join(dir, "core-*.img"))
	for _, c := range cores {
		tid, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(c), "core-"), ".img"))
		if err == nil {
			tids = append(tids, tid)
		}
	}
	if !slices.Contains(tids, p.PID) {
		return nil
	}
	return tids
}

// stateOf is the state of a process as proc(5) has it; "": there is none.
func stateOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))[0]
}

// want checks the exit code and prints CRIU's log if it is another.
func (r Result) want(t testing.TB, what string, code int) {
	t.Helper()
	if r.Code != code {
		t.Fatalf("%s: exit code %d, expected %d\n%s\n%s", what, r.Code, code, r.Output, r.tail())
	}
}

// wantPID checks that the verb has printed the pid, and nothing else.
func (r Result) wantPID(t testing.TB, pid int) {
	t.Helper()
	if want := fmt.Sprintln(pid); r.By == byRPC && r.Stdout != want {
		t.Errorf("the verb printed %q, expected %q", r.Stdout, want)
	}
}

// wantMessage checks that a person, and the log, get to see a text. What fails
// before CRIU runs has no log, if it is a verb, or set-user-id. On a restore the
// drop-in has become CRIU, which begins its log, when all has been said.
func (r Result) wantMessage(t testing.TB, parts ...string) {
	t.Helper()
	for _, s := range parts {
		if !strings.Contains(r.Output, s) {
			t.Errorf("stderr does not say %q:\n%s\n%s", s, r.Output, r.tail())
		}
		if !strings.Contains(r.Log, s) && !(r.By != byScript && r.Log == "") && !(r.By == byDropin && r.restores) {
			t.Errorf("CRIU's log does not say %q:\n%s", s, r.tail())
		}
	}
}

// tail is the end of CRIU's log and every line of ours.
func (r Result) tail() string {
	lines := strings.Split(strings.TrimSpace(r.Log), "\n")
	const most = 60
	var out []string
	for i, l := range lines {
		if len(lines)-i <= most || strings.Contains(l, "criuhook") || strings.Contains(l, "Error") {
			out = append(out, l)
		}
	}
	return "CRIU's log ends:\n" + strings.Join(out, "\n")
}
