// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket is an fd of ours on a socket that may be somebody else's. It is not an
// os.File, which would add a non-blocking socket to the runtime's poller.
type Socket struct {
	fd   int
	name string
}

// NewSocket takes ownership of fd.
func NewSocket(fd int, name string) *Socket { return &Socket{fd: fd, name: name} }

// FD is the descriptor; it stays the Socket's.
func (s *Socket) FD() int { return s.fd }

// Name says whose socket it is.
func (s *Socket) Name() string { return s.name }

// Inode is the socket's inode, as in /proc/PID/fd.
func (s *Socket) Inode() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", s.name, err)
	}
	return uint32(st.Ino), nil
}

// Type is the socket's type (SO_TYPE).
func (s *Socket) Type() (Type, error) {
	t, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return 0, fmt.Errorf("ask for the type of %s: %w", s.name, err)
	}
	return Type(t), nil
}

// Close closes our fd. The description lives on where others hold it.
func (s *Socket) Close() error { return unix.Close(s.fd) }

// Duplicate returns a duplicate of an fd of another process: the same open
// file description, whatever state the process is in (pidfd_getfd(2)).
func Duplicate(pid, fd int) (*Socket, error) { return duplicate(pid, fd, 0) }

func duplicate(pid, fd, flags int) (*Socket, error) {
	pidfd, err := unix.PidfdOpen(pid, flags)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	dup, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate fd %d of process %d: %w", fd, pid, err)
	}
	return NewSocket(dup, fmt.Sprintf("fd %d of process %d", fd, pid)), nil
}

// duplicateSocket duplicates a holder's fd if it still is the socket with this
// inode.
func duplicateSocket(h Holder, inode uint32) (*Socket, error) {
	flags := 0
	if h.TID != h.PID {
		flags = unix.O_EXCL // PIDFD_THREAD, Linux 6.9
	}
	f, err := duplicate(h.TID, h.FD, flags)
	if err != nil {
		return nil, err
	}
	if ino, err := f.Inode(); err != nil || ino != inode {
		f.Close()
		return nil, fmt.Errorf("fd %d of process %d is no longer socket %d: %w", h.FD, h.PID, inode, unix.EBADF)
	}
	return f, nil
}

// IsUnix reports whether it is a unix socket.
func (s *Socket) IsUnix() bool {
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_UNIX
}

// Connected reports whether the socket has, or had, a peer.
func (s *Socket) Connected() (bool, error) {
	_, err := peerName(s)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOTCONN):
		return false, nil
	}
	return false, fmt.Errorf("ask for the peer of %s: %w", s.name, err)
}

// peerName is getpeername(2) without the interpretation of x/sys, which loses
// bytes of odd names.
func peerName(f *Socket) (Name, error) {
	var sa unix.RawSockaddrUnix
	n := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.Syscall(unix.SYS_GETPEERNAME, uintptr(f.fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return "", errno
	}
	b := unsafe.Slice((*byte)(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	return nameFromSockaddr(b[:min(int(n), len(b))]), nil
}
