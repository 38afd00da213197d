// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/interpose"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// The kills of CRIU fall into the steps in which criuhook takes part: the
// pre-dump script, the tracer's time up to its detaching, the post-dump
// script. Between those CRIU's parasite code runs in the application, and a
// CRIU that is killed then may take the application with it, whether criuhook
// takes part or not: of 26 kills of a stock CRIU 4.1.1 without any script at
// moments after "Dumping task" in its log, 4 ended an application that held
// no connection at all; the last lines of the log were "Parasite syscall_ip"
// and "Dumping GP/FPU registers".

// All of these are of the action script only: they find their victims by what
// CRIU tells a script, and two are about the tracer.

// TestKillCRIUFromScript kills CRIU before and after our script.
func TestKillCRIUFromScript(t *testing.T) {
	need(t)
	a, srv := hammered(t, root)
	for _, c := range []struct{ name, stage, before, after string }{
		{"before pre-dump", "pre-dump", "kill -9 $PPID", ""},
		{"after pre-dump", "pre-dump", "", "kill -9 $PPID"},
		{"before post-dump", "post-dump", "kill -9 $PPID", ""},
		{"after post-dump", "post-dump", "", "kill -9 $PPID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			script := wrapper(t, "", fmt.Sprintf("[ $CRTOOLS_SCRIPT_ACTION = %s ] || exec %s\n%s\n%s\n%s", c.stage, criuhook, c.before, criuhook, c.after))
			dir := images(t)
			r := run(t, a.User, dir, "dump.log", "dump", "-t", strconv.Itoa(a.PID), "--leave-running", script)
			r.want(t, "dump by a CRIU that was killed", -1)
			if c.name != "after post-dump" {
				noRecord(t, dir)
			}
			a.unharmed(t, srv)
			a.dumpsAgain(t, srv, dir)
		})
	}
	a.restoresAtLast(t, srv)
}

// dumpsAgain checks that a dump into the same directory works as ever.
func (a *App) dumpsAgain(t testing.TB, srv *echo.Server, dir string) {
	t.Helper()
	a.TryDump(t, dir, "--leave-running").want(t, "the next dump", 0)
	wantRecorded(t, dir, threads)
	a.unharmed(t, srv)
}

// restoresAtLast ends the application, and checks images of a last dump.
func (a *App) restoresAtLast(t testing.TB, srv *echo.Server) {
	t.Helper()
	dir := images(t)
	a.dumpsAgain(t, srv, dir)
	a.Kill(t)
	a.Dumped(t, dir)
	nothingLeft(t)
}

// caught is a process of ours that a test has found.
type caught struct{ pid, criu int }

// catch waits until a process of ours is there for this stage of a CRIU: our
// script, or, with stage "tracer", the tracer. It returns the zero value when
// done is closed before.
func catch(stage string, done <-chan struct{}) caught {
	ours, err := os.Stat(criuhook)
	for err == nil {
		select {
		case <-done:
			return caught{}
		default:
		}
		dirs, _ := filepath.Glob("/proc/[0-9]*")
		for _, d := range dirs {
			exe, err := os.Stat(d + "/exe")
			if err != nil || !os.SameFile(exe, ours) {
				continue
			}
			args, _ := os.ReadFile(d + "/cmdline")
			env, _ := os.ReadFile(d + "/environ")
			pid, _ := strconv.Atoi(filepath.Base(d))
			_, dir, _ := strings.Cut("\x00"+string(env), "\x00CRTOOLS_IMAGE_DIR=/proc/")
			number, _, _ := strings.Cut(dir, "/")
			criu, err := strconv.Atoi(number)
			tracer := strings.Contains(string(args), "\x00interpose\x00")
			if err == nil && (tracer && stage == "tracer" ||
				!tracer && strings.Contains(string(env)+"\x00", "CRTOOLS_SCRIPT_ACTION="+stage+"\x00")) {
				return caught{pid, criu}
			}
		}
	}
	return caught{}
}

// during runs fn beside a dump or a restore, and waits for both.
func during(what func() Result, fn func(done <-chan struct{})) Result {
	done := make(chan struct{})
	var r Result
	go func() {
		defer close(done)
		r = what()
	}()
	fn(done)
	<-done
	return r
}

// rounds is how many different moments a kill is tried at, step apart.
const (
	rounds = 20
	step   = time.Millisecond
)

func TestKillScriptAndTracer(t *testing.T) {
	need(t)
	for _, stage := range []string{"pre-dump", "tracer", "post-dump"} {
		t.Run(stage, func(t *testing.T) {
			a, srv := hammered(t, alice)
			failures := 0
			for i := range rounds {
				dir := images(t)
				r := during(func() Result { return a.TryDump(t, dir, "--leave-running") }, func(done <-chan struct{}) {
					if c := catch(stage, done); c.pid != 0 {
						time.Sleep(time.Duration(i) * step)
						_ = unix.Kill(c.pid, unix.SIGKILL) // it may have ended
					}
				})
				switch {
				case r.Code == 0:
					wantRecorded(t, dir, threads)
				case stage == "post-dump":
					// Killed after its last step the images are good.
					failures++
				default:
					failures++
					noRecord(t, dir)
				}
				a.unharmed(t, srv)
			}
			if failures == 0 {
				t.Errorf("none of %d dumps failed: the kills came too late", rounds)
			}
			t.Logf("%d of %d dumps failed", failures, rounds)
			a.restoresAtLast(t, srv)
		})
	}
}

