// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"encoding/binary"
	"os"
	"strconv"
	"strings"
)

// Calls are the system calls in which threads were just before they were
// stopped. Some architectures cannot tell afterwards (see hidesCalls); on all
// others it stays empty.
type Calls map[int]string // by thread: /proc/TID/syscall

// Note notes the call of a thread that is about to be stopped.
func (c Calls) Note(tid int) {
	if !hidesCalls {
		return
	}
	if b, err := os.ReadFile("/proc/" + strconv.Itoa(tid) + "/syscall"); err == nil {
		c[tid] = string(b)
	}
}

// unknownCall is the name of a call that may wait for any socket.
const unknownCall = "a system call that the kernel does not tell"

// svc is the instruction by which arm64 enters the kernel.
const svc = 0xd4000001

// interrupted finds the call of a stopped thread that shows none. now and
// before are its /proc/TID/syscall, stopped and just before; at reads an
// instruction. It returns the text that tells the call; unknown: there is a
// call, and nothing tells which. Both empty: there is none.
//
// arm64 forgets the number before it stops the thread, and sets the program
// counter back to the instruction if the call is to be restarted (do_signal,
// arch/arm64/kernel/signal.c). A thread that stands elsewhere, or on another
// stack, made that call since.
func interrupted(now, before string, at func(addr uint64) uint32) (call string, unknown bool) {
	sp, pc, ok := place(now, 3)
	if !ok || at(pc) != svc && at(pc-4) != svc {
		return "", false
	}
	if bsp, bpc, ok := place(before, 9); ok && bsp == sp && (bpc == pc || bpc == pc+4) {
		return before, false
	}
	return "", true
}

// place reads stack pointer and program counter, the last two of n words.
func place(s string, n int) (sp, pc uint64, ok bool) {
	f := strings.Fields(s)
	if len(f) != n {
		return 0, 0, false
	}
	sp, err1 := strconv.ParseUint(strings.TrimPrefix(f[n-2], "0x"), 16, 64)
	pc, err2 := strconv.ParseUint(strings.TrimPrefix(f[n-1], "0x"), 16, 64)
	return sp, pc, err1 == nil && err2 == nil
}

// blockedIn returns what tells the call that a thread is in, and whether there
// may be one that nothing tells.
func blockedIn(tid int, now, before string) (call string, unknown bool) {
	if !hidesCalls || !strings.HasPrefix(now, "-1 ") {
		return now, false
	}
	return interrupted(now, before, func(addr uint64) uint32 {
		b := readMemory(tid, addr, 4)
		if len(b) < 4 {
			return 0
		}
		return binary.LittleEndian.Uint32(b) // instructions always are
	})
}
