// SPDX-License-Identifier: Apache-2.0

package image

import (
	core_x86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
)

// Call is the system call in which a thread was at the dump, or from which it
// was just coming back: its registers do not always tell the two apart.
type Call struct {
	TID int `json:"tid"`
	// Known: the images tell. They do for 64-bit programs of amd64; on
	// arm64 the kernel forgets the number before it stops the thread.
	Known bool `json:"known"`
	// Nr is its number on amd64; -1: the thread was in none.
	Nr int `json:"nr"`
	// Name is set of a call that can wait for a socket.
	Name string `json:"name,omitempty"`
	// FD is the one fd that a call with a Name is about; -1: it may be
	// about several, which the registers do not tell.
	FD int `json:"fd"`
}

// MayWait reports whether the call may have waited on an fd of the thread.
func (c Call) MayWait(fd int) bool {
	return !c.Known || c.Name != "" && (c.FD < 0 || c.FD == fd)
}

// Calls tells for each thread of a process, a pid as in PIDs, in which system
// call it was.
func (s *Set) Calls(pid int) ([]Call, error) {
	t, err := s.task(pid)
	if err != nil {
		return nil, err
	}
	out := make([]Call, len(t.threads))
	for i, th := range t.threads {
		out[i] = th.call
	}
	return out, nil
}

// x32 marks the numbers of the x32 ABI (__X32_SYSCALL_BIT).
const x32 = 1 << 30

// callOf reads the registers as CRIU leaves them in the image: of a call that
// is to be restarted, ax is the number again, of any other its result, -EINTR
// for those that it cannot restart. In either case orig_ax stays the number,
// and it is negative for a thread that was in no call (compel_get_task_regs,
// compel/arch/x86/src/lib/infect.c). The arguments stay too.
func callOf(tid int, c *criu_core.CoreEntry) Call {
	out := Call{TID: tid, Nr: -1, FD: -1}
	regs := c.GetThreadInfo().GetGpregs()
	if c.GetMtype() != criu_core.CoreEntry_X86_64 || regs == nil || regs.GetMode() != core_x86.UserX86RegsMode_NATIVE {
		return out
	}
	nr := int64(regs.GetOrigAx())
	if nr >= x32 {
		return out
	}
	out.Known = true
	if nr < 0 {
		return out
	}
	out.Nr = int(nr)
	call, ok := waitCalls[out.Nr]
	if !ok {
		return out
	}
	out.Name = call.name
	// An fd is an int: the kernel ignores the upper half of the register.
	if fd := int32(regs.GetDi()); call.onFD && fd >= 0 {
		out.FD = int(fd)
	}
	return out
}

// waitCall is a system call in which a thread can wait for a socket.
type waitCall struct {
	name string
	onFD bool // the first argument is the one fd it is about
}

// waitCalls by their numbers on amd64 (arch/x86/entry/syscalls/syscall_64.tbl):
// those of the images, whatever this program was built for.
var waitCalls = map[int]waitCall{
	0:   {"read", true},
	1:   {"write", true},
	7:   {"poll", false},
	19:  {"readv", true},
	20:  {"writev", true},
	23:  {"select", false},
	40:  {"sendfile", false},
	42:  {"connect", true},
	44:  {"sendto", true},
	45:  {"recvfrom", true},
	46:  {"sendmsg", true},
	47:  {"recvmsg", true},
	208: {"io_getevents", false},
	219: {"restart_syscall", false},
	232: {"epoll_wait", false},
	270: {"pselect6", false},
	271: {"ppoll", false},
	275: {"splice", false},
	281: {"epoll_pwait", false},
	299: {"recvmmsg", true},
	307: {"sendmmsg", true},
	327: {"preadv2", true},
	328: {"pwritev2", true},
	333: {"io_pgetevents", false},
	426: {"io_uring_enter", false},
	441: {"epoll_pwait2", false},
}
