// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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

// socketWaits returns which fds of one thread's table the thread is blocked
// on, with the name of the system call. sockets maps fds to inodes; before is what
// [Calls] noted of the thread.
func socketWaits(pid, tid int, sockets map[int]uint32, before string) []Waiter {
	b, err := os.ReadFile(procPath(pid, "task", strconv.Itoa(tid), "syscall"))
	if err != nil {
		return nil // gone
	}
	text, unknown := blockedIn(tid, string(b), before)
	if unknown {
		return waitsForAny(pid, tid, sockets)
	}
	nr, args, ok := parseSyscall(text)
	if !ok {
		return nil
	}
	call, ok := waitCalls[nr]
	if !ok {
		return nil
	}
	var fds []int
	switch call.kind {
	case waitFD:
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
	case waitEpoll:
		f, err := os.Open(procPath(pid, "task", strconv.Itoa(tid), "fdinfo", strconv.Itoa(int(int32(args[0])))))
		if err != nil {
			return nil
		}
		defer f.Close()
		fds = parseEpollFDs(f, sockets)
	}
	var out []Waiter
	for _, fd := range fds {
		if _, ok := sockets[fd]; ok {
			out = append(out, Waiter{PID: pid, TID: tid, FD: fd, Syscall: call.name})
		}
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

// parseEpollFDs reads the sockets that an epoll fd watches for input or
// output from /proc/PID/fdinfo/EPFD (proc(5)).
func parseEpollFDs(r io.Reader, sockets map[int]uint32) []int {
	var out []int
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		line := sc.Text()
		if !strings.HasPrefix(line, "tfd:") {
			continue
		}
		// "tfd:        5 events:       1d data: … pos:0 ino:3f1c sdev:8"
		fields := map[string]string{}
		f := strings.Fields(strings.ReplaceAll(line, ":", ": "))
		for i := 0; i+1 < len(f); i += 2 {
			fields[f[i]] = f[i+1]
		}
		fd, err := strconv.Atoi(fields["tfd:"])
		if err != nil {
			continue
		}
		events, err := strconv.ParseUint(fields["events:"], 16, 64)
		if err != nil || events&(unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDNORM|unix.EPOLLRDHUP|unix.EPOLLPRI) == 0 {
			continue
		}
		// A closed fd stays registered while a duplicate lives; its number
		// may be another file's by now.
		if ino, err := strconv.ParseUint(fields["ino:"], 16, 64); err == nil && uint32(ino) != sockets[fd] {
			continue
		}
		out = append(out, fd)
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
