// SPDX-License-Identifier: Apache-2.0

package dropin_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/dropin"
)

const (
	// releaseApp makes this binary the application: it has a socket and a sealed
	// memfd, shared with its children. All close the socket at SIGUSR1.
	releaseApp      = "DROPIN_TEST_RELEASE_APP"
	releasePatience = 20 * time.Second
)

func init() {
	addr, is := os.LookupEnv(releaseApp)
	if !is {
		return
	}
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, unix.SIGUSR1)
	if err := releaseAppRun(addr, sigs); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func releaseAppRun(addr string, sigs <-chan os.Signal) error {
	sock := 3
	if addr != "" {
		var err error
		if sock, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.Connect(sock, &unix.SockaddrUnix{Name: addr}); err != nil {
			return err
		}
		mem, err := unix.MemfdCreate("sealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			return err
		}
		if _, err := unix.FcntlInt(uintptr(mem), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
			return err
		}
		for range len(os.Args) - 1 {
			child := exec.Command("/proc/self/exe")
			child.Env = []string{releaseApp + "="}
			for _, fd := range []int{sock, mem} {
				dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					return err
				}
				f := os.NewFile(uintptr(dup), "")
				defer f.Close()
				child.ExtraFiles = append(child.ExtraFiles, f)
			}
			if err := child.Start(); err != nil {
				return err
			}
			for _, f := range child.ExtraFiles {
				f.Close()
			}
		}
	}
	if _, err := unix.Write(sock, []byte{1}); err != nil {
		return err
	}
	<-sigs
	unix.Close(sock)
	select {}
}

// releaseTree is a dumped tree of processes.
type releaseTree struct {
	t        *testing.T
	dir      string
	listener int
	addr     *unix.SockaddrUnix
	inode    uint64 // of the application's socket
	pids     []int  // the root first
	restores int    // so far
}

func (r *releaseTree) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(releasePatience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	r.t.Fatalf("waited %v for: %s\n%s", releasePatience, what, r.log(r.restoreLog()))
}

func (r *releaseTree) ok(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("%v\n%s", err, r.log(r.restoreLog()))
	}
}

func (r *releaseTree) log(name string) string {
	b, _ := os.ReadFile(filepath.Join(r.dir, name))
	return string(b)
}

func (r *releaseTree) restoreLog() string { return fmt.Sprintf("restore-%d.log", r.restores) }

func newReleaseTree(t *testing.T, children int) *releaseTree {
	t.Helper()
	if os.Getenv("CRIUHOOK_SANDBOX") != "1" || os.Getuid() != 0 {
		t.Skip("SKIP: runs a real CRIU, as root; use: go test -exec scripts/sandbox")
	}
	dir, err := os.MkdirTemp("/tmp", "release")
	r := &releaseTree{t: t, dir: dir, addr: &unix.SockaddrUnix{Name: dir + "/socket"}}
	r.ok(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	r.listener, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	r.ok(err)
	t.Cleanup(func() { unix.Close(r.listener) })
	r.ok(unix.Bind(r.listener, r.addr))
	r.ok(unix.Listen(r.listener, 8))

	app := exec.Command("/proc/self/exe", make([]string, children)...)
	app.Env = []string{releaseApp + "=" + r.addr.Name}
	app.Dir = "/"
	app.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	r.ok(app.Start())
	t.Cleanup(func() {
		_ = unix.Kill(-app.Process.Pid, unix.SIGKILL)
		_ = app.Wait()
	})
	conn := r.accept()
	defer unix.Close(conn)
	for n := 0; n < 1+children; {
		var b [8]byte
		k, err := unix.Read(conn, b[:])
		if r.ok(err); k == 0 {
			t.Fatal("the application has closed its socket")
		}
		n += k
	}
	r.pids = []int{app.Process.Pid}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", app.Process.Pid))
	r.ok(err)
	for _, file := range tasks {
		b, err := os.ReadFile(file)
		r.ok(err)
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			r.ok(err)
			r.pids = append(r.pids, pid)
		}
	}
	if r.inode = r.socket(r.pids[0]); r.inode == 0 || len(r.pids) != 1+children {
		t.Fatalf("socket %d of processes %d", r.inode, r.pids)
	}
	out, err := exec.Command("criu", "dump", "-t", strconv.Itoa(r.pids[0]), "-D", dir, "-o", "dump.log", "-v4",
		"--external", fmt.Sprintf("unix[%d]", r.inode)).CombinedOutput()
	if err != nil {
		t.Fatalf("dump: %v\n%s%s", err, out, r.log("dump.log"))
	}
	_ = app.Wait()
	return r
}

