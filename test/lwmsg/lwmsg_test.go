// SPDX-License-Identifier: Apache-2.0

package lwmsg_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/lwmsg"
)

// The fake must fail its clients as the real daemon does; otherwise the tests
// that use it show nothing. No checkpoint is made here: a reconnection is an
// unasked new socket under the same fd.

const patience = 10 * time.Second

func listen(t *testing.T, name string) (*lwmsg.Daemon, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	d, err := lwmsg.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d, path
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited %v for: %s", patience, what)
}

const (
	connect  = "00000013 02 03 00 00002000 1122334455667788"
	lookup   = "00000011 01 03 00 00000000 0000 0001 6869"
	answer   = "00000011 01 03 01 00000000 0000 0002 6869"
	next     = "00000013 01 03 00 00000000 0000 0005 00000007"
	goodbye  = "0000000a 05 03 00000013"
	accepted = "00000013 03 03 00 00002000"
)

func TestBytes(t *testing.T) {
	d, path := listen(t, ".lsassd")
	c := dial(t, path)
	got := make([]byte, 19)
	fmt.Fprint(c, string(unhex(t, connect)))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.HasPrefix(got, unhex(t, accepted)) {
		t.Fatalf("the accept packet is %x, %v", got, err)
	}
	fmt.Fprint(c, string(unhex(t, lookup)))
	if _, err := io.ReadFull(c, got[:17]); err != nil || !bytes.Equal(got[:17], unhex(t, answer)) {
		t.Fatalf("the answer is %x, %v", got, err)
	}
	s := d.State()
	if len(s.Sessions) != 1 || s.Sessions[0].Calls != 1 || s.Slots != 1 || int(s.Sessions[0].PID) != os.Getpid() {
		t.Errorf("the daemon says %+v", s)
	}
	// A handle that is not of this session: no answer, no end; the next call is served.
	fmt.Fprint(c, string(unhex(t, next)), string(unhex(t, lookup)))
	if _, err := io.ReadFull(c, got[:17]); err != nil || !bytes.Equal(got[:17], unhex(t, answer)) {
		t.Fatalf("after a call with an unknown handle: %x, %v; expected the answer to the call after it", got, err)
	}
	if n := d.State().Unanswered; n != 1 {
		t.Errorf("%d calls not answered, expected 1", n)
	}
	c.Close()
	eventually(t, "the slot is free", func() bool { return d.State().Slots == 0 })
	if v := d.Violations(); len(v) != 0 {
		t.Errorf("violations: %q", v)
	}
}

