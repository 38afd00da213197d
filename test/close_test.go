// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// restoring is a restore that may go on for as long as what it has restored.
type restoring struct {
	command
	cmd            *exec.Cmd
	log            string
	stdout, stderr bytes.Buffer
}

// startRestore starts a restore. more comes after all of CRIU's options.
func (p *Process) startRestore(t testing.TB, dir string, detached bool, options []string, more ...string) *restoring {
	t.Helper()
	work := images(t)
	r := &restoring{log: filepath.Join(work, "restore.log")}
	r.command = p.restoreBy.restore(dir, detached, slices.Concat(options, []string{"-W", work, "-v4", "-o", "restore.log"}, more)...)
	ctx, cancel := context.WithCancel(context.Background())
	r.cmd = r.as(ctx, p.User)
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	r.cmd.WaitDelay = time.Second
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if r.cmd.ProcessState == nil {
			_ = r.cmd.Wait() // killed
		}
	})
	return r
}

// ended waits for its end.
func (r *restoring) ended(t testing.TB) Result {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.cmd.Wait() // the code says it
	}()
	select {
	case <-done:
	case <-time.After(criuTime):
		_ = r.cmd.Process.Kill()
		<-done
		t.Errorf("the restore went on for %v", criuTime)
	}
	return r.result(r.cmd, r.log, r.stdout.String(), r.stderr.String())
}

// TestEOFOnClose: a connection is the application's alone. Once it closes it,
// the daemon's end is at its end, whoever else is left of the restore.
func TestEOFOnClose(t *testing.T) {
	waiter := []string{"--exec-cmd", "--", "sleep", "1000"}
	shell := []string{"--exec-cmd", "--", "sh", "-c", "sleep 1000; :"}
	for _, c := range []struct {
		name     string
		by       way
		detached bool
		options  []string
		more     []string
		// stays: a process stays with what was restored.
		stays bool
		// sibling: the restored process is our child.
		sibling bool
	}{
		{name: "verb, detached", by: byRPC, detached: true},
		{name: "verb, parent", by: byRPC, stays: true},
		{name: "drop-in, detached", by: byDropin, detached: true},
		{name: "drop-in, parent", by: byDropin, stays: true},
		{name: "drop-in, command", by: byDropin, more: waiter, stays: true},
		{name: "drop-in, shell", by: byDropin, more: shell, stays: true},
		{name: "drop-in, sibling", by: byDropin, detached: true, options: []string{"-S"}, sibling: true},
		{name: "script, parent", by: byScript, stays: true},
		{name: "script, command", by: byScript, more: waiter, stays: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			need(t)
			for _, u := range []User{root, alice} {
				stream, streamPath := daemon(t, "unix", "reconnect")
				packets, packetsPath := daemon(t, "unixpacket", "reconnect-packets")
				a := startApp(t, u, nil)
				a.dumpBy, a.restoreBy = c.by, c.by
				a.connect(t, "s", streamPath)
				a.connect(t, "unused", streamPath)
				a.connectType(t, "p", packetsPath, unix.SOCK_SEQPACKET)
				dir := a.Dump(t)

				r := a.startRestore(t, dir, c.detached, c.options, c.more...)
				if !c.stays {
					res := r.ended(t)
					res.want(t, "restore", 0)
					res.wantPID(t, a.PID)
				}
				a.Awake(t)
				a.Request(t, "s")
				a.Request(t, "p")
				for i, conn := range []string{"s", "unused", "p"} {
					srv, left := stream, 1-i
					if conn == "p" {
						srv, left = packets, 0
					}
					a.Do(t, app.Command{Op: "close", Conn: conn})
					closed := time.Now()
					await(t, srv, "EOF of "+conn, func(c []echo.Client) bool { return echo.Open(c) == left })
					t.Logf("uid %d: EOF of %s within %v", u.UID, conn, time.Since(closed))
				}

				if c.sibling {
					_ = unix.Kill(a.PID, unix.SIGKILL)
					if _, err := unix.Wait4(a.PID, nil, unix.WALL, nil); err != nil {
						t.Errorf("wait for the restored process, which should be our child: %v", err)
					}
				}
				_ = unix.Kill(a.PID, unix.SIGKILL)
				if c.more != nil {
					_ = r.cmd.Process.Kill() // it does not reap what CRIU left it
				}
				if c.stays {
					r.ended(t)
				}
				a.Kill(t)
				nothingLeft(t)
			}
		})
	}
}

// traced reports whether a thread of a process has a tracer.
func traced(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	return slices.ContainsFunc(threads, func(status string) bool {
		b, err := os.ReadFile(status)
		return err == nil && !strings.Contains(string(b), "\nTracerPid:\t0\n")
	})
}

// TestExitStatus: who stays the parent of what it restored ends as that ends,
// as CRIU does.
func TestExitStatus(t *testing.T) {
	need(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, alice, nil)
	a.connect(t, "c", path)
	dir := a.Dump(t)
	end := func(t *testing.T, w way, do func()) Result {
		t.Helper()
		a.restoreBy = w
		r := a.startRestore(t, dir, false, nil)
		a.Awake(t)
		// Before, a thread that ends makes CRIU fail the restore.
		eventually(t, "CRIU has let go of it", func() bool { return !traced(a.PID) })
		do()
		res := r.ended(t)
		a.Gone(t)
		nothingLeft(t)
		return res
	}
	exit := func() { _, _ = a.Try(app.Command{Op: "exit", Value: 42}) } // no answer
	kill := func() { _ = unix.Kill(a.PID, unix.SIGKILL) }
	for _, c := range []struct {
		name string
		do   func()
		code int // of the verb; 128 and a signal's number, as of a shell
	}{
		{"exit", exit, 42},
		{"signal", kill, 128 + int(unix.SIGKILL)},
	} {
		t.Run(c.name, func(t *testing.T) {
			stock := end(t, byStock, c.do).Code
			t.Logf("stock CRIU: %d", stock)
			t.Run("script", func(t *testing.T) {
				end(t, byScript, c.do).want(t, "restore", stock)
			})
			t.Run("dropin", func(t *testing.T) {
				end(t, byDropin, c.do).want(t, "restore", stock)
			})
			t.Run("rpc", func(t *testing.T) {
				r := end(t, byRPC, c.do)
				r.want(t, "restore", c.code)
				r.wantPID(t, a.PID)
			})
		})
	}
}
