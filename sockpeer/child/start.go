// SPDX-License-Identifier: Apache-2.0

package child

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cloneArgs is struct clone_args of the kernel's include/uapi/linux/sched.h.
type cloneArgs struct {
	flags      uint64
	pidFD      uint64
	childTID   uint64
	parentTID  uint64
	exitSignal uint64
	stack      uint64
	stackSize  uint64
	tls        uint64
	setTID     uint64
	setTIDSize uint64
}

// sigSetmask is SIG_SETMASK, and sigsetSize the size of a signal set, of the
// kernel's include/uapi/asm-generic, which amd64 and arm64 have.
const (
	sigSetmask = 2
	sigsetSize = 8
)

// start makes a child, which makes the calls and ends: it never returns there.
//
// In the child nothing of the Go runtime works: there are no other threads, and
// locks may be held for ever by those that were. So, as in the syscall package's
// forkAndExecInChild1, nothing is allocated after clone3, nothing but assembler,
// RawSyscall6 and gate.pass is called, which are nosplit (a stack check can end
// in the scheduler), no pointer is written, and no instrumentation is wanted. Signals,
// by which the runtime preempts, are blocked from before.
//
//go:noinline
//go:nosplit
//go:norace
//go:nocheckptr
func start(args *cloneArgs, calls []call, res *result) (pid uintptr, errno syscall.Errno) {
	var (
		all = ^uint64(0)
		old uint64
		r   uintptr
		c   *call
	)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), sigsetSize, 0, 0)
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&old)), 0, sigsetSize, 0, 0)
		return pid, errno
	}

	// The child.
	for i := range calls {
		c = &calls[i]
		res.at = int32(i)
		if c.gate != nil {
			if !c.gate.pass() {
				break
			}
			continue
		}
		if c.nr == unix.SYS_EXECVE || c.nr == unix.SYS_EXECVEAT {
			syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&old)), 0, sigsetSize, 0, 0)
		}
		r, _, errno = syscall.RawSyscall6(c.nr, c.args[0], c.args[1], c.args[2], c.args[3], c.args[4], c.args[5])
		if errno != 0 {
			res.errno = int32(errno)
			break
		}
		if c.nr == unix.SYS_CLONE3 && r != 0 {
			res.pid = int32(r)
			break
		}
	}
	for {
		syscall.RawSyscall6(unix.SYS_EXIT_GROUP, 0, 0, 0, 0, 0, 0)
	}
}