func (r *releaseTree) accept() int {
	r.t.Helper()
	conn, _, err := unix.Accept4(r.listener, unix.SOCK_CLOEXEC)
	r.ok(err)
	return conn
}

// socket is the inode of a process's socket; 0: it has none.
func (r *releaseTree) socket(pid int) (inode uint64) {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, f := range fds {
		if target, _ := os.Readlink(f); strings.HasPrefix(target, "socket:[") {
			_, _ = fmt.Sscanf(target, "socket:[%d]", &inode)
		}
	}
	return inode
}

// free reports whether all pids can be given again: F_SETOWN looks them up.
func (r *releaseTree) free() bool {
	for _, pid := range r.pids {
		if _, err := unix.FcntlInt(uintptr(r.listener), unix.F_SETOWN, pid); !errors.Is(err, unix.ESRCH) {
			return false
		}
	}
	return true
}

// releaseRestore is a restore under way.
type releaseRestore struct {
	*releaseTree
	cmd  *exec.Cmd
	conn int // the listener's end
}

func (r *releaseTree) restore(t *testing.T, args ...string) *releaseRestore {
	t.Helper()
	at := *r
	at.t = t
	at.restores++
	r.restores = at.restores
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	at.ok(err)
	f := os.NewFile(uintptr(sock), "inherited")
	defer f.Close()
	at.ok(unix.Connect(sock, r.addr))
	x := &releaseRestore{releaseTree: &at, conn: at.accept()}
	t.Cleanup(func() { unix.Close(x.conn) })
	// As with the drop-in, what CRIU is made of by exec has been there before.
	x.cmd = exec.Command("/bin/sh", append([]string{"-c", `exec "$@"`, "sh", "criu", "restore",
		"--inherit-fd", fmt.Sprintf("fd[3]:socket:[%d]", r.inode), "-D", r.dir, "-o", at.restoreLog(), "-v4"}, args...)...)
	x.cmd.ExtraFiles = []*os.File{f}
	at.ok(x.cmd.Start())
	return x
}

// release runs Release to its end.
func (x *releaseRestore) release() {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.t.Context(), releasePatience)
	defer cancel()
	x.ok(dropin.Release(ctx, x.cmd.Process.Pid))
}

// end kills what the restore made.
func (x *releaseRestore) end(sibling bool) {
	x.t.Helper()
	_ = unix.Kill(-x.pids[0], unix.SIGKILL)
	_ = x.cmd.Process.Kill()
	_ = x.cmd.Wait()
	if sibling {
		_, _ = unix.Wait4(x.pids[0], nil, 0, nil)
	}
	x.eventually("the pids are free", x.free)
}

func (x *releaseRestore) over() bool {
	return strings.Contains(x.log(x.restoreLog()), "Restore finished successfully")
}

// closeSocket makes the application close its socket.
func (x *releaseRestore) closeSocket() {
	x.t.Helper()
	x.eventually("the restore is over", x.over)
	for _, pid := range x.pids {
		if x.socket(pid) == 0 {
			x.t.Fatalf("process %d has no socket", pid)
		}
	}
	x.ok(unix.Kill(-x.pids[0], unix.SIGUSR1))
	for _, pid := range x.pids {
		x.eventually("the application has closed its socket", func() bool { return x.socket(pid) == 0 })
	}
}

// eof reports whether the listener's end has reached the end of the stream.
func (x *releaseRestore) eof(within time.Duration) bool {
	x.t.Helper()
	p := []unix.PollFd{{Fd: int32(x.conn), Events: unix.POLLIN}}
	for end := time.Now().Add(within); time.Now().Before(end); {
		if n, err := unix.Poll(p, int(within.Milliseconds())); err == nil && n > 0 {
			n, err := unix.Read(x.conn, make([]byte, 1))
			x.ok(err)
			return n == 0
		}
	}
	return false
}
