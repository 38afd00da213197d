// SPDX-License-Identifier: Apache-2.0

package child

import (
	"fmt"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Gate keeps an orphan from executing its program, and so from having any
// thread, as long as another process may need the pids that these would have.
//
// It lets the orphan through when that process waits for any child, by
// wait4(-1, NULL, 0, NULL), when it runs none of Files any more, or when it
// cannot be told what it does. When the process ends, so does the orphan. This
// is right nearly always: that the process waits a moment for a child that is
// there already looks the same.
type Gate struct {
	PID   int
	PIDFD int      // of PID, among the descriptors that the orphan has
	Files []string // the programs during which the orphan waits; not more than two
}

// How often the gate looks: rarely enough not to take the processor from whoever
// it waits for.
const (
	firstPause   = 2_000_000 // nanoseconds
	longestPause = 50_000_000
)

// gate is what an orphan at a Gate works with. Nothing can be allocated there.
type gate struct {
	pollFD       unix.PollFd
	pause        unix.Timespec
	stat         unix.Stat_t
	exe, syscall *byte // /proc/PID/exe, /proc/PID/syscall
	files        [2]struct{ dev, ino uint64 }
	text         [256]byte
}

func (g *Gate) prepare() (*gate, error) {
	at := &gate{pollFD: unix.PollFd{Fd: int32(g.PIDFD), Events: unix.POLLIN}}
	if len(g.Files) > len(at.files) {
		return nil, fmt.Errorf("%d programs to wait for: %w", len(g.Files), unix.E2BIG)
	}
	for i, name := range g.Files {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			return nil, fmt.Errorf("look at %s: %w", name, err)
		}
		at.files[i].dev, at.files[i].ino = uint64(st.Dev), st.Ino
	}
	proc := "/proc/" + strconv.Itoa(g.PID)
	var err error
	if at.exe, err = unix.BytePtrFromString(proc + "/exe"); err != nil {
		return nil, err
	}
	at.syscall, err = unix.BytePtrFromString(proc + "/syscall")
	return at, err
}

// pass waits until the orphan may go on, or returns false: it is to end. See
// start for what it must not do.
//
//go:noinline
//go:nosplit
//go:norace
//go:nocheckptr
func (g *gate) pass() bool {
	here := unix.AT_FDCWD // of no use, the paths are absolute
	for pause := int64(firstPause); ; pause = min(pause+pause/4, longestPause) {
		g.pause.Sec, g.pause.Nsec = 0, pause
		n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&g.pollFD)), 1, uintptr(unsafe.Pointer(&g.pause)), 0, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return true // not to wait without a pause
		}
		if errno == 0 && n != 0 {
			return false
		}
		_, _, errno = syscall.RawSyscall6(unix.SYS_NEWFSTATAT, uintptr(here), uintptr(unsafe.Pointer(g.exe)), uintptr(unsafe.Pointer(&g.stat)), 0, 0, 0)
		if errno == unix.ENOENT || errno == unix.ESRCH {
			continue // it is on its way out
		}
		if errno != 0 || !g.known() {
			return true
		}
		fd, _, errno := syscall.RawSyscall6(unix.SYS_OPENAT, uintptr(here), uintptr(unsafe.Pointer(g.syscall)), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
		if errno == unix.ENOENT || errno == unix.ESRCH {
			continue
		}
		if errno != 0 {
			return true
		}
		n, _, errno = syscall.RawSyscall6(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&g.text)), unsafe.Sizeof(g.text), 0, 0, 0)
		syscall.RawSyscall6(unix.SYS_CLOSE, fd, 0, 0, 0, 0, 0)
		if errno == unix.ESRCH {
			continue
		}
		if errno != 0 || g.waits(int(n)) {
			return true
		}
	}
}

//go:noinline
//go:nosplit
//go:norace
func (g *gate) known() bool {
	for i := range g.files {
		if g.files[i].ino == g.stat.Ino && g.files[i].dev == uint64(g.stat.Dev) {
			return true
		}
	}
	return false
}

// waits looks for wait4(-1, NULL, 0, NULL) in n bytes of /proc/PID/syscall:
// "running", or the number and the arguments, these in hexadecimal (proc(5)).
//
//go:noinline
//go:nosplit
//go:norace
func (g *gate) waits(n int) bool {
	field, value := 0, uint64(0)
	for i := 0; i < n && i < len(g.text); i++ {
		b := g.text[i]
		switch {
		case b == ' ' || b == '\n':
			switch {
			case field == 0 && value != unix.SYS_WAIT4,
				field == 1 && uint32(value) != ^uint32(0), // an int
				field == 2 && value != 0,
				field == 3 && uint32(value) != 0, // an int
				field == 4 && value != 0:
				return false
			case field == 4:
				return true
			}
			field, value = field+1, 0
		case b == 'x':
			value = 0
		case b >= '0' && b <= '9' && field == 0:
			value = value*10 + uint64(b-'0')
		case b >= '0' && b <= '9':
			value = value<<4 + uint64(b-'0')
		case b >= 'a' && b <= 'f' && field > 0:
			value = value<<4 + uint64(b-'a') + 10
		default:
			return false
		}
	}
	return false
}
