// SPDX-License-Identifier: Apache-2.0

package lwmsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Slots is how many connections a daemon serves at the same time. Others wait
// until one ends; a connection without a greeting never does by itself.
const Slots = 512

// handled are the sockets whose calls need a handle, without: those that know
// none.
var (
	handled = []string{".lwsm", ".regsd", ".lwiod", ".ntlmd", ".lwsc"}
	without = []string{".netlogond", ".eventlog"}
)

// Session is what a daemon knows of a connection, from its greeting on.
type Session struct {
	// UID, GID and PID are SO_PEERCRED's when the greeting is processed.
	UID, GID uint32
	PID      int32
	Calls    int
	Ended    bool
}

// Manners are what a daemon does on connections to come; the zero value is a
// daemon that is well.
type Manners struct {
	// Silent: it never answers a greeting.
	Silent bool
	// Accept is what it sends instead of an accept packet.
	Accept []byte
	// Hangup: after Accept it closes the connection.
	Hangup bool
	// PacketSize that it offers; 0: PacketSize.
	PacketSize uint32
}

// Daemon is a fake lsassd, netlogond, … at one socket. It is strict: after one
// wrong byte it sends a shutdown packet, closes the connection and keeps a
// violation for the test.
type Daemon struct {
	l          net.Listener
	name       string
	old        bool
	slots      chan struct{}
	mu         sync.Mutex
	changed    *sync.Cond
	manners    Manners
	conns      map[net.Conn]bool
	sessions   []*Session
	violations []string
	unanswered int
	holding    int
	held       bool
	nextHandle uint32
}

// Listen starts a daemon at a path, whose name says which it is. Old ones are
// in a directory called likewise….
func Listen(path string) (*Daemon, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, err
	}
	d := &Daemon{
		l: l, name: filepath.Base(path), old: strings.HasPrefix(filepath.Base(dir), "likewise"),
		slots: make(chan struct{}, Slots), conns: map[net.Conn]bool{},
		// Handles of one daemon are not those of the one before it.
		nextHandle: uint32(time.Now().UnixNano()),
	}
	d.changed = sync.NewCond(&d.mu)
	go d.accept()
	return d, nil
}

func (d *Daemon) accept() {
	for {
		d.slots <- struct{}{}
		c, err := d.l.Accept()
		if err != nil {
			return
		}
		d.update(func() { d.conns[c] = true })
		go func() {
			d.serve(c.(*net.UnixConn))
			c.Close()
			d.update(func() { delete(d.conns, c) })
			<-d.slots
		}()
	}
}

// client is one connection.
type client struct {
	*net.UnixConn
	d       *Daemon
	s       *Session
	size    int
	handles map[uint32]uint32 // serial numbers
}

func (d *Daemon) serve(c *net.UnixConn) {
	cl := &client{UnixConn: c, d: d, size: PacketSize, handles: map[uint32]uint32{}}
	err := cl.greet()
	for as := (assembly{}); err == nil; {
		var p packet
		if p, err = readPacket(c, cl.size); err != nil {
			break
		}
		var m message
		var done bool
		if m, done, err = as.add(p); err == nil && done {
			err = cl.call(m)
		}
	}
	var n net.Error
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.As(err, &n) || errors.Is(err, errOver) {
		// The client has gone, or we have.
	} else if err != nil {
		d.update(func() { d.violations = append(d.violations, d.name+": "+err.Error()) })
		_, _ = c.Write(shutdown())
		drain(c)
	}
	if cl.s != nil {
		d.update(func() { cl.s.Ended = true })
	}
}

// drain throws away what has come. The end of a connection with unread bytes
// would show as ECONNRESET.
func drain(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		b := make([]byte, 64<<10)
		for n := 1; n > 0; {
			n, _, _ = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
		}
	})
}

// errOver: the daemon has reason to end a connection.
var errOver = errors.New("over")

// greet exchanges the greetings. The older kind is sent by both ends without
// waiting for the other; the newer server is silent until greeted.
func (c *client) greet() error {
	c.d.mu.Lock()
	m := c.d.manners
	c.d.mu.Unlock()
	mine := greeting{typ: typeAccept, size: PacketSize, cookie: [cookieSize]byte{1, 2, 3, 4, 5, 6, 7, 8}}
	if m.PacketSize != 0 {
		mine.size = m.PacketSize
	}
	theirs := byte(typeConnect)
	if c.d.old {
		mine.typ, theirs = typeOldGreeting, typeOldGreeting
		if _, err := c.Write(mine.bytes()); err != nil {
			return err
		}
	}
	p, err := readPacket(c, PacketSize)
	if err != nil {
		return err
	}
	g, err := parseGreeting(p, theirs)
	if err != nil {
		return err
	}
	if m.Silent {
		_, err := io.Copy(io.Discard, c)
		return errors.Join(errOver, err)
	}
	s, err := identify(c.UnixConn)
	if err != nil {
		return err
	}
	mine.size = min(mine.size, g.size)
	c.size = int(mine.size)
	if m.Accept == nil {
		c.d.update(func() { c.d.sessions = append(c.d.sessions, s) })
		c.s = s
	}
	switch {
	case m.Accept != nil:
		if _, err := c.Write(m.Accept); err != nil || m.Hangup {
			return errors.Join(errOver, err)
		}
		return nil
	case c.d.old:
		return nil
	}
	_, err = c.Write(mine.bytes())
	return err
}

