// SPDX-License-Identifier: Apache-2.0

package interpose

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

var ne = binary.NativeEndian

type attr struct {
	typ uint16
	val []byte
}

func u32(n ...uint32) (b []byte) {
	for _, v := range n {
		b = ne.AppendUint32(b, v)
	}
	return b
}

func pad(b []byte) []byte { return append(b, make([]byte, align(len(b))-len(b))...) }

func message(typ uint16, body []byte) []byte {
	b := ne.AppendUint32(nil, uint32(nlHeaderLen+len(body)))
	b = ne.AppendUint16(b, typ)
	return pad(append(append(b, make([]byte, 10)...), body...))
}

// socket is an answer of sock_diag for one unix socket.
func socket(family, typ, state byte, inode uint32, attrs ...attr) []byte {
	body := append([]byte{family, typ, state, 0}, u32(inode, 7, 8)...)
	for _, a := range attrs {
		body = ne.AppendUint16(body, uint16(attrHdrLen+len(a.val)))
		body = ne.AppendUint16(body, a.typ)
		body = pad(append(body, a.val...))
	}
	return message(sockDiagByFamily, body)
}

var done = message(unix.NLMSG_DONE, u32(0))

func TestEdit(t *testing.T) {
	const us, dead, other, peer = 100, 101, 102, 900
	const stream, dgram, seqpacket = unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_SEQPACKET
	forms := map[uint32]Form{us: Dormant, dead: Dead}
	name := attr{0, []byte("/run/x")}
	hidden := func(val ...uint32) attr { return attr{attrUnknown, u32(val...)} }
	peerOf := func(n uint32) attr { return attr{attrPeer, u32(n)} }
	shut := func(n byte) attr { return attr{attrShut, []byte{n}} }
	rqlen := attr{4, u32(3, 0)}

	for _, c := range []struct {
		what     string
		in, want []byte
	}{
		{"dormant", socket(1, stream, 1, us, peerOf(peer), rqlen, shut(0)), socket(1, stream, 7, us, hidden(peer), rqlen, shut(0))},
		{"dormant, half shut", socket(1, seqpacket, 1, us, name, peerOf(peer), shut(2)), socket(1, seqpacket, 7, us, name, hidden(peer), shut(0))},
		{"dead", socket(1, stream, 1, dead, peerOf(peer), shut(0)), socket(1, stream, 1, dead, hidden(peer), shut(3))},
		{"dead, not accepted", socket(1, stream, 1, dead, shut(0)), socket(1, stream, 1, dead, shut(3))},
		{"a dead datagram socket is dormant", socket(1, dgram, 1, dead, peerOf(peer), shut(0)), socket(1, dgram, 7, dead, hidden(peer), shut(0))},
		{"dormant datagram socket", socket(1, dgram, 1, us, peerOf(peer), shut(0)), socket(1, dgram, 7, us, hidden(peer), shut(0))},
		{"a flagged attribute", socket(1, stream, 1, us, attr{attrPeer | 0x8000, u32(peer)}), socket(1, stream, 7, us, hidden(peer))},
		{"a listener with ours in its backlog", socket(1, stream, 10, other, name, attr{attrIcons, u32(5, us)}), socket(1, stream, 10, other, name, hidden(5, us))},
		{"a listener with others in its backlog", socket(1, stream, 10, other, attr{attrIcons, u32(5, 6)}), nil},
		{"another socket, even our peer", socket(1, stream, 1, peer, name, peerOf(us), shut(0)), nil},
		{"another family with such a number", socket(2, stream, 1, us, peerOf(peer)), nil},
		{"no sock_diag", message(17, socket(1, stream, 1, us, peerOf(peer))[nlHeaderLen:]), nil},
		{"a message too short for a socket", message(sockDiagByFamily, []byte{1, 1, 1, 0}), nil},
		{"the end", done, nil},
		{"nothing", nil, nil},
	} {
		for _, around := range []int{0, 1} {
			in, want := c.in, c.want
			if want == nil {
				want = in
			}
			if around == 1 { // one of several
				first := socket(1, stream, 1, 5, peerOf(6), shut(0))
				in, want = slices.Concat(first, in, done), slices.Concat(first, want, done)
			}
			got := bytes.Clone(in)
			changed, err := edit(got, forms)
			if err != nil || !bytes.Equal(got, want) || changed != (c.want != nil) {
				t.Errorf("%s: changed %v, %v\n%x, want\n%x", c.what, changed, err, got, want)
			}
		}
	}
}

