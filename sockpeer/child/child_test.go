// SPDX-License-Identifier: Apache-2.0

package child_test

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer/child"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// noChildren fails the test if a child is left.
func noChildren(t *testing.T) {
	t.Helper()
	if pid, err := unix.Wait4(-1, nil, unix.WALL|unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("a child is left: %d, %v", pid, err)
	}
}

func memfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.MemfdCreate("child", unix.MFD_CLOEXEC)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func content(t *testing.T, fd int) string {
	t.Helper()
	b := make([]byte, 1<<16)
	n, err := unix.Pread(fd, b, 0)
	check(t, err)
	return string(b[:n])
}

// write adds a write(2).
func write(p *child.Program, fd int, s string) int {
	b := []byte(s)
	return p.Call(unix.SYS_WRITE, child.Args{uintptr(fd), p.Pointer(unsafe.Pointer(&b[0])), uintptr(len(b))})
}

func TestRun(t *testing.T) {
	fd := memfd(t)
	var p child.Program
	check(t, p.Run(0)) // of nothing
	write(&p, fd, "one ")
	write(&p, fd, "two")
	check(t, p.Run(0))
	if got := content(t, fd); got != "one two" {
		t.Errorf("the child wrote %q", got)
	}
	check(t, p.Run(0)) // again
	if got := content(t, fd); got != "one twoone two" {
		t.Errorf("the children wrote %q", got)
	}
	noChildren(t)
}

func TestRunStopsAtAnError(t *testing.T) {
	fd := memfd(t)
	var p child.Program
	write(&p, fd, "before")
	bad := p.Call(unix.SYS_CLOSE, child.Args{^uintptr(0)})
	write(&p, fd, "after")
	err := p.Run(0)
	var failed *child.CallError
	if !errors.As(err, &failed) || failed.Index != bad || failed.Nr != unix.SYS_CLOSE || !errors.Is(err, unix.EBADF) || errors.Is(err, child.ErrNotStarted) {
		t.Errorf("%v", err)
	}
	if got := content(t, fd); got != "before" {
		t.Errorf("the child wrote %q", got)
	}
	noChildren(t)
}

func TestRunKilled(t *testing.T) {
	fd := memfd(t)
	var p child.Program
	p.Call(unix.SYS_SETSID, child.Args{}) // kill(0) is to reach nobody else
	p.Call(unix.SYS_KILL, child.Args{0, uintptr(unix.SIGTERM)})
	write(&p, fd, "not by SIGTERM")
	p.Call(unix.SYS_KILL, child.Args{0, uintptr(unix.SIGKILL)})
	write(&p, fd, "by SIGKILL")
	err := p.Run(0)
	if err == nil || errors.Is(err, child.ErrNotStarted) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v", err)
	}
	if got := content(t, fd); got != "not by SIGTERM" {
		t.Errorf("the child wrote %q", got)
	}
	noChildren(t)
}

func TestRunIsQuiet(t *testing.T) {
	// The runtime hands signals over in the order of their numbers.
	got := make(chan os.Signal, 8)
	signal.Notify(got, unix.SIGCHLD, unix.SIGWINCH)
	defer signal.Stop(got)
	var p child.Program
	check(t, p.Run(0))
	check(t, unix.Kill(os.Getpid(), unix.SIGWINCH))
	if s := <-got; s != unix.SIGWINCH {
		t.Errorf("the child sent %v", s)
	}
}

func TestRunPID(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: to choose a pid takes a capability")
	}
	free := 30001
	for ; unix.Kill(free, 0) != unix.ESRCH; free++ {
	}
	var p child.Program
	p.Call(unix.SYS_SETSID, child.Args{})
	p.Call(unix.SYS_KILL, child.Args{uintptr(-free), 0}) // its process group
	check(t, p.Run(free))
	check(t, p.Run(free)) // it is free again
	if err := p.Run(0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("another pid: %v", err)
	}
	for _, c := range []struct {
		pid   int
		err   error
		taken bool
	}{
		{os.Getpid(), child.ErrPIDTaken, true},
		{1, child.ErrPIDTaken, true},
		{-1, unix.EINVAL, false},
		{1 << 30, unix.EINVAL, false},
	} {
		err := p.Run(c.pid)
		if !errors.Is(err, child.ErrNotStarted) || !errors.Is(err, c.err) || errors.Is(err, child.ErrPIDTaken) != c.taken {
			t.Errorf("pid %d: %v", c.pid, err)
		}
	}
	noChildren(t)
}

func TestRunInBusyProgram(t *testing.T) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	for i := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if i == 0 && n%64 == 0 {
					runtime.GC() // stops the world, and preempts by signals
				}
				grow(64)
			}
		})
	}
	const workers, each = 4, 250
	var pipe [2]int
	check(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK)) // it holds 64 KiB
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	var runs sync.WaitGroup
	for range workers {
		runs.Go(func() {
			for range each {
				var p child.Program
				write(&p, pipe[1], "x")
				if err := p.Run(0); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	runs.Wait()
	b := make([]byte, 2*workers*each)
	if n, err := unix.Read(pipe[0], b); n != workers*each {
		t.Errorf("%d children wrote %d bytes, %v", workers*each, n, err)
	}
	noChildren(t)
}

// grow makes a stack grow, and garbage.
//
//go:noinline
func grow(depth int) int {
	var b [128]byte
	if depth == 0 {
		return 0
	}
	b[depth] = byte(depth)
	return len(make([]byte, depth*16)) + grow(depth-1) + int(b[depth])
}

func BenchmarkRun(b *testing.B) {
	for b.Loop() {
		var p child.Program
		p.Call(unix.SYS_GETPID, child.Args{})
		if err := p.Run(0); err != nil {
			b.Fatal(err)
		}
	}
}

// TestRunTakesTurns: of several that want the same pid at once, each gets it.
func TestRunTakesTurns(t *testing.T) {
	const pid = 1 << 20 // hardly in use
	if err := new(child.Program).Run(pid); err != nil {
		t.Skipf("cannot choose a pid here: %v", err)
	}
	errs := make([]error, 50)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			leave := child.Turn(t.Context(), pid)
			defer leave()
			errs[i] = new(child.Program).Run(pid)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	defer child.Turn(t.Context(), pid)()
	late, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if child.Turn(late, pid) != nil {
		t.Error("two have the turn")
	}
}
