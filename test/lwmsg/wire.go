// SPDX-License-Identifier: Apache-2.0

// Package lwmsg is a fake: a daemon of PBIS (and of its forerunner Likewise)
// and the two kinds of client it has, as far as a checkpoint can tell them from
// the real ones. PBIS is in no package registry, so that the tests cannot run
// the real thing.
//
// What is real: packets, greeting, header of a message, fragments, identity,
// slots, shutdown packet, and how both clients fail. All of it is as in
// lwmsg/include/connection-private.h and lwmsg/src/connection-wire.c of
// github.com/BeyondTrust/pbis-open, and as was observed with a real lwsmd. What
// is made up: the calls and their contents (Tag…), of which nothing depends.
package lwmsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Packet types.
const (
	typeMessage     = 1
	typeConnect     = 2
	typeAccept      = 3
	typeOldGreeting = 4 // of Likewise, from both ends
	typeShutdown    = 5
)

// Packet flags.
const (
	flagFirst  = 1
	flagLast   = 2
	flagSingle = flagFirst | flagLast
)

// Sizes in bytes.
const (
	headerSize   = 6
	messageSize  = 15 // header of a message, with the packet's
	greetingSize = 19
	// PacketSize is what both ends offer; the smaller one counts.
	PacketSize = 8192
	leastSize  = 20 // below it a greeting is refused
	cookieSize = 8
)

// statusPeerClose is the status of a shutdown packet.
const statusPeerClose = 0x13

// flagResponse is the only flag of a message.
const flagResponse = 1

// Calls, made up. An answer has the number after its call's.
const (
	TagLookup = 1 // text; answered by the same text
	TagOpen   = 3 // nothing; answered by a handle
	TagNext   = 5 // handle; answered by handle and serial number
	TagClose  = 7 // handle; answered by nothing
)

// greeting is a connect or accept packet, or one of the older kind, of which
// only the type was observed: its contents are the newer one's here.
type greeting struct {
	typ    byte
	size   uint32
	cookie [cookieSize]byte
}

func (g greeting) bytes() []byte {
	b := binary.BigEndian.AppendUint32(nil, greetingSize)
	b = append(b, g.typ, flagSingle, 0)
	b = binary.BigEndian.AppendUint32(b, g.size)
	return append(b, g.cookie[:]...)
}

// parseGreeting is strict: one wrong byte is an error.
func parseGreeting(p packet, typ byte) (g greeting, err error) {
	switch {
	case p.typ != typ:
		return g, fmt.Errorf("a packet of type %d instead of a greeting of type %d", p.typ, typ)
	case p.flags != flagSingle:
		return g, fmt.Errorf("a greeting with packet flags %#x", p.flags)
	case len(p.body) != greetingSize-headerSize:
		return g, fmt.Errorf("a greeting of %d bytes", headerSize+len(p.body))
	case p.body[0] != 0:
		return g, fmt.Errorf("a greeting with flags %#x", p.body[0])
	}
	g.typ, g.size = typ, binary.BigEndian.Uint32(p.body[1:])
	copy(g.cookie[:], p.body[5:])
	if g.size < leastSize {
		return g, fmt.Errorf("a greeting that offers packets of %d bytes", g.size)
	}
	return g, nil
}

func shutdown() []byte {
	b := binary.BigEndian.AppendUint32(nil, headerSize+4)
	return binary.BigEndian.AppendUint32(append(b, typeShutdown, flagSingle), statusPeerClose)
}

// packet is a packet without its length.
type packet struct {
	typ, flags byte
	body       []byte
}

// errMalformed: what came is no packet, or not the one expected.
var errMalformed = errors.New("MALFORMED")

// readPacket reads one packet and not a byte more. io.EOF means that it ended
// between two.
func readPacket(r io.Reader, most int) (p packet, err error) {
	head := make([]byte, headerSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return p, err
	}
	length := binary.BigEndian.Uint32(head)
	if length < headerSize || length > uint32(most) {
		return p, fmt.Errorf("%w: a packet of %d bytes", errMalformed, length)
	}
	p.typ, p.flags, p.body = head[4], head[5], make([]byte, length-headerSize)
	_, err = io.ReadFull(r, p.body)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// message is a call or an answer.
type message struct {
	flags  byte
	status uint32
	cookie uint16
	tag    int16
	body   []byte
}

// packets cuts a message into packets of a size.
func (m message) packets(size int) []byte {
	var out []byte
	rest := m.body
	for first := true; first || len(rest) > 0; first = false {
		n := min(len(rest), size-messageSize)
		var flags byte
		if first {
			flags |= flagFirst
		}
		if n == len(rest) {
			flags |= flagLast
		}
		out = binary.BigEndian.AppendUint32(out, uint32(messageSize+n))
		out = append(out, typeMessage, flags, m.flags)
		out = binary.BigEndian.AppendUint32(out, m.status)
		out = binary.BigEndian.AppendUint16(out, m.cookie)
		out = binary.BigEndian.AppendUint16(out, uint16(m.tag))
		out = append(out, rest[:n]...)
		rest = rest[n:]
	}
	return out
}

// assembly collects the fragments of a message.
type assembly struct {
	m     message
	begun bool
}

// add adds a packet. done: m is complete, and another one may follow.
func (a *assembly) add(p packet) (m message, done bool, err error) {
	if p.typ != typeMessage || len(p.body) < messageSize-headerSize {
		return m, false, fmt.Errorf("%w: a packet of type %d and %d bytes instead of a message", errMalformed, p.typ, headerSize+len(p.body))
	}
	if p.flags&^flagSingle != 0 || a.begun == (p.flags&flagFirst != 0) {
		return m, false, fmt.Errorf("%w: a message with packet flags %#x", errMalformed, p.flags)
	}
	got := message{
		flags:  p.body[0],
		status: binary.BigEndian.Uint32(p.body[1:]),
		cookie: binary.BigEndian.Uint16(p.body[5:]),
		tag:    int16(binary.BigEndian.Uint16(p.body[7:])),
	}
	if a.begun && (got.flags != a.m.flags || got.status != a.m.status || got.cookie != a.m.cookie || got.tag != a.m.tag) {
		return m, false, fmt.Errorf("%w: a fragment of another message", errMalformed)
	}
	got.body = append(a.m.body, p.body[messageSize-headerSize:]...)
	a.m, a.begun = got, true
	if p.flags&flagLast == 0 {
		return m, false, nil
	}
	*a = assembly{}
	return got, true, nil
}
