// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// soPeerPIDFD is SO_PEERPIDFD of the kernel's include/uapi/asm-generic/socket.h,
// since Linux 6.5.
const soPeerPIDFD = 77

// NewPeer tells who made the other end of a connection. close lets go of it.
func NewPeer(client *os.File) (p Peer, close func(), err error) {
	fd, err := number(client)
	if err != nil {
		return Peer{}, nil, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, nil, fmt.Errorf("ask who is at the other end of the RPC socket: %w", err)
	}
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, soPeerPIDFD)
	if errors.Is(err, unix.ENOPROTOOPT) { // nobody can tell whether it still is that process
		pidfd, err = unix.PidfdOpen(int(cred.Pid), 0)
	}
	if err != nil { // it has ended, and its pid may be another's
		pidfd = -1
	}
	q := process{int(cred.Pid), pidfd}
	return Peer{PID: q.pid, Open: q.open, Duplicate: q.duplicate}, q.close, nil
}

// number is that of a file, which stays as it is: Fd would make it blocking.
func number(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

type process struct{ pid, pidfd int }

func (p process) close() {
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
	}
}

func (p process) alive() error {
	if p.pidfd < 0 {
		return fmt.Errorf("process %d: %w", p.pid, unix.ESRCH)
	}
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		switch n, err := unix.Poll(fds, 0); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return fmt.Errorf("process %d has ended: %w", p.pid, unix.ESRCH)
		default:
			return nil
		}
	}
}

// open opens what the descriptor is of, which takes no more than to look at it.
func (p process) open(fd int) (*os.File, error) {
	name := fmt.Sprintf("/proc/%d/fd/%d", p.pid, fd)
	n, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(n), name)
	if err := p.alive(); err != nil { // what was opened may be another process's
		f.Close()
		return nil, err
	}
	return f, nil
}

func (p process) duplicate(fd int) (*os.File, error) {
	if p.pidfd < 0 {
		return nil, p.alive()
	}
	n, err := unix.PidfdGetfd(p.pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate fd %d of process %d: %w", fd, p.pid, err)
	}
	unix.CloseOnExec(n)
	return os.NewFile(uintptr(n), fmt.Sprintf("fd %d of process %d", fd, p.pid)), nil
}
