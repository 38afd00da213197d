// SPDX-License-Identifier: Apache-2.0

package child

import (
	"errors"
	"fmt"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Orphan starts a program as nobody's child, in a session of its own, and
// returns its pid once it runs: it is init's to wait for, or the nearest
// subreaper's. Its descriptors are fds, in that order, -1 being none, and no
// others. Signals that we ignore it ignores. Its soft RLIMIT_NOFILE is ours,
// which Go raises when it starts.
func Orphan(path string, argv, env []string, fds []int) (pid int, err error) {
	return started(path)(orphan(0, nil, path, argv, env, fds))
}

// OrphanBehind is [Orphan], but returns as soon as the process exists, which
// executes the program when the gate lets it through, and tells nobody if that
// fails. Its pid is above least, if one is free soon after it and we may choose
// (see [Program.Run]), else any.
func OrphanBehind(g Gate, least int, path string, argv, env []string, fds []int) (pid int, err error) {
	at, err := g.prepare()
	if err != nil {
		return 0, fmt.Errorf("start %s in the background: %w", path, err)
	}
	for i := 1; i <= manyTaken; i++ {
		res, err := orphan(least+i, at, path, argv, env, fds)
		var failed *CallError
		if !errors.As(err, &failed) || failed.Nr != unix.SYS_CLONE3 {
			return started(path)(res, err)
		}
		if failed.Errno != unix.EEXIST {
			break // we may not, or there are no such pids
		}
	}
	return started(path)(orphan(0, at, path, argv, env, fds))
}

// manyTaken is after how many pids that are taken none is chosen.
const manyTaken = 256

func started(path string) func(result, error) (int, error) {
	return func(res result, err error) (int, error) {
		if err != nil {
			return 0, fmt.Errorf("start %s in the background: %w", path, err)
		}
		return int(res.pid), nil
	}
}

func orphan(pid int, at *gate, path string, argv, env []string, fds []int) (result, error) {
	var p Program
	file, err := p.String(path)
	if err != nil {
		return result{}, err
	}
	args, err := p.strings(argv)
	if err != nil {
		return result{}, err
	}
	envs, err := p.strings(env)
	if err != nil {
		return result{}, err
	}
	// By the child in between, which tells if it fails.
	if err := p.place(fds); err != nil {
		return result{}, err
	}
	clone := &cloneArgs{}
	if at == nil {
		// vfork: the child in between ends when the program runs, or could not be
		// started. Without CLONE_VM nothing but that wait is shared.
		clone.flags = unix.CLONE_VFORK
	}
	if pid != 0 {
		tid := new(int32)
		*tid = int32(pid)
		clone.setTID, clone.setTIDSize = uint64(p.Pointer(unsafe.Pointer(tid))), 1
	}
	p.Call(unix.SYS_CLONE3, Args{p.Pointer(unsafe.Pointer(clone)), unsafe.Sizeof(*clone)})
	// By the orphan: as the number of a session the pid of the child in between
	// would stay in use.
	p.Call(unix.SYS_SETSID, Args{})
	if at != nil {
		p.calls = append(p.calls, call{gate: at})
	}
	exec := p.Call(unix.SYS_EXECVE, Args{file, args, envs})
	res, err := p.run(0)
	var failed *CallError
	if errors.As(err, &failed) {
		what := "prepare its process: %w"
		if failed.Index == exec {
			what = "execve: %w"
		}
		err = fmt.Errorf(what, err)
	}
	return res, err
}

// strings makes an argument of what execve wants: an array that ends with nil.
func (p *Program) strings(list []string) (uintptr, error) {
	ptrs := make([]*byte, len(list)+1)
	for i, s := range list {
		b, err := unix.BytePtrFromString(s)
		if err != nil {
			return 0, fmt.Errorf("%q: %w", s, err)
		}
		ptrs[i] = b
	}
	return p.Pointer(unsafe.Pointer(&ptrs[0])), nil
}

// place makes fds the only descriptors, from 0 on.
func (p *Program) place(fds []int) error {
	// First above all of them: none is overwritten before it has its place.
	above := len(fds)
	for i, fd := range fds {
		if fd < -1 {
			return fmt.Errorf("descriptor %d is to be %d: %w", i, fd, unix.EBADF)
		}
		above = max(above, fd+1)
	}
	for i, fd := range fds {
		if fd >= 0 && fd != i {
			p.Call(unix.SYS_DUP3, Args{uintptr(fd), uintptr(above + i), unix.O_CLOEXEC})
		}
	}
	for i, fd := range fds {
		switch fd {
		case -1:
			p.Call(unix.SYS_CLOSE_RANGE, Args{uintptr(i), uintptr(i)})
		case i:
			// To duplicate it onto itself would keep close-on-exec.
			p.Call(unix.SYS_FCNTL, Args{uintptr(i), unix.F_SETFD, 0})
		default:
			p.Call(unix.SYS_DUP3, Args{uintptr(above + i), uintptr(i)})
		}
	}
	p.Call(unix.SYS_CLOSE_RANGE, Args{uintptr(len(fds)), math.MaxUint32})
	return nil
}