func TestEditMalformed(t *testing.T) {
	forms := map[uint32]Form{100: Dormant}
	good := socket(1, 1, 1, 100, attr{attrPeer, u32(5)}, attr{attrShut, []byte{0}})
	length := func(at int, n uint16) []byte {
		b := bytes.Clone(good)
		ne.PutUint16(b[at:], n)
		return b
	}
	for what, b := range map[string][]byte{
		"a message shorter than a header":   length(0, 15),
		"a message of no length":            length(0, 0),
		"a message that ends too late":      length(0, uint16(len(good)+1)),
		"an attribute shorter than its own": length(nlHeaderLen+diagMsgLen, 3),
		"an attribute of no length":         length(nlHeaderLen+diagMsgLen, 0),
		"an attribute that ends too late":   length(nlHeaderLen+diagMsgLen, 100),
	} {
		if _, err := edit(b, forms); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	empty := socket(1, 1, 1, 100, attr{attrPeer, nil}, attr{attrShut, nil}, attr{attrIcons, []byte{1, 2}})
	if _, err := edit(empty, forms); err != nil {
		t.Errorf("attributes without a value: %v", err)
	}
	for n := range len(good) {
		edit(bytes.Clone(good[:n]), forms)
	}
}

func TestAsksForUnix(t *testing.T) {
	for what, c := range map[string]struct {
		b    []byte
		want bool
	}{
		"unix":             {message(sockDiagByFamily, []byte{1, 0, 0, 0}), true},
		"inet":             {message(sockDiagByFamily, []byte{2, 6, 0, 0}), false},
		"another message":  {message(18, []byte{1, 0, 0, 0}), false},
		"only a header":    {message(sockDiagByFamily, nil), false},
		"less than that":   {[]byte{1}, false},
		"nothing":          {nil, false},
		"unix, one byte":   {message(sockDiagByFamily, []byte{1})[:nlHeaderLen+1], true},
		"unspecified (0)":  {message(sockDiagByFamily, []byte{0}), false},
		"route's own dump": {message(unix.RTM_GETLINK, []byte{1, 0, 0, 0}), false},
	} {
		if got := asksForUnix(c.b); got != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestEndsDump(t *testing.T) {
	one := socket(1, 1, 1, 5)
	for what, c := range map[string]struct {
		b    []byte
		want bool
	}{
		"sockets":            {slices.Concat(one, one), false},
		"the end":            {done, true},
		"sockets, then it":   {slices.Concat(one, done), true},
		"an error":           {message(unix.NLMSG_ERROR, make([]byte, 20)), true},
		"nothing":            {nil, false},
		"less than a header": {one[:10], false},
	} {
		if got, err := endsDump(c.b); err != nil || got != c.want {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	if _, err := endsDump(slices.Concat(one[:len(one)-4], done)[:30]); err == nil {
		t.Error("a cut message is accepted")
	}
}

func FuzzEdit(f *testing.F) {
	f.Add(slices.Concat(socket(1, 1, 1, 100, attr{attrPeer, u32(5)}, attr{attrShut, []byte{0}}), done), uint32(100), true)
	f.Add(socket(1, 1, 10, 7, attr{attrIcons, u32(100, 101)}), uint32(101), false)
	f.Fuzz(func(t *testing.T, b []byte, inode uint32, dead bool) {
		form := Dormant
		if dead {
			form = Dead
		}
		before := bytes.Clone(b)
		changed, err := edit(b, map[uint32]Form{inode: form})
		if len(b) != len(before) || !changed && !bytes.Equal(b, before) {
			t.Error("changed what it should not")
		}
		_, endErr := endsDump(b)
		asksForUnix(b)
		if err == nil && endErr != nil {
			t.Errorf("edited into something malformed: %v", endErr)
		}
		// Twice is as good as once: only states and types of attributes differ.
		once := bytes.Clone(b)
		if _, err2 := edit(b, map[uint32]Form{inode: form}); (err == nil) != (err2 == nil) || err == nil && !bytes.Equal(b, once) {
			t.Errorf("a second time: %v, was %v", err2, err)
		}
	})
}
