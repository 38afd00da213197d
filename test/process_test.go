// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// patience is for conditions that come within milliseconds unless something is
// broken.
const patience = 10 * time.Second

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("waited %v for: %s", patience, what)
}

// folder is a new directory that any user can write to, of a path so short
// that socket names fit.
func folder(t testing.TB) string {
	t.Helper()
	parent, err := os.MkdirTemp("/tmp", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(parent) })
	dir := filepath.Join(parent, "d")
	for _, d := range []string{parent, dir} {
		if err := errors.Join(os.MkdirAll(d, 0o777), os.Chmod(d, 0o777)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// User is who an application runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

var (
	root  = User{}
	alice = User{UID: 1000, GID: 1000, Groups: []uint32{1000, 2001, 2002}}
)

// Process is something to dump: a process and who it runs as.
type Process struct {
	PID  int
	User User
	// dumpBy and restoreBy are the way of the test that started it.
	dumpBy, restoreBy way
	// started is the process as we started it; nil once it was restored.
	started *exec.Cmd
	// alive checks that it does its work; nil: that cannot be told.
	alive func(testing.TB)
	// writes are the files it writes to, which a restore must find as they
	// were at the dump.
	writes []string
	// restoreArgs are options that every restore of it needs, whatever its
	// connections.
	restoreArgs []string
}

// start starts a process that CRIU can dump: a session of its own, nothing
// open that comes from elsewhere.
func start(t testing.TB, u User, attr *syscall.SysProcAttr, name string, args ...string) *Process {
	t.Helper()
	p := &Process{User: u, dumpBy: wayOf(t), restoreBy: wayOf(t)}
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	attr.Setsid = true
	if u.UID != 0 {
		attr.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	p.PID, p.started = cmd.Process.Pid, cmd
	t.Cleanup(func() { p.Kill(t) })
	return p
}

// Kill ends the process and its session, and waits until they are gone.
func (p *Process) Kill(t testing.TB) {
	var threads []int
	for _, pid := range append(sessionOf(p.PID), p.PID) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
		for _, task := range tasks {
			tid, _ := strconv.Atoi(filepath.Base(task))
			threads = append(threads, tid)
		}
	}
	for _, pid := range sessionOf(p.PID) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = unix.Kill(p.PID, unix.SIGKILL)
	p.Gone(t)
	awaitFree(t, threads)
}

// awaitFree waits until the numbers of threads that have ended can be had anew,
// which may be later than their process is reaped.
func awaitFree(t testing.TB, tids []int) {
	t.Helper()
	eventually(t, fmt.Sprintf("the numbers of the threads %v are free", tids), func() bool {
		for _, tid := range tids {
			if !isFree(tid) {
				return false
			}
		}
		return true
	})
}

// Gone waits until the process has ended and is reaped: its pid is free.
func (p *Process) Gone(t testing.TB) {
	t.Helper()
	if p.started != nil {
		_ = p.started.Wait() // killed
		p.started = nil
	}
	eventually(t, fmt.Sprintf("the session of process %d is gone", p.PID), func() bool {
		return isFree(p.PID) && len(sessionOf(p.PID)) == 0
	})
}

// isFree reports whether a new process can have a pid. kill(2) does not tell:
// the number is given back a while after the process was reaped (release_task
// in kernel/exit.c). F_SETOWN looks the number up, not the process.
func isFree(pid int) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETOWN, pid)
	return errors.Is(err, unix.ESRCH)
}

// sessionOf lists the processes of a session, zombies too.
func sessionOf(sid int) []int {
	var out []int
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) > 3 && f[3] == strconv.Itoa(sid) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			out = append(out, pid)
		}
	}
	return out
}

// App is a running application (package app).
type App struct {
	*Process
	Control string
}

// startApp starts an application as u.
func startApp(t testing.TB, u User, attr *syscall.SysProcAttr) *App {
	t.Helper()
	return startAppAs(t, app.Role, u, attr)
}

