// SPDX-License-Identifier: Apache-2.0

package interpose

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// op values of struct ptrace_syscall_info (ptrace(2)).
const (
	opEntry = 1
	opExit  = 2

	syscallInfoLen = 88
)

type syscallStop struct {
	op   uint8
	nr   uint64    // at an entry
	args [6]uint64 // at an entry
	rval int64     // at an exit; negative: an errno
}

// ptrace is ptrace(2) with the arguments of the kernel; x/sys wraps only some
// requests.
func ptrace(req, pid int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(pid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// syscallInfo is PTRACE_GET_SYSCALL_INFO: the same on every architecture.
func syscallInfo(pid int) (syscallStop, error) {
	var b [syscallInfoLen]byte
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(pid),
		uintptr(len(b)), uintptr(unsafe.Pointer(&b[0])), 0, 0)
	if errno != 0 {
		return syscallStop{}, errno
	}
	// op u8, 3 bytes padding, arch u32, ip u64, sp u64, then the union
	s := syscallStop{op: b[0]}
	switch s.op {
	case opEntry:
		s.nr = binary.NativeEndian.Uint64(b[24:])
		for i := range s.args {
			s.args[i] = binary.NativeEndian.Uint64(b[32+8*i:])
		}
	case opExit:
		s.rval = int64(binary.NativeEndian.Uint64(b[24:]))
	}
	return s, nil
}