func identify(c *net.UnixConn) (*Session, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var s *Session
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if inner = err; err == nil {
			s = &Session{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}
		}
	})
	return s, errors.Join(err, inner)
}

// call serves one call. A handle that this session does not know is never
// answered, as by the real daemon.
func (c *client) call(m message) error {
	if m.flags != 0 || m.status != 0 {
		return fmt.Errorf("a call with flags %#x and status %d", m.flags, m.status)
	}
	answer := message{flags: flagResponse, cookie: m.cookie, tag: m.tag + 1}
	switch {
	case m.tag == TagLookup && slices.Contains(handled, c.d.name):
		return fmt.Errorf("a call without a handle")
	case m.tag == TagLookup && len(m.body) > 0:
		answer.body = m.body
	case m.tag == TagOpen && len(m.body) == 0 && !slices.Contains(without, c.d.name):
		c.d.update(func() { c.d.nextHandle++; answer.body = binary.BigEndian.AppendUint32(nil, c.d.nextHandle) })
		c.handles[binary.BigEndian.Uint32(answer.body)] = 0
	case (m.tag == TagNext || m.tag == TagClose) && len(m.body) == 4 && !slices.Contains(without, c.d.name):
		h := binary.BigEndian.Uint32(m.body)
		if _, ok := c.handles[h]; !ok {
			c.d.update(func() { c.d.unanswered++ })
			return nil
		}
		if m.tag == TagClose {
			delete(c.handles, h)
			break
		}
		c.handles[h]++
		answer.body = binary.BigEndian.AppendUint32(m.body, c.handles[h])
	default:
		return fmt.Errorf("a call with tag %d and %d bytes", m.tag, len(m.body))
	}
	c.d.await()
	if c.s != nil { // before the client knows
		c.d.update(func() { c.s.Calls++ })
	}
	_, err := c.Write(answer.packets(c.size))
	return err
}

func (d *Daemon) update(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
	d.changed.Broadcast()
}

// await waits as Hold says.
func (d *Daemon) await() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holding++
	for d.held {
		d.changed.Wait()
	}
	d.holding--
}

// Be gives the daemon manners, on connections to come.
func (d *Daemon) Be(m Manners) { d.update(func() { d.manners = m }) }

// Hold makes answers wait until Release.
func (d *Daemon) Hold() { d.update(func() { d.held = true }) }

// Release lets held answers go.
func (d *Daemon) Release() { d.update(func() { d.held = false }) }

// State is what a daemon knows at one moment.
type State struct {
	Sessions   []Session // all that were greeted so far, oldest first
	Slots      int       // in use
	Unanswered int       // calls with a handle that their session did not know
	Holding    int       // answers held
}

// State returns a copy.
func (d *Daemon) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := State{Slots: len(d.conns), Unanswered: d.unanswered, Holding: d.holding}
	for _, one := range d.sessions {
		s.Sessions = append(s.Sessions, *one)
	}
	return s
}

// Violations returns what clients did wrong since it was last called.
func (d *Daemon) Violations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.violations
	d.violations = nil
	return v
}

// Close ends the daemon, its socket file and all connections.
func (d *Daemon) Close() error {
	err := d.l.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		c.Close()
	}
	d.held = false
	d.changed.Broadcast()
	return err
}

// Accept is a good accept packet, for Manners.
func Accept() []byte { return greeting{typ: typeAccept, size: PacketSize}.bytes() }

// BadAccepts are wrong ones, by what is wrong with them.
func BadAccepts() map[string][]byte {
	with := func(i int, b ...byte) []byte {
		out := Accept()
		copy(out[i:], b)
		return out
	}
	return map[string][]byte{
		"too long":             append(with(0, 0, 0, 0, greetingSize+1), 0),
		"too short":            with(0, 0, 0, 0, greetingSize-1)[:greetingSize-1],
		"a connect packet":     with(4, typeConnect),
		"the older kind":       with(4, typeOldGreeting),
		"not the last":         with(5, flagFirst),
		"greeting flags":       with(6, 1),
		"tiny packets":         with(7, 0, 0, 0, leastSize-1),
		"smaller packets":      with(7, 0, 0, 0x10, 0),
		"larger packets":       with(7, 0, 1, 0, 0),
		"a shutdown":           shutdown(),
		"half of one":          with(0)[:10],
		"a huge length":        with(0, 0xff, 0xff, 0xff, 0xff),
		"not even of a packet": []byte("220 smtp.example.org ESMTP\r\n"),
	}
}
