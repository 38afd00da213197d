// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// netns is an open network namespace.
type netns struct {
	file  *os.File
	inode uint64
}

func (n netns) Close() error { return n.file.Close() }

func newNetns(f *os.File) (netns, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return netns{}, fmt.Errorf("stat network namespace %s: %w", f.Name(), err)
	}
	return netns{file: f, inode: st.Ino}, nil
}

func openNetns(path string) (netns, error) {
	f, err := os.Open(path)
	if err != nil {
		return netns{}, fmt.Errorf("open network namespace: %w", err)
	}
	n, err := newNetns(f)
	if err != nil {
		f.Close()
		return netns{}, err
	}
	return n, nil
}

// socketNetns opens the network namespace a socket was made in (SIOCGSKNS,
// net/socket.c), which need not be the one its holder is in.
func socketNetns(sock *Socket) (netns, error) {
	fd, err := unix.IoctlRetInt(sock.fd, unix.SIOCGSKNS)
	if errors.Is(err, unix.EPERM) {
		// Without CAP_NET_ADMIN, as in most containers, we are told of none, nor could
		// we enter another one. What is then asked of the wrong one is not found there.
		return openNetns(ownNetns)
	}
	if err != nil {
		return netns{}, fmt.Errorf("ask for the network namespace of a socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "netns of socket")
	n, err := newNetns(f)
	if err != nil {
		f.Close()
		return netns{}, err
	}
	return n, nil
}

const ownNetns = "/proc/thread-self/ns/net"

// own tells whether we are in the namespace: to enter it would take CAP_SYS_ADMIN
// all the same.
func (n netns) own() bool {
	var st unix.Stat_t
	return unix.Stat(ownNetns, &st) == nil && st.Ino == n.inode
}

// do runs fn in the namespace.
func (n netns) do(fn func() error) error {
	if n.own() {
		return fn()
	}
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %d: %w", n.inode, err)
		}
		return fn()
	})
}
