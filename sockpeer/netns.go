// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
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

// do runs fn in the namespace.
func (n netns) do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %d: %w", n.inode, err)
		}
		return fn()
	})
}