// TestStrict: every wrong byte gets the shutdown packet, EOF, and a violation.
func TestStrict(t *testing.T) {
	for _, old := range []bool{false, true} {
		dir := "pbis"
		if old {
			dir = "likewise"
		}
		d, path := listen(t, dir+"/.lsassd")
		try := func(what string, b []byte) {
			t.Helper()
			c := dial(t, path)
			if old {
				if _, err := io.ReadFull(c, make([]byte, 19)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.Write(b); err != nil {
				t.Fatal(err)
			}
			c.(*net.UnixConn).CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.HasSuffix(got, unhex(t, goodbye)) {
				t.Errorf("%s: the daemon said %x, %v; expected a shutdown packet and EOF", what, got, err)
			}
			if v := d.Violations(); len(v) != 1 {
				t.Errorf("%s: violations %q, expected one", what, v)
			}
		}
		try("a message before the greeting", unhex(t, lookup))
		good := unhex(t, connect)
		if old {
			try("the newer greeting", good)
			good[4] = 4
		}
		for i := range 7 {
			for _, x := range []byte{1, 8, 0x80} {
				bad := bytes.Clone(good)
				bad[i] ^= x
				try(fmt.Sprintf("byte %d of the greeting ^ %#x", i, x), bad)
			}
		}
		small := bytes.Clone(good)
		small[9], small[10] = 0, 19
		try("tiny packets", small)
		call := unhex(t, lookup)
		for _, i := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14} { // not the cookie
			bad := bytes.Clone(call)
			bad[i] ^= 0x40
			try(fmt.Sprintf("byte %d of a call ^ 0x40", i), append(bytes.Clone(good), bad...))
		}
	}
}

func TestPacketSize(t *testing.T) {
	d, path := listen(t, ".lsassd")
	d.Be(lwmsg.Manners{PacketSize: 64})
	p, err := lwmsg.NewPeer(path, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []interface {
		Call(int16, []byte) ([]byte, error)
	}{lwmsg.NewAssoc(path, false), p} {
		text := bytes.Repeat([]byte("0123456789"), 3000)
		if got, err := c.Call(lwmsg.TagLookup, text); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%T: got %d bytes, %v; expected %d", c, len(got), err, len(text))
		}
	}
	if v := d.Violations(); len(v) != 0 {
		t.Errorf("violations: %q", v)
	}
}

// TestSlots: a connection without a greeting takes a slot for ever.
func TestSlots(t *testing.T) {
	d, path := listen(t, ".lsassd")
	var conns []net.Conn
	for range lwmsg.Slots {
		conns = append(conns, dial(t, path))
	}
	eventually(t, "all slots are taken", func() bool { return d.State().Slots == lwmsg.Slots })
	done := make(chan error, 1)
	go func() {
		_, err := lwmsg.NewAssoc(path, false).Call(lwmsg.TagLookup, []byte("x"))
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("a call was served without a slot: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	conns[7].Close()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("no slot became free")
	}
}

// replace puts a new connection under the fd of a client's; greet makes the
// greeting, read reads the answer to it.
func replace(t *testing.T, path string, fd int, greet, read bool) {
	t.Helper()
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if greet {
		if _, err := unix.Write(s, unhex(t, connect)); err != nil {
			t.Fatal(err)
		}
		if n, _, err := unix.Recvfrom(s, make([]byte, 19), map[bool]int{false: unix.MSG_PEEK}[read]); n != 19 {
			t.Fatalf("the accept packet has %d bytes: %v", n, err)
		}
	}
	if err := unix.Dup3(s, fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
}

func wantErrors(t *testing.T, call func() error, want ...string) {
	t.Helper()
	for i, w := range want {
		if err := fmt.Sprint(call()); !strings.HasPrefix(err, w) {
			t.Errorf("call %d: %s, expected %s", i+1, err, w)
		}
	}
}

func TestAssocFails(t *testing.T) {
	for _, c := range []struct {
		name        string
		greet, read bool
		want        []string
		violation   bool
	}{
		{"without a greeting", false, false, []string{"PEER_CLOSE in a shutdown packet", "BUSY", "BUSY", "BUSY"}, true},
		{"accept packet left unread", true, false, []string{"MALFORMED", "BUSY", "BUSY"}, false},
		{"greeted", true, true, []string{"<nil>", "<nil>"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, path := listen(t, ".lsassd")
			a := lwmsg.NewAssoc(path, false)
			call := func() error { _, err := a.Call(lwmsg.TagLookup, []byte("x")); return err }
			wantErrors(t, call, "<nil>")
			replace(t, path, a.FD(), c.greet, c.read)
			wantErrors(t, call, c.want...)
			if v := d.Violations(); (len(v) == 1) != c.violation {
				t.Errorf("violations: %q", v)
			}
		})
	}
}

func TestAssocHungUp(t *testing.T) {
	_, path := listen(t, ".lsassd")
	a := lwmsg.NewAssoc(path, false)
	call := func() error { _, err := a.Call(lwmsg.TagLookup, []byte("x")); return err }
	wantErrors(t, call, "<nil>")
	if err := unix.Shutdown(a.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	wantErrors(t, call, "PEER_CLOSE", "<nil>")
}

func TestPeerReconnects(t *testing.T) {
	d, path := listen(t, ".lsassd")
	p, err := lwmsg.NewPeer(path, false)
	if err != nil {
		t.Fatal(err)
	}
	call := func() error { _, err := p.Call(lwmsg.TagLookup, []byte("x")); return err }
	wantErrors(t, call, "<nil>")
	if err := unix.Shutdown(p.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	wantErrors(t, call, "<nil>", "<nil>")
	if n := len(d.State().Sessions); n != 2 {
		t.Errorf("%d sessions, expected 2", n)
	}
}
