// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// program386 is a 32-bit program that makes read(3, stack, 1) for ever.
func program386() []byte {
	code := []byte{
		0xb8, 3, 0, 0, 0, // mov $3, %eax: read on i386, close on amd64
		0xbb, 3, 0, 0, 0, // mov $3, %ebx
		0x89, 0xe1, // mov %esp, %ecx
		0xba, 1, 0, 0, 0, // mov $1, %edx
		0xcd, 0x80, // int $0x80
		0xeb, 0xeb, // jmp to the begin
	}
	const base, headers = 0x08048000, 52 + 32
	var b bytes.Buffer
	b.WriteString("\x7fELF\x01\x01\x01" + strings.Repeat("\x00", 9)) // 32 bits, little-endian
	for _, v := range []any{
		uint16(2), uint16(3), uint32(1), // ET_EXEC, EM_386
		uint32(base + headers), uint32(52), uint32(0), uint32(0), // entry, program headers
		uint16(52), uint16(32), uint16(1), uint16(0), uint16(0), uint16(0),
		// PT_LOAD, readable and executable
		uint32(1), uint32(0), uint32(base), uint32(base), uint32(headers + len(code)), uint32(headers + len(code)), uint32(5), uint32(4096),
	} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.Write(code)
	return b.Bytes()
}

// TestScanCompat: the numbers of a 32-bit program's system calls are others.
func TestScanCompat(t *testing.T) {
	needRoot(t)
	noLeak(t)
	exe := filepath.Join(t.TempDir(), "read386")
	check(t, os.WriteFile(exe, program386(), 0o755))
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	pid, err := syscall.ForkExec(exe, []string{exe}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2, uintptr(a)}})
	unix.Close(a)
	if errors.Is(err, unix.ENOEXEC) {
		t.Skip("this kernel runs no 32-bit programs")
	}
	check(t, err)
	t.Cleanup(func() {
		unix.Kill(pid, unix.SIGKILL)
		unix.Wait4(pid, nil, 0, nil)
	})
	var c sockpeer.Connection
	eventually(t, "the thread may wait", func() bool {
		c = only(t, pid)
		return len(c.Waiters) > 0
	})
	w := c.Waiters[0]
	if len(c.Waiters) != 1 || w.PID != pid || w.TID != pid || w.FD != 3 || !strings.Contains(c.Busy(), "may wait on fd 3, in a system call of a 32-bit program") {
		t.Errorf("%q: %+v", c.Busy(), c.Waiters)
	}
	check(t, unix.Kill(pid, unix.SIGSTOP))
	eventually(t, "the thread is stopped", func() bool { return procState(pid) == "T" })
	if c := only(t, pid); len(c.Waiters) != 1 || c.Waiters[0] != w {
		t.Errorf("stopped: %+v", c.Waiters)
	}
}
