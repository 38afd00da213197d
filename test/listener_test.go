// SPDX-License-Identifier: Apache-2.0

package test

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/echo"
)

// raw is a listener that accepts nothing until it is told to.
type raw struct {
	fd   int
	path string
}

func rawListener(t testing.TB, name string, backlog int) *raw {
	t.Helper()
	return rawListenerAt(t, filepath.Join(folder(t), name), backlog)
}

func rawListenerAt(t testing.TB, path string, backlog int) *raw {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{fd: fd, path: path}
	t.Cleanup(r.close)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		t.Fatal(err)
	}
	return r
}

// close leaves the socket file: who connects to it is refused.
func (r *raw) close() {
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}

// listener is for echo.Serve; until then nothing is accepted.
func (r *raw) listener(t testing.TB) net.Listener {
	t.Helper()
	f := os.NewFile(uintptr(r.fd), r.path)
	r.fd = -1
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serve makes it an echo daemon.
func (r *raw) serve(t testing.TB) *echo.Server {
	t.Helper()
	s := echo.Serve(r.listener(t))
	t.Cleanup(func() { s.Close() })
	return s
}

// later starts a daemon after a while.
func later(t testing.TB, d time.Duration, start func() (*echo.Server, error)) (started <-chan *echo.Server) {
	c := make(chan *echo.Server, 1)
	time.AfterFunc(d, func() {
		defer close(c)
		s, err := start()
		if err != nil {
			t.Error(err)
		}
		if s != nil {
			c <- s
		}
	})
	t.Cleanup(func() {
		for s := range c { // nobody took it: the test failed
			s.Close()
		}
	})
	return c
}

// fill connects to a listener until its backlog is full.
func (r *raw) fill(t testing.TB) {
	t.Helper()
	for range 100 {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: r.path}); err == unix.EAGAIN {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the backlog does not fill up")
}
