// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxGroups is NGROUPS_MAX of the kernel.
const maxGroups = 65536

// Client is who has connected, as the kernel noted it then.
type Client struct {
	PID      int // in our pid namespace; 0: it is in none that we see
	UID, GID uint32
	Groups   []uint32 // supplementary ones
}

// newClient asks the kernel who is at the other end.
func newClient(c *net.UnixConn) (*Client, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var out *Client
	var got error
	err = raw.Control(func(fd uintptr) { out, got = peerOf(int(fd)) })
	if err = errors.Join(err, got); err != nil {
		return nil, fmt.Errorf("find out who the client is: %w", err)
	}
	return out, nil
}

func peerOf(fd int) (*Client, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	out := &Client{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}
	if out.Groups, err = peerGroups(fd); err != nil {
		return nil, fmt.Errorf("SO_PEERGROUPS: %w", err)
	}
	return out, nil
}

func peerGroups(fd int) ([]uint32, error) {
	for n := 64; ; n = maxGroups {
		groups := make([]uint32, n)
		size := uint32(n * 4)
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case e == 0:
			return groups[:size/4], nil
		case e != unix.ERANGE || n == maxGroups:
			return nil, e
		}
	}
}

func (c *Client) String() string {
	return fmt.Sprintf("process %d, uid %d, gid %d", c.PID, c.UID, c.GID)
}

// Do runs fn with the client's rights on files, for fn's thread alone: owner,
// groups, and none of root's capabilities. fn must not start goroutines that need
// them. The uids stay, so that the client cannot send this thread, and with it all
// of us, a signal.
func (c *Client) Do(fn func() error) error {
	if c.UID == 0 {
		return fn()
	}
	done := make(chan error, 1)
	go func() { done <- onOwnThread(func() error { return c.do(fn) }) }()
	return <-done
}

func (c *Client) do(fn func() error) error {
	if err := c.setGroups(); err != nil {
		return fmt.Errorf("take the %d groups of uid %d: %w", len(c.Groups), c.UID, err)
	}
	// They give back what was before, and no error: ask again to know.
	for _, id := range []struct {
		call  uintptr
		value uint32
	}{{unix.SYS_SETFSGID, c.GID}, {unix.SYS_SETFSUID, c.UID}} {
		_, _, _ = unix.RawSyscall(id.call, uintptr(id.value), 0, 0)
		if now, _, _ := unix.RawSyscall(id.call, uintptr(^uint32(0)), 0, 0); uint32(now) != id.value {
			return fmt.Errorf("take the rights of uid %d, gid %d on files: %w", c.UID, c.GID, unix.EPERM)
		}
	}
	// Those over files are gone by now (capabilities(7)). CAP_SYS_PTRACE, for one,
	// would let it follow the links in /proc of any process.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("give up all capabilities: %w", err)
	}
	return fn()
}

// setGroups gives this thread the client's supplementary groups. Raw: what package
// syscall has changes every thread.
func (c *Client) setGroups() error {
	var groups unsafe.Pointer
	if len(c.Groups) > 0 {
		groups = unsafe.Pointer(&c.Groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(c.Groups)), uintptr(groups), 0); e != 0 {
		return e
	}
	return nil
}
