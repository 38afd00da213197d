// SPDX-License-Identifier: Apache-2.0

package lwmsg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"

	"golang.org/x/sys/unix"
)

// Peer is the client of lwio, lwreg and others: a thread of its own waits with
// epoll for whatever comes, any number of calls are under way, and it connects
// anew by itself.
type Peer struct {
	link
	path    string
	old     bool
	ep      int
	wake    int // eventfd
	calls   chan *peerCall
	pending map[uint16]*peerCall
	next    uint16
	unread  []byte
	as      assembly
}

type peerCall struct {
	m       message
	session int    // that a handle belongs to; 0: none
	work    func() // not a call: what the thread does besides
	done    chan struct{}
	body    []byte
	err     error
}

// NewPeer starts a client that connects with its first call.
func NewPeer(path string, old bool) (*Peer, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	p := &Peer{link: link{fd: -1}, path: path, old: old, ep: ep, wake: wake, calls: make(chan *peerCall, 64), pending: map[uint16]*peerCall{}, next: 1}
	p.tell()
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}); err != nil {
		return nil, err
	}
	go p.loop()
	return p, nil
}

// Call makes one call.
func (p *Peer) Call(tag int16, body []byte) ([]byte, error) { return p.callWith(tag, body, 0) }

func (p *Peer) callWith(tag int16, body []byte, session int) ([]byte, error) {
	c := &peerCall{m: message{tag: tag, body: body}, session: session, done: make(chan struct{})}
	p.submit(c)
	<-c.done
	return c.body, c.err
}

// Work keeps the thread busy outside of epoll until fn returns.
func (p *Peer) Work(fn func()) { p.submit(&peerCall{work: fn, done: make(chan struct{})}) }

func (p *Peer) submit(c *peerCall) {
	p.calls <- c
	_, _ = unix.Write(p.wake, binary.NativeEndian.AppendUint64(nil, 1))
}

func (p *Peer) loop() {
	runtime.LockOSThread()
	ev := make([]unix.EpollEvent, 4)
	for {
		n, err := unix.EpollWait(p.ep, ev, -1)
		if err != nil && err != unix.EINTR {
			panic(err) // a test program: the test sees it
		}
		woken := false
		for _, e := range ev[:max(n, 0)] {
			if int(e.Fd) == p.wake {
				woken = true
			} else if int(e.Fd) == p.fd {
				p.receive()
			}
		}
		if !woken {
			continue
		}
		var b [8]byte
		_, _ = unix.Read(p.wake, b[:])
		for len(p.calls) > 0 {
			c := <-p.calls
			if c.work != nil {
				c.work()
				close(c.done)
				continue
			}
			p.receive() // what came meanwhile comes first
			p.begin(c)
		}
	}
}

func (p *Peer) finish(c *peerCall, body []byte, err error) {
	c.body, c.err = body, err
	close(c.done)
}

// begin sends a call; a connection that turns out to be dead, so that nothing
// was sent, is replaced.
func (p *Peer) begin(c *peerCall) {
	for range 2 {
		if p.fd < 0 {
			if c.session != 0 {
				p.finish(c, nil, errInvalidHandle)
				return
			}
			if err := p.open(); err != nil {
				p.finish(c, nil, err)
				return
			}
		}
		if c.session != 0 && c.session != p.sessions {
			p.finish(c, nil, errInvalidHandle)
			return
		}
		c.m.cookie = p.next
		p.next++
		err := send(p.fd, c.m.packets(p.size))
		if err == nil {
			p.pending[c.m.cookie] = c
			return
		}
		p.reset(errPeerClose)
		if !errors.Is(err, errPeerClose) {
			p.finish(c, nil, err)
			return
		}
	}
	p.finish(c, nil, errPeerClose)
}

func (p *Peer) open() error {
	if err := p.connect(p.path, p.old); err != nil {
		return err
	}
	return unix.EpollCtl(p.ep, unix.EPOLL_CTL_ADD, p.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.fd)})
}

// reset gives up a connection. Calls under way fail.
func (p *Peer) reset(err error) {
	p.close()
	p.unread, p.as = nil, assembly{}
	for cookie, c := range p.pending {
		delete(p.pending, cookie)
		p.finish(c, nil, err)
	}
}

// receive takes what is there.
func (p *Peer) receive() {
	if p.fd < 0 {
		return
	}
	b := make([]byte, PacketSize)
	for {
		n, _, err := unix.Recvfrom(p.fd, b, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return
		case err != nil:
			p.reset(closed(err))
			return
		case n == 0:
			p.reset(errPeerClose)
			return
		}
		p.unread = append(p.unread, b[:n]...)
		if err := p.packets(); err != nil {
			p.reset(err)
			return
		}
	}
}

// packets takes the complete packets of what was read.
func (p *Peer) packets() error {
	for {
		r := bytes.NewReader(p.unread)
		pk, err := readPacket(r, p.size)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil // more is to come
		} else if err != nil {
			return err
		}
		p.unread = p.unread[len(p.unread)-r.Len():]
		if pk.typ == typeShutdown {
			return errPeerClose
		}
		m, done, err := p.as.add(pk)
		if err != nil {
			return err
		}
		if !done {
			continue
		}
		c := p.pending[m.cookie]
		if c == nil {
			return errMalformed
		}
		delete(p.pending, m.cookie)
		p.finish(c, m.body, checkAnswer(m, c.m))
	}
}
