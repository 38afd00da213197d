// SPDX-License-Identifier: Apache-2.0

// Package echo is a daemon for tests: it sends back every line or packet, and
// remembers who connected and what they did.
package echo

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Client is one connection as the daemon saw it. Its fields are a copy.
type Client struct {
	UID, GID uint32
	PID      int32
	Groups   []uint32
	Requests int
	EOF      bool // the client closed it, or died
}

// Server is a running daemon. Close ends it.
type Server struct {
	l       net.Listener
	mu      sync.Mutex
	changed *sync.Cond
	clients []*Client
	conns   []net.Conn
	held    bool // answers wait for Release
	hello   string
}

// Listen starts a daemon. network is "unix" or "unixpacket"; a name that
// starts with @ is abstract.
func Listen(network, name string) (*Server, error) {
	l, err := net.Listen(network, name)
	if err != nil {
		return nil, err
	}
	if name[0] != '@' {
		if err := os.Chmod(name, 0o666); err != nil {
			return nil, err
		}
	}
	return Serve(l), nil
}

// ListenAs starts a daemon that listens as another user, which SO_PEERCRED
// tells its clients.
func ListenAs(uid int, network, name string) (s *Server, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // thrown away
		// The directory is root's: only the listener must look like uid's.
		const keepCaps = 1
		if err = unix.Prctl(unix.PR_SET_KEEPCAPS, keepCaps, 0, 0, 0); err != nil {
			return
		}
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); e != 0 {
			err = e
			return
		}
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err = unix.Capget(&hdr, &caps[0]); err != nil {
			return
		}
		caps[0].Effective, caps[1].Effective = caps[0].Permitted, caps[1].Permitted
		if err = unix.Capset(&hdr, &caps[0]); err != nil {
			return
		}
		s, err = Listen(network, name)
	}()
	<-done
	return s, err
}

// Serve starts a daemon on a listener, which it takes over.
func Serve(l net.Listener) *Server {
	s := &Server{l: l}
	s.changed = sync.NewCond(&s.mu)
	go s.accept()
	return s
}

func (s *Server) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		cl, err := identify(c.(*net.UnixConn))
		if err != nil {
			c.Close()
			continue
		}
		s.update(func() {
			s.clients = append(s.clients, cl)
			s.conns = append(s.conns, c)
		})
		go s.serve(c, cl)
	}
}

func identify(c *net.UnixConn) (*Client, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	cl := &Client{}
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = err
			return
		}
		cl.UID, cl.GID, cl.PID = cred.Uid, cred.Gid, cred.Pid
		cl.Groups, inner = peerGroups(int(fd))
	})
	return cl, errors.Join(err, inner)
}

func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	n := uint32(4 * len(groups))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return nil, e
	}
	return groups[:n/4], nil
}

// serve echoes lines on a stream and packets on a seqpacket socket: for both,
// what ends in a newline is one request.
func (s *Server) serve(c net.Conn, cl *Client) {
	defer c.Close()
	s.mu.Lock()
	hello := s.hello
	s.mu.Unlock()
	if hello != "" {
		_, _ = io.WriteString(c, hello) // who has gone already shows below
	}
	buf := make([]byte, 0, 64<<10)
	for {
		n, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
			s.await()
			if _, err := c.Write(buf[:i+1]); err != nil {
				break
			}
			k := bytes.Count(buf[:i+1], []byte{'\n'})
			s.update(func() { cl.Requests += k })
			buf = append(buf[:0], buf[i+1:]...)
		}
		if n == 0 && err == nil || errors.Is(err, io.EOF) || err != nil {
			break
		}
	}
	s.update(func() { cl.EOF = true })
}

// await waits as Hold says.
func (s *Server) await() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.held {
		s.changed.Wait()
	}
}

func (s *Server) update(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn()
	s.changed.Broadcast()
}

// Path is the name the daemon listens at.
func (s *Server) Path() string { return s.l.Addr().String() }

// Greet makes the daemon speak first, on connections to come.
func (s *Server) Greet(hello string) { s.update(func() { s.hello = hello }) }

// Hold makes answers wait until Release.
func (s *Server) Hold() { s.update(func() { s.held = true }) }

// Release lets held answers go.
func (s *Server) Release() { s.update(func() { s.held = false }) }

// Send sends something unasked on the connection i.
func (s *Server) Send(i int, text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.conns[i].Write([]byte(text))
	return err
}

// Clients returns what is known of all connections so far, oldest first.
func (s *Server) Clients() []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Client, len(s.clients))
	for i, c := range s.clients {
		out[i] = *c
		out[i].Groups = slices.Clone(c.Groups)
	}
	return out
}

// Await waits until ok is true of the connections.
func (s *Server) Await(what string, ok func([]Client) bool) error {
	end := time.Now().Add(10 * time.Second)
	for time.Now().Before(end) {
		if ok(s.Clients()) {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return fmt.Errorf("the daemon waited 10 s for: %s; its connections: %+v", what, s.Clients())
}

// Open counts the connections that have not ended.
func Open(cs []Client) int {
	n := 0
	for _, c := range cs {
		if !c.EOF {
			n++
		}
	}
	return n
}

// Close ends the daemon: listener, socket file and all connections.
func (s *Server) Close() error {
	err := s.l.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.held = false
	s.changed.Broadcast()
	return err
}
