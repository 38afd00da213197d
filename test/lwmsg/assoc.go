// SPDX-License-Identifier: Apache-2.0

package lwmsg

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Errors of both clients, after lwmsg's status codes.
var (
	errBusy          = errors.New("BUSY")
	errPeerClose     = errors.New("PEER_CLOSE")
	errInvalidHandle = errors.New("INVALID_HANDLE")
	errRefused       = errors.New("CONNECTION_REFUSED")
	errNotFound      = errors.New("FILE_NOT_FOUND")
)

// handle is a server's, with the session that it belongs to.
type handle struct {
	id      uint32
	session int
}

// link is a connection with its greeting made.
type link struct {
	fd       int
	size     int
	sessions int // so far; the number of the current one
	// seen are fd and sessions, for other threads.
	seenFD, seenSessions atomic.Int64
}

func (l *link) tell() {
	l.seenFD.Store(int64(l.fd))
	l.seenSessions.Store(int64(l.sessions))
}

// Session is the number of the current session; 0: none yet.
func (l *link) Session() int { return int(l.seenSessions.Load()) }

// FD is the socket, or -1.
func (l *link) FD() int { return int(l.seenFD.Load()) }

// connect connects and greets, with calls that block.
func (l *link) connect(path string, old bool) (err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err {
	case nil:
	case unix.ECONNREFUSED:
		return errRefused
	case unix.ENOENT:
		return errNotFound
	default:
		return err
	}
	mine, theirs := greeting{typ: typeConnect, size: PacketSize}, byte(typeAccept)
	if old {
		mine.typ, theirs = typeOldGreeting, typeOldGreeting
	}
	if _, err := rand.Read(mine.cookie[:]); err != nil {
		return err
	}
	if err := send(fd, mine.bytes()); err != nil {
		return err
	}
	p, err := readPacket(blocking(fd), PacketSize)
	if err != nil {
		return closed(err)
	}
	g, err := parseGreeting(p, theirs)
	if err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	l.fd, l.size = fd, int(min(g.size, PacketSize))
	l.sessions++
	l.tell()
	return nil
}

func (l *link) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	l.fd = -1
	l.tell()
}

// closed makes one error of all the ends a connection can have.
func closed(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return errPeerClose
	}
	return err
}

func send(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return closed(err)
		default:
			b = b[n:]
		}
	}
	return nil
}

// blocking reads a socket with read(2).
type blocking int

func (fd blocking) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// Assoc is the client in NSS' lsass module and in lsaclient: one call at a time, by
// the thread that makes it, with read(2) and no timeout. It remembers nothing
// but its fd. What it does not expect leaves it in the middle of a call, and
// then it is BUSY for ever.
type Assoc struct {
	link
	path string
	old  bool
	busy bool
}

// NewAssoc returns a client that connects with its first call.
func NewAssoc(path string, old bool) *Assoc {
	a := &Assoc{link: link{fd: -1}, path: path, old: old}
	a.tell()
	return a
}

// Call makes one call. Its cookie is always 0.
func (a *Assoc) Call(tag int16, body []byte) ([]byte, error) {
	if a.busy {
		return nil, errBusy
	}
	if a.fd < 0 {
		if err := a.connect(a.path, a.old); err != nil {
			return nil, err
		}
	}
	a.busy = true
	out, err := a.transact(message{tag: tag, body: body})
	if err == nil || errors.Is(err, errPeerClose) {
		a.busy = false
	}
	if errors.Is(err, errPeerClose) {
		a.close() // the next call connects
	}
	return out, err
}

// errShutdown: a shutdown packet came in the middle of a call.
var errShutdown = errors.New("PEER_CLOSE in a shutdown packet")

func (a *Assoc) transact(m message) ([]byte, error) {
	if err := send(a.fd, m.packets(a.size)); err != nil {
		return nil, err
	}
	var as assembly
	for {
		p, err := readPacket(blocking(a.fd), a.size)
		if err != nil {
			return nil, closed(err)
		}
		if p.typ == typeShutdown {
			return nil, errShutdown
		}
		got, done, err := as.add(p)
		if err != nil {
			return nil, err
		}
		if done {
			return got.body, checkAnswer(got, m)
		}
	}
}

func checkAnswer(got, call message) error {
	if got.flags != flagResponse || got.status != 0 || got.cookie != call.cookie || got.tag != call.tag+1 {
		return fmt.Errorf("%w: answer %+v to call %+v", errMalformed, got, call)
	}
	return nil
}

func (h handle) bytes() []byte { return binary.BigEndian.AppendUint32(nil, h.id) }
