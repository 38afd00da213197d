// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// DefaultSocket is where the service listens if nothing else is said.
const DefaultSocket = "/run/criuhook/criu.sock"

// Listener is the service's socket.
type Listener struct {
	*net.UnixListener
	// Path of the socket; "": it is systemd's.
	Path string
	// bound is our socket file, which Close removes if it is still there.
	bound os.FileInfo
	once  sync.Once
	err   error
}

// Activated returns the socket that systemd passed on (sd_listen_fds(3)), nil if
// it passed none. The variables that tell of it are removed from the environment.
func Activated() (*Listener, error) {
	files := activation.Files(true)
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	switch len(files) {
	case 0:
		return nil, nil
	case 1:
	default:
		return nil, fmt.Errorf("systemd passed %d sockets, one is needed: give the socket unit one ListenSequentialPacket=", len(files))
	}
	l, err := fromFile(files[0])
	if err != nil {
		return nil, fmt.Errorf("the socket that systemd passed (%s): %w; give the socket unit ListenSequentialPacket=PATH", files[0].Name(), err)
	}
	return &Listener{UnixListener: l}, nil
}

// fromFile makes a listener of a file that must be a listening unix socket of
// packets.
func fromFile(f *os.File) (*net.UnixListener, error) {
	fd := int(f.Fd())
	for _, want := range []struct {
		option, value int
		what          string
	}{
		{unix.SO_DOMAIN, unix.AF_UNIX, "not a unix socket"},
		{unix.SO_TYPE, unix.SOCK_SEQPACKET, "not of type seqpacket"},
		{unix.SO_ACCEPTCONN, 1, "not listening"},
	} {
		got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, want.option)
		switch {
		case errors.Is(err, unix.ENOTSOCK):
			return nil, errors.New("not a socket")
		case err != nil:
			return nil, os.NewSyscallError("getsockopt", err)
		case got != want.value:
			return nil, errors.New(want.what)
		}
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		_ = l.Close()
		return nil, errors.New("not a unix socket")
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}

// Listen makes the service's socket, with that mode. Its directory is made if
// it does not exist, but not those above. A socket that is there already is
// removed if nobody listens on it; nothing else is.
func Listen(path string, mode os.FileMode) (*Listener, error) {
	l, err := listen(path, mode)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func listen(path string, mode os.FileMode) (*Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, errors.New("not an absolute path")
	}
	// bind(2) cannot.
	const limit = len(unix.RawSockaddrUnix{}.Path) - 1
	if len(path) > limit {
		return nil, fmt.Errorf("%d bytes, and the name of a socket can have %d: choose a shorter one", len(path), limit)
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make its directory: %w", err)
	}
	// Of two that start at the same time, one waits for the other.
	unlock, err := lock(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// Nobody but its owner connects before it has its mode.
	old := unix.Umask(0o177)
	u, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	u.SetUnlinkOnClose(false)
	l := &Listener{UnixListener: u, Path: path}
	if l.bound, err = os.Lstat(path); err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// lock holds a lock on a file that nobody else may open: whoever can open a file
// can hold a lock on it. It stays there, since who waits for it has it open.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR), time.Now().After(end):
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w; is another one starting?", name, err)
		}
	}
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("there is something that is not a socket (%s), which is left alone: remove it, or choose another name", info.Mode())
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	_ = unix.Close(fd)
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("somebody listens there already (%v): end that one, or choose another name", orConnected(err))
	}
	return os.Remove(path)
}

func orConnected(err error) any {
	if err == nil {
		return "a connection was made"
	}
	return err
}

// waiting are the clients that nobody has accepted yet, when nobody is to accept
// any more. Those of systemd's socket wait for the next start of the service.
func (l *Listener) waiting() (out []*net.UnixConn) {
	if l.Path == "" {
		return nil
	}
	raw, err := l.SyscallConn()
	if err != nil {
		return nil
	}
	_ = raw.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return
			}
			f := os.NewFile(uintptr(n), "a client")
			if c, err := net.FileConn(f); err == nil {
				if u, ok := c.(*net.UnixConn); ok {
					out = append(out, u)
				}
			}
			_ = f.Close()
		}
	})
	return out
}

// Close closes the socket and removes its file, if that is still ours.
func (l *Listener) Close() error {
	l.once.Do(func() {
		if l.bound != nil {
			now, err := os.Lstat(l.Path)
			if err == nil && os.SameFile(now, l.bound) && now.Mode().Type() == fs.ModeSocket {
				l.err = os.Remove(l.Path)
			}
		}
		l.err = errors.Join(l.err, l.UnixListener.Close())
	})
	return l.err
}
