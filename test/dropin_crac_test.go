// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// helperName is what the test binary is called as CRaC's helper, which is an
// action script, and with the argument restorewait the parent of what was
// restored.
const helperName = "criuhelper"

func init() {
	if filepath.Base(os.Args[0]) == helperName {
		os.Exit(criuHelper(filepath.Dir(os.Args[0]), os.Args[1:]))
	}
}

// wakeUp is the signal by which the helper wakes the virtual machine.
const wakeUp = unix.SIGUSR1

// criuHelper does what src/java.base/unix/native/criuhelper of CRaC does.
func criuHelper(dir string, args []string) int {
	if len(args) == 1 && args[0] == "restorewait" {
		return restoreWait()
	}
	stage := os.Getenv("CRTOOLS_SCRIPT_ACTION")
	f, err := os.OpenFile(filepath.Join(dir, "stages"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return 1
	}
	_, err = fmt.Fprintln(f, stage)
	if err := errors.Join(err, f.Close()); err != nil {
		return 1
	}
	if stage != "post-resume" {
		return 0
	}
	pid, err := strconv.Atoi(os.Getenv("CRTOOLS_INIT_PID"))
	if err != nil || unix.Kill(pid, wakeUp) != nil {
		return 1
	}
	return 0
}

// restoreWait waits for any child and ends as it does.
func restoreWait() int {
	var status unix.WaitStatus
	for {
		switch _, err := unix.Wait4(-1, &status, 0, nil); {
		case err == unix.EINTR:
		case err != nil:
			return 1
		case status.Signaled():
			_ = unix.Kill(os.Getpid(), status.Signal())
			select {}
		case status.Exited():
			return status.ExitStatus()
		}
	}
}

// cracEnds are the ways in which the virtual machine may end, and how CRaC's
// restore must end then.
var cracEnds = []struct {
	name, want string
	end        func(*App) error
}{
	{"exit 7", "exit status 7", func(a *App) error {
		_, _ = a.Try(app.Command{Op: "exit", Value: 7}) // gives no answer
		return nil
	}},
	{"SIGTERM", "signal: terminated", func(a *App) error { return unix.Kill(a.PID, unix.SIGTERM) }},
	{"SIGKILL", "signal: killed", func(a *App) error { return unix.Kill(a.PID, unix.SIGKILL) }},
}

// TestDropinCRaC: the command lines of CRaC, on a process with a connection.
func TestDropinCRaC(t *testing.T) {
	need(t)
	for _, u := range []User{root, alice} {
		t.Run(fmt.Sprint("uid ", u.UID), func(t *testing.T) {
			for _, running := range []bool{false, true} {
				crac(t, u, running)
			}
		})
	}
}

func crac(t *testing.T, u User, leaveRunning bool) {
	t.Helper()
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, u, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	a.Do(t, app.Command{Op: "signals", Value: int(wakeUp)})
	work, dir := images(t), images(t)
	helper := filepath.Join(work, helperName)
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, helper)
	}
	if err != nil {
		t.Fatal(err)
	}

	dump := []string{"criu", "dump", "-t", strconv.Itoa(a.PID), "-D", dir, "--shell-job", "-v4", "-o", "dump4.log"}
	if leaveRunning {
		dump = append(dump, "-R")
	}
	command{byDropin, criuhook, dump}.run(t, u, filepath.Join(dir, "dump4.log")).want(t, "dump", 0)
	if leaveRunning {
		a.Request(t, "c")
		a.Kill(t)
	}
	a.Gone(t)
	await(t, srv, "the end of the old connection", func(c []echo.Client) bool { return echo.Open(c) == 0 })

	var stages []string // by stock CRIU, by the drop-in
	for _, w := range []way{byStock, byDropin} {
		for _, e := range cracEnds {
			before := srv.Clients()
			awaitFree(t, a.dumpedThreads(dir))
			restore, output := cracRestore(t, w, u, work, dir, helper)
			a.Awake(t)
			eventually(t, "the signal of the helper", func() bool {
				return a.Do(t, app.Command{Op: "stats"}).Count.Signals == 1
			})
			a.wantParent(t, restore.Process.Pid)
			if w == byDropin {
				a.wantCRaCConnection(t, srv, len(before), u)
			}
			noCRIULeft(t)
			nothingLeft(t) // while the helper waits, too
			if err := e.end(a); err != nil {
				t.Fatal(err)
			}
			_ = restore.Wait()
			if got := restore.ProcessState.String(); got != e.want {
				t.Errorf("by %v, %s: the helper ended with %s, expected %s\n%s", w, e.name, got, e.want, contentsOf(output))
			}
			if text := contentsOf(output); text != "" {
				t.Errorf("by %v, %s: the restore says %s", w, e.name, text)
			}
			a.Gone(t)
			stages = append(stages, contentsOf(filepath.Join(work, "stages")))
			if err := os.Remove(filepath.Join(work, "stages")); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range stages {
		if s != stages[0] || !strings.HasSuffix(s, "post-resume\n") {
			t.Errorf("the helper saw the stages %q, by stock CRIU %q", s, stages[0])
		}
	}
}

// cracRestore starts CRaC's restore, which ends when the virtual machine ends.
func cracRestore(t *testing.T, w way, u User, work, dir, helper string) (restore *exec.Cmd, output string) {
	t.Helper()
	c := stock("restore", "-W", ".", "--shell-job", "--action-script", helper, "-D", dir,
		"--cpu-cap=none", "-v1", "--exec-cmd", "--", helper, "restorewait")
	if w == byDropin {
		c.by, c.file = w, criuhook
	}
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	t.Cleanup(cancel)
	restore = c.as(ctx, u)
	restore.Dir = work
	// Of its own group, as a job of a shell is; its end is the test's.
	if restore.SysProcAttr == nil {
		restore.SysProcAttr = &syscall.SysProcAttr{}
	}
	restore.SysProcAttr.Setpgid = true
	out, err := os.CreateTemp("", "out")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(out.Name()) })
	defer out.Close()
	restore.Stdout, restore.Stderr = out, out
	if err := restore.Start(); err != nil {
		t.Fatal(err)
	}
	return restore, out.Name()
}

// wantParent checks that the helper, in CRIU's place, is the parent.
func (a *App) wantParent(t *testing.T, pid int) {
	t.Helper()
	eventually(t, "the helper is in CRIU's place", func() bool {
		return contentsOf(fmt.Sprintf("/proc/%d/comm", pid)) == helperName+"\n"
	})
	stat := contentsOf(fmt.Sprintf("/proc/%d/stat", a.PID))
	if f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]); f[1] != strconv.Itoa(pid) {
		t.Errorf("the parent is %s, expected %d", f[1], pid)
	}
}

// wantCRaCConnection checks that the connection works, as its user's, and that
// the daemon learns at once when it is closed.
func (a *App) wantCRaCConnection(t *testing.T, srv *echo.Server, before int, u User) {
	t.Helper()
	a.Request(t, "c")
	now := srv.Clients()[before:]
	if len(now) != 1 || now[0].UID != u.UID || now[0].GID != u.GID {
		t.Errorf("the daemon sees %+v, expected one connection of uid %d", now, u.UID)
	}
	a.Do(t, app.Command{Op: "close", Conn: "c"})
	await(t, srv, "EOF when the application closes its socket", func(c []echo.Client) bool { return echo.Open(c) == 0 })
}