func startAppAs(t testing.TB, role string, u User, attr *syscall.SysProcAttr) *App {
	t.Helper()
	// The test binary lies where only root can read.
	control := filepath.Join(folder(t), "control")
	a := &App{Process: start(t, u, attr, "/proc/self/exe", role, control), Control: control}
	a.alive = a.Awake
	a.Awake(t)
	return a
}

// Awake waits until the application answers.
func (a *App) Awake(t testing.TB) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err = a.Try(app.Command{Op: "ping"}); err == nil {
			return
		}
	}
	t.Fatalf("the application, process %d, does not answer: %v", a.PID, err)
}

// Child makes the application start a child that holds the connection too.
func (a *App) Child(t testing.TB, conn string) *App {
	t.Helper()
	control := filepath.Join(folder(t), "control")
	a.Do(t, app.Command{Op: "child", Conn: conn, As: control})
	c := &App{Process: &Process{User: a.User}, Control: control}
	c.Awake(t)
	return c
}

// Try asks the application; an answer with Err is an error.
func (a *App) Try(cmd app.Command) (app.Answer, error) {
	var ans app.Answer
	c, err := net.Dial("unix", a.Control)
	if err != nil {
		return ans, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return ans, err
	}
	if err := json.NewEncoder(c).Encode(cmd); err != nil {
		return ans, err
	}
	if err := json.NewDecoder(c).Decode(&ans); err != nil {
		return ans, fmt.Errorf("%s %s: no answer: %w", cmd.Op, cmd.Conn, err)
	}
	// Until it has closed its end, which a dump must not find: in a container CRIU
	// does not know it, as it was made in our network namespace.
	_, _ = io.Copy(io.Discard, c)
	if ans.Err != "" {
		return ans, errors.New(ans.Err)
	}
	return ans, nil
}

// Do asks the application and fails the test if that fails.
func (a *App) Do(t testing.TB, cmd app.Command) app.Answer {
	t.Helper()
	ans, err := a.Try(cmd)
	if err != nil {
		t.Fatalf("the application, process %d: %s %s: %v", a.PID, cmd.Op, cmd.Conn, err)
	}
	return ans
}

// Request makes one request on a connection.
func (a *App) Request(t testing.TB, conn string) {
	t.Helper()
	a.Do(t, app.Command{Op: "request", Conn: conn})
}

// Details asks the application how a connection looks from inside.
func (a *App) Details(t testing.TB, conn string) app.Details {
	t.Helper()
	return a.Do(t, app.Command{Op: "details", Conn: conn}).Conn
}

// ours lists the processes that run the binary under test, and who is traced.
func ours() (left []string, traced []string) {
	want, err := os.Stat(criuhook)
	if err != nil {
		return []string{err.Error()}, nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if exe, err := os.Stat(d + "/exe"); err == nil && os.SameFile(exe, want) {
			args, _ := os.ReadFile(d + "/cmdline")
			left = append(left, filepath.Base(d)+" "+strings.ReplaceAll(string(args), "\x00", " "))
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		tasks, _ := filepath.Glob(d + "/task/[0-9]*/status")
		for _, s := range tasks {
			b, _ := os.ReadFile(s)
			if _, rest, ok := strings.Cut(string(b), "\nTracerPid:\t"); ok && !strings.HasPrefix(rest, "0\n") {
				traced = append(traced, s)
			}
		}
	}
	return left, traced
}

// noCRIULeft checks that every CRIU has ended. One that has not is killed, for
// the tests that follow.
func noCRIULeft(t testing.TB) {
	t.Helper()
	var left []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		left = nil
		for _, pid := range running("criu") {
			args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			left = append(left, fmt.Sprintf("%d %s %s", pid, stateOf(pid), strings.ReplaceAll(string(args), "\x00", " ")))
		}
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("CRIU is left running: %q", left)
	for _, pid := range running("criu") {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// nothingLeft checks that no process of ours lives on and nobody is traced.
func nothingLeft(t testing.TB) {
	t.Helper()
	var left, traced []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if left, traced = ours(); len(left)+len(traced) == 0 {
			return
		}
	}
	t.Errorf("left running: %v; traced: %v", left, traced)
}