// TestKillCRIUWhileTraced kills CRIU while the tracer follows it. The tracer
// is stopped first, so that CRIU cannot get beyond its next system call.
func TestKillCRIUWhileTraced(t *testing.T) {
	need(t)
	a, srv := hammered(t, alice)
	killed := 0
	for i := range 2 * rounds {
		dir := images(t)
		r := during(func() Result { return a.TryDump(t, dir, "--leave-running") }, func(done <-chan struct{}) {
			c := catch("tracer", done)
			if c.pid == 0 {
				return
			}
			time.Sleep(time.Duration(i) * step)
			if unix.Kill(c.pid, unix.SIGSTOP) != nil {
				return
			}
			awaitStopped(c.pid)
			if interpose.TracerOf(c.criu) == c.pid {
				_ = unix.Kill(c.criu, unix.SIGKILL)
				killed++
			}
			_ = unix.Kill(c.pid, unix.SIGCONT)
		})
		if r.Code == 0 {
			wantRecorded(t, dir, threads)
		} else {
			noRecord(t, dir)
		}
		a.unharmed(t, srv)
	}
	if killed == 0 {
		t.Errorf("CRIU was not killed in any of %d dumps", 2*rounds)
	}
	t.Logf("CRIU was killed in %d of %d dumps", killed, 2*rounds)
	a.restoresAtLast(t, srv)
}

// awaitStopped waits until every thread of a process has stopped, or it ends.
func awaitStopped(pid int) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond / 4) {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		moving := false
		for _, s := range stats {
			moving = moving || !strings.Contains("TZX", taskState(s))
		}
		if !moving {
			return
		}
	}
}

// taskState reads the state of a task from its stat file (proc(5)); "": gone.
func taskState(stat string) string {
	b, err := os.ReadFile(stat)
	_, rest, ok := strings.Cut(string(b), ") ")
	if err != nil || !ok {
		return ""
	}
	state, _, _ := strings.Cut(rest, " ")
	return state
}

// A rule may wait for long; nobody waits for a CRIU that is gone.
func TestKillCRIUWhileWaiting(t *testing.T) {
	need(t)
	install(t, "rules:\n  - {name: t-long, path: /tmp/*/*/long*, idle: reconnect, busy: wait, patience: 5m}\n")
	a, srv := awaiting(t, waysToWait[0], "long")
	before := a.Details(t, "c")
	dir := images(t)
	r := during(func() Result { return a.TryDump(t, dir) }, func(done <-chan struct{}) {
		if c := catch("tracer", done); c.pid != 0 {
			_ = unix.Kill(c.criu, unix.SIGKILL)
		}
	})
	r.want(t, "dump by a CRIU that was killed", -1)
	noRecord(t, dir)
	nothingLeft(t)
	srv.Release()
	a.answered(t, "")
	a.untouched(t, srv, "c", before)
}

func TestKillScriptOfRestore(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, alice, nil)
	for i := range threads {
		a.connect(t, fmt.Sprint("h", i), path)
		a.Request(t, fmt.Sprint("h", i))
	}
	dir := a.Dump(t)
	failures := 0
	for i := range rounds {
		r := during(func() Result { return a.TryRestore(t, dir) }, func(done <-chan struct{}) {
			if c := catch("post-restore", done); c.pid != 0 {
				time.Sleep(time.Duration(i) * step / 2)
				_ = unix.Kill(c.pid, unix.SIGKILL)
			}
		})
		if r.Code == 0 {
			a.Awake(t)
			a.Request(t, "h0")
			a.Kill(t)
		} else {
			failures++
			a.Gone(t) // CRIU kills what it has half restored
		}
		await(t, srv, "EOF of every connection", func(c []echo.Client) bool { return echo.Open(c) == 0 })
		nothingLeft(t)
	}
	if failures == 0 {
		t.Errorf("none of %d restores failed: the kills came too late", rounds)
	}
	t.Logf("%d of %d restores failed", failures, rounds)
	a.Restore(t, dir)
	for i := range threads {
		a.Request(t, fmt.Sprint("h", i))
	}
	await(t, srv, "a connection for each thread", func(c []echo.Client) bool { return echo.Open(c) == threads })
	nothingLeft(t)
}

// TestCRIUTracedAlready: strace(1) or a debugger holds CRIU.
func TestCRIUTracedAlready(t *testing.T) {
	need(t)
	a, srv := hammered(t, alice)
	fifo := filepath.Join(images(t), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	script := wrapper(t, "-p", fmt.Sprintf("[ $CRTOOLS_SCRIPT_ACTION != pre-dump ] || { echo $PPID >%[1]s; cat %[1]s >/dev/null; }\nexec %[2]s", fifo, criuhook))
	tracer := startApp(t, root, nil)
	traced := make(chan error, 1)
	go func() {
		b, err := os.ReadFile(fifo)
		if err == nil {
			pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
			_, err = tracer.Try(app.Command{Op: "trace", Value: pid})
		}
		traced <- err
		_ = os.WriteFile(fifo, []byte("go on\n"), 0) // else the dump hangs
	}()
	dir := images(t)
	r := run(t, a.User, dir, "dump.log", "dump", "-t", strconv.Itoa(a.PID), "--leave-running", script)
	if err := <-traced; err != nil {
		t.Fatal(err)
	}
	r.failed(t, dir, "CRIU cannot be traced", fmt.Sprintf("process %d (", tracer.PID), "traces it already", "criuhook dump")
	a.unharmed(t, srv)
	a.dumpsAgain(t, srv, dir)
	a.restoresAtLast(t, srv)
}
