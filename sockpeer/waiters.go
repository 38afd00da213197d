// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// waitKind says where a blocking system call keeps the fds it waits on.
type waitKind uint8

const (
	waitFD     waitKind = iota // first argument
	waitPoll                   // struct pollfd array, count
	waitSelect                 // count, three bit sets
	waitEpoll                  // first argument is an epoll fd
	// waitRestart: the call was interrupted and goes on as
	// restart_syscall(2), with the arguments of what it was: poll is the
	// only one among those that can wait for a socket.
	waitRestart
)

type waitCall struct {
	name string
	kind waitKind
}

// bounds on what is read of a task's memory
const (
	maxPollFDs    = 65536
	maxRestartFDs = 64 // more is rather a futex' operation than a count
	pollfdSize    = 8
)

// waitTable is an fd table, made ready to ask what threads wait for.
type waitTable struct {
	fdTable
	targets map[uint32]bool // inodes of all connections of the scan
	fds     map[uint32]int  // those in this table, with their lowest fd

	read           map[int]watched // by epoll fd
	auxvRead, is32 bool
}

// newWaitTable returns nil for a table whose threads cannot wait for any of the
// connections.
func newWaitTable(t fdTable, targets map[uint32]bool) *waitTable {
	w := &waitTable{fdTable: t, targets: targets, fds: map[uint32]int{}, read: map[int]watched{}}
	for fd, ino := range t.sockets {
		if !targets[ino] {
			continue
		}
		if low, ok := w.fds[ino]; !ok || fd < low {
			w.fds[ino] = fd
		}
	}
	// What an epoll instance watches can be open elsewhere only.
	if len(w.fds) == 0 && !slices.Contains(slices.Collect(maps.Values(t.anon)), true) {
		return nil
	}
	return w
}

// waits returns which connections, by inode, a thread of the table is blocked
// on. before is what [Calls] noted of the thread.
func (t *waitTable) waits(tid int, before string) map[uint32]Waiter {
	b, err := os.ReadFile(procPath(t.pid, "task", strconv.Itoa(tid), "syscall"))
	if err != nil {
		return nil // gone
	}
	text, unknown := blockedIn(tid, string(b), before)
	if unknown {
		return t.waiters(tid, unknownCall, t.fds)
	}
	nr, args, ok := parseSyscall(text)
	if hidden := hidesCalls && strings.HasPrefix(string(b), "-1 "); (ok || hidden) && t.compat(tid) {
		return t.waiters(tid, compatCall, t.fds)
	}
	if !ok {
		return nil
	}
	call, ok := waitCalls[nr]
	if !ok {
		return nil
	}
	var fds []int
	switch call.kind {
	case waitFD, waitEpoll:
		fds = []int{int(int32(args[0]))}
	case waitPoll, waitRestart:
		limit := uint64(maxPollFDs)
		if call.kind == waitRestart {
			limit = maxRestartFDs
		}
		if args[1] == 0 || args[1] > limit {
			return nil
		}
		fds = pollFDs(readMemory(tid, args[0], int(args[1])*pollfdSize))
	case waitSelect:
		fds = selectFDs(tid, args)
	}
	return t.waiters(tid, call.name, t.reach(fds))
}

// waiters makes a waiter of each connection and its fd.
func (t *waitTable) waiters(tid int, call string, fds map[uint32]int) map[uint32]Waiter {
	out := make(map[uint32]Waiter, len(fds))
	for ino, fd := range fds {
		out[ino] = Waiter{PID: t.pid, TID: tid, FD: fd, Syscall: call}
	}
	return out
}

// parseSyscall reads /proc/PID/task/TID/syscall (proc(5)): number, six
// arguments, stack pointer, program counter; "running", or "-1 …" outside of
// system calls.
func parseSyscall(s string) (nr int, args [6]uint64, ok bool) {
	f := strings.Fields(s)
	if len(f) < 7 {
		return 0, args, false
	}
	nr, err := strconv.Atoi(f[0])
	if err != nil || nr < 0 {
		return 0, args, false
	}
	for i := range args {
		v, err := strconv.ParseUint(strings.TrimPrefix(f[i+1], "0x"), 16, 64)
		if err != nil {
			return 0, args, false
		}
		args[i] = v
	}
	return nr, args, true
}

// pollFDs returns the fds of a struct pollfd array that wait for something.
func pollFDs(b []byte) []int {
	const known = 0x3fff // all of include/uapi/asm-generic/poll.h
	var out []int
	for ; len(b) >= pollfdSize; b = b[pollfdSize:] {
		fd := int(int32(binary.NativeEndian.Uint32(b)))
		events := binary.NativeEndian.Uint16(b[4:])
		if fd >= 0 && events != 0 && events&^known == 0 {
			out = append(out, fd)
		}
	}
	return out
}

// selectFDs returns the fds in the read, write and exception sets.
func selectFDs(tid int, args [6]uint64) []int {
	n := int(int32(args[0]))
	if n <= 0 || n > maxPollFDs {
		return nil
	}
	const word = 64 // fd_set is an array of long
	size := (n + word - 1) / word * (word / 8)
	set := make([]byte, size)
	for _, addr := range args[1:4] {
		if addr == 0 {
			continue
		}
		for i, b := range readMemory(tid, addr, size) {
			set[i] |= b
		}
	}
	var out []int
	for i := 0; i+8 <= len(set); i += 8 {
		w := binary.NativeEndian.Uint64(set[i:])
		for bit := range word {
			if w&(1<<bit) != 0 && i*8+bit < n {
				out = append(out, i*8+bit)
			}
		}
	}
	return out
}

// readMemory reads up to n bytes of a task's memory; fewer if it is not
// mapped.
func readMemory(tid int, addr uint64, n int) []byte {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, n)
	got, _ := f.ReadAt(b, int64(addr))
	return b[:max(got, 0)]
}
