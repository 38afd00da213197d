// SPDX-License-Identifier: Apache-2.0

// Package child runs a child process that makes a list of system calls, and
// nothing else: a fork of a Go program must not run Go code. It is for what
// only a process of its own can do, such as having a certain pid, and takes
// less than a millisecond.
package child

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of [Program.Run].
var (
	// ErrNotStarted: there was no child, and no call was made.
	ErrNotStarted = errors.New("no child process could be started")
	// ErrPIDTaken: a process, thread, process group or session has the pid.
	// It comes with ErrNotStarted.
	ErrPIDTaken = errors.New("the pid is taken")
)

// CallError is a system call of a child that failed.
type CallError struct {
	Index int     // what Call returned
	Nr    uintptr // the system call's number
	Errno syscall.Errno
}

func (e *CallError) Error() string {
	return fmt.Sprintf("system call %d, number %d of a child process: %v", e.Nr, e.Index+1, e.Errno)
}

func (e *CallError) Unwrap() error { return e.Errno }

// Args are the arguments of a system call; the last ones may be of no use.
type Args = [6]uintptr

type call struct {
	nr   uintptr
	args Args
	gate *gate // to wait at instead, if there is one
}

// Program is a list of system calls. Those that return something of use, other
// than an error, are not for it, with two exceptions:
//   - before execve and execveat the signal mask becomes the caller's; Run then
//     waits for the program, and does not tell how it ended;
//   - after clone3 the new process goes on with the list, and the child ends.
//     CLONE_VFORK makes Run wait until the new one has ended or executes a program;
//     else how the new one does is not told.
type Program struct {
	calls []call
	keep  []unsafe.Pointer
}

// Call adds a system call and returns its place in the list.
func (p *Program) Call(nr uintptr, args Args) int {
	p.calls = append(p.calls, call{nr: nr, args: args})
	return len(p.calls) - 1
}

// Pointer makes a pointer an argument. What it points to lives as long as p and
// does not move; the child has a copy, from when Run is called.
func (p *Program) Pointer(v unsafe.Pointer) uintptr {
	// Kept on the heap, v must point there: stacks move.
	p.keep = append(p.keep, v)
	return uintptr(v)
}

// String makes a string an argument, NUL-terminated.
func (p *Program) String(s string) (uintptr, error) {
	b, err := unix.BytePtrFromString(s)
	if err != nil {
		return 0, fmt.Errorf("%q: %w", s, err)
	}
	return p.Pointer(unsafe.Pointer(b)), nil
}

// result is where a child tells how far it got: in memory that it shares.
type result struct {
	at    int32 // the call that was begun last
	errno int32 // its error; 0: none
	pid   int32 // what clone3 returned, if one is in the list, else the child's
}

// Run makes the calls in a child process, one after the other up to the first
// that fails, and waits for the child's end. The error is a [CallError] then, or
// [ErrNotStarted]. If pid is not 0, it is the child's in the pid namespace that
// children of ours come into; that takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN
// (clone3(2), set_tid).
//
// The child begins with a copy of the memory and the descriptors, and with the
// identity and the namespaces of the calling thread. All signals are blocked in
// it, and their handlers are the default ones. Its end sends no signal, and only
// wait calls with __WALL see it. Several of one pid are for [Turn].
func (p *Program) Run(pid int) error {
	_, err := p.run(pid)
	return err
}

// Next is the pid that the kernel has given to a new process, which has ended
// again: the next process or thread gets one after it (pid_namespaces(7)), and
// this one is free. It takes less than a millisecond, and no thread.
func Next() (pid int, err error) {
	res, err := new(Program).run(0)
	return int(res.pid), err
}

// turns has, for each pid that was asked for, a channel that holds one token.
var turns sync.Map

// Turn waits until no other child of ours has the pid, or until ctx ends, and
// returns how to give the turn back; nil: it was not had.
func Turn(ctx context.Context, pid int) (leave func()) {
	v, _ := turns.LoadOrStore(pid, make(chan struct{}, 1))
	turn := v.(chan struct{})
	select {
	case turn <- struct{}{}:
		return func() { <-turn }
	case <-ctx.Done():
		return nil
	}
}

func (p *Program) run(pid int) (result, error) {
	// Page-sized, shared with the child: other memory it gets a copy of.
	shared, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return result{}, fmt.Errorf("%w: map memory to share with it: %w", ErrNotStarted, err)
	}
	defer unix.Munmap(shared)
	res := (*result)(unsafe.Pointer(&shared[0]))

	args := cloneArgs{flags: unix.CLONE_CLEAR_SIGHAND}
	tid := new(int32)
	if *tid = int32(pid); pid != 0 {
		args.setTID = uint64(p.Pointer(unsafe.Pointer(tid)))
		args.setTIDSize = 1
	}
	runtime.LockOSThread() // its signal mask is changed
	got, errno := start(&args, p.calls, res)
	runtime.UnlockOSThread()
	if errno != 0 {
		return result{}, startError(pid, errno)
	}
	err = p.wait(int(got), res)
	runtime.KeepAlive(p)
	all := *res
	if all.pid == 0 {
		all.pid = int32(got)
	}
	return all, err
}

func startError(pid int, errno syscall.Errno) error {
	switch {
	case pid == 0:
		return fmt.Errorf("%w: clone3: %w", ErrNotStarted, errno)
	case errno == unix.EEXIST:
		return fmt.Errorf("%w as pid %d: %w", ErrNotStarted, pid, ErrPIDTaken)
	}
	return fmt.Errorf("%w as pid %d: clone3: %w", ErrNotStarted, pid, errno)
}

func (p *Program) wait(pid int, res *result) error {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, unix.WALL, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return fmt.Errorf("wait for child process %d: %w", pid, err)
		}
	}
	switch {
	case res.pid != 0 && p.gated():
		return nil // what the rest of it does is the new process's own business
	case res.errno != 0:
		return &CallError{Index: int(res.at), Nr: p.calls[res.at].nr, Errno: syscall.Errno(res.errno)}
	case ws.Signaled():
		return fmt.Errorf("child process %d was killed by signal %d (%v) in its system call number %d", pid, int(ws.Signal()), ws.Signal(), res.at+1)
	case int(res.at) != len(p.calls)-1 && len(p.calls) > 0:
		return fmt.Errorf("child process %d ended early, in its system call number %d", pid, res.at+1)
	}
	return nil
}

func (p *Program) gated() bool {
	return slices.ContainsFunc(p.calls, func(c call) bool { return c.gate != nil })
}
