// SPDX-License-Identifier: Apache-2.0

package lwmsg

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Role is the first argument that makes a test binary a client, followed by its
// kind, the daemon's path and the path of the control socket.
const Role = "criuhook-test-lwmsg"

// Kinds of client.
const (
	KindAssoc = "assoc"
	KindPeer  = "peer"
)

// Command is what a test asks of a client. One command per control connection,
// which ends with the answer.
type Command struct {
	// Op is ping, state, lookup, open, next, close, background (the operation
	// in Text), work or on.
	Op   string
	Text string
	// Size is how many bytes a lookup has, instead of Text.
	Size int
}

// Answer is what it answers. Err "": done.
type Answer struct {
	Err    string
	Took   time.Duration
	Client ClientState
}

// ClientState is how a client looks from inside.
type ClientState struct {
	FD       int // of its socket; -1: none
	FDs      int // open descriptors of the process
	Sessions int // greetings that it has made
	Pending  int // background operations that have not ended
	Ended    []string
}

// caller is either kind of client.
type caller interface {
	Call(tag int16, body []byte) ([]byte, error)
	Session() int
	FD() int
}

type process struct {
	kind    string
	c       caller
	one     sync.Mutex // an assoc client has one thread
	mu      sync.Mutex
	handle  *handle
	serial  uint32
	pending int
	ended   []string
	on      chan struct{}
}

// Main runs a client if the process was started as one, and then does not
// return.
func Main() {
	if len(os.Args) != 5 || os.Args[1] != Role {
		return
	}
	signal.Ignore(unix.SIGPIPE)
	path := os.Args[3]
	old := strings.HasPrefix(filepath.Base(filepath.Dir(path)), "likewise")
	p := &process{kind: os.Args[2], on: make(chan struct{})}
	l, err := net.Listen("unix", os.Args[4])
	if p.kind == KindAssoc {
		p.c = NewAssoc(path, old)
	} else if err == nil {
		p.c, err = NewPeer(path, old)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lwmsg client:", err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			continue
		}
		// One at a time: a connection that is not closed yet would count among the
		// descriptors in the next answer.
		p.serve(c)
	}
}

func (p *process) serve(c net.Conn) {
	defer c.Close()
	var cmd Command
	if err := json.NewDecoder(c).Decode(&cmd); err != nil {
		return
	}
	var ans Answer
	from := time.Now()
	if err := p.do(cmd); err != nil {
		ans.Err = err.Error()
	}
	ans.Took = time.Since(from)
	ans.Client = p.state()
	_ = json.NewEncoder(c).Encode(ans)
}

func (p *process) state() ClientState {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := ClientState{FD: p.c.FD(), Sessions: p.c.Session(), Pending: p.pending, Ended: p.ended}
	if e, err := os.ReadDir("/proc/self/fd"); err == nil {
		s.FDs = len(e) - 1 // without the directory's own
	}
	return s
}

func (p *process) do(cmd Command) error {
	switch cmd.Op {
	case "ping", "state":
		return nil
	case "work": // until "on"
		started := make(chan struct{})
		p.c.(*Peer).Work(func() { close(started); <-p.on })
		<-started
		return nil
	case "on":
		p.on <- struct{}{}
		return nil
	case "background":
		p.mu.Lock()
		p.pending++
		p.mu.Unlock()
		go func() {
			cmd.Op = cmd.Text
			err := p.do(cmd)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.pending--
			p.ended = append(p.ended, fmt.Sprint(err))
		}()
		return nil
	}
	if p.kind == KindAssoc {
		if !p.one.TryLock() {
			return fmt.Errorf("the only thread is in a call")
		}
		defer p.one.Unlock()
	}
	return p.call(cmd)
}

func (p *process) call(cmd Command) error {
	switch cmd.Op {
	case "lookup":
		text := []byte(cmd.Text)
		if cmd.Size > 0 {
			text = bytes.Repeat([]byte("uid=1000;"), cmd.Size)[:cmd.Size]
		} else if len(text) == 0 {
			text = fmt.Appendf(nil, "lookup at %d", time.Now().UnixNano())
		}
		got, err := p.c.Call(TagLookup, text)
		if err == nil && !bytes.Equal(got, text) {
			err = fmt.Errorf("asked for %.40q, got %.40q", text, got)
		}
		return err
	case "open":
		got, err := p.c.Call(TagOpen, nil)
		if err == nil {
			p.handle = &handle{binary.BigEndian.Uint32(got), p.c.Session()}
			p.serial = 0
		}
		return err
	case "next", "close":
		if p.handle == nil {
			return errInvalidHandle
		}
		return p.withHandle(cmd.Op, *p.handle)
	}
	return fmt.Errorf("no operation %q", cmd.Op)
}

// withHandle makes a call with a handle. One of another session is known to be
// invalid without asking.
func (p *process) withHandle(op string, h handle) error {
	if p.c.FD() < 0 && p.kind == KindAssoc || h.session != p.c.Session() {
		p.handle = nil
		return errInvalidHandle
	}
	call := p.c.Call
	if peer, ok := p.c.(*Peer); ok {
		call = func(tag int16, body []byte) ([]byte, error) { return peer.callWith(tag, body, h.session) }
	}
	if op == "close" {
		_, err := call(TagClose, h.bytes())
		p.handle = nil
		return err
	}
	got, err := call(TagNext, h.bytes())
	if err != nil {
		return err
	}
	p.serial++
	if want := binary.BigEndian.AppendUint32(h.bytes(), p.serial); !bytes.Equal(got, want) {
		return fmt.Errorf("item %d: got %x, expected %x", p.serial, got, want)
	}
	return nil
}
