// SPDX-License-Identifier: Apache-2.0

package prelude_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"io"
	"slices"
	"strings"
	"testing"

	"criuhook/sockpeer/prelude"
)

// script is a daemon that answers, whatever it is told.
type script struct {
	said    bytes.Buffer
	answers *bytes.Reader
}

func (s *script) Write(b []byte) (int, error) { return s.said.Write(b) }
func (s *script) Read(b []byte) (int, error)  { return s.answers.Read(b) }

func host(words ...uint32) []byte {
	var b []byte
	for _, w := range words {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return b
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// field is a header field of a D-Bus message, of signature s or u.
type field struct {
	code byte
	text string // "": number
	n    uint32
	sig  byte // 0: s or u
}

var le = binary.LittleEndian

// message is a D-Bus message as a bus sends it, with a body of a given size.
func message(order binary.AppendByteOrder, typ byte, body int, fields ...field) []byte {
	var f []byte
	for _, x := range fields {
		f = append(f, make([]byte, -len(f)&7)...)
		if x.text == "" {
			f = order.AppendUint32(append(f, x.code, 1, 'u', 0), x.n)
			continue
		}
		f = order.AppendUint32(append(f, x.code, 1, cmp.Or(x.sig, 's'), 0), uint32(len(x.text)))
		f = append(append(f, x.text...), 0)
	}
	b := []byte{'l', typ, 0, 1}
	if order == binary.AppendByteOrder(binary.BigEndian) {
		b[0] = 'B'
	}
	for _, v := range []int{body, 7, len(f)} {
		b = order.AppendUint32(b, uint32(v))
	}
	f = append(f, make([]byte, -len(f)&7)...)
	return slices.Concat(b, f, make([]byte, body))
}

var (
	fromBus  = field{code: 7, text: "org.freedesktop.DBus"}
	toUs     = field{code: 6, text: ":1.77"}
	reply    = message(le, 2, 10, toUs, field{code: 5, n: 1}, fromBus)
	acquired = message(le, 4, 10, toUs, field{code: 3, text: "NameAcquired"}, fromBus)
)

const loggedIn = "OK 0123456789abcdef\r\nAGREE_UNIX_FD\r\n"

// bus is what a bus answers after the login.
func bus(messages ...[]byte) []byte { return append([]byte(loggedIn), slices.Concat(messages...)...) }

func TestRun(t *testing.T) {
	const more = "the application's own bytes"
	tests := []struct {
		name, kind, path string
		answers          []byte
		said             []byte // nil: not compared
		err              string
	}{
		{name: "none", kind: "none"},
		{name: "nss", kind: "sssd", path: "/var/lib/sss/pipes/nss", answers: host(20, 1, 0, 0, 1), said: host(20, 1, 0, 0, 1)},
		{name: "private pam", kind: "sssd", path: "/var/lib/sss/pipes/private/pam", answers: host(20, 1, 0, 0, 3), said: host(20, 1, 0, 0, 3)},
		{name: "ssh is version 0", kind: "sssd", path: "/var/lib/sss/pipes/ssh", answers: host(20, 1, 0, 0, 0)},
		{name: "unknown pipe", kind: "sssd", path: "/var/lib/sss/pipes/infopipe", err: "no sssd service"},
		{name: "wrong version", kind: "sssd", path: "/p/nss", answers: host(20, 1, 0, 0, 9), err: "unexpected answer"},
		{name: "status", kind: "sssd", path: "/p/nss", answers: host(20, 1, 5, 0, 1), err: "unexpected answer"},
		{name: "EOF", kind: "sssd", path: "/p/nss", answers: host(20, 1), err: "unexpected EOF"},
		{name: "lwmsg", kind: "lwmsg", answers: unhex(t, "00000013 03 03 00 00002000 0102030405060708")},
		{name: "lwmsg shutdown", kind: "lwmsg", answers: unhex(t, "0000000a 05 03 00000013"), err: "unexpected answer 0000000a0503"},
		{name: "lwmsg tiny packets", kind: "lwmsg", answers: unhex(t, "00000013 03 03 00 00000013 0102030405060708"), err: "packets of 19 bytes"},
		{name: "lwmsg another packet size", kind: "lwmsg", answers: unhex(t, "00000013 03 03 00 00001000 0102030405060708"), err: "packets of 4096 bytes"},
		{name: "lwmsg greeting flags", kind: "lwmsg", answers: unhex(t, "00000013 03 03 01 00002000 0102030405060708"), err: "unexpected answer"},
		{name: "lwmsg first fragment only", kind: "lwmsg", answers: unhex(t, "00000013 03 01 00 00002000 0102030405060708"), err: "unexpected answer"},
		{name: "lwmsg connect packet", kind: "lwmsg", answers: unhex(t, "00000013 02 03 00 00002000 0102030405060708"), err: "unexpected answer"},
		{name: "lwmsg of Likewise", kind: "lwmsg", answers: unhex(t, "00000013 04 03 00 00002000 0102030405060708"), err: "unexpected answer 000000130403"},
		{name: "lwmsg huge", kind: "lwmsg", answers: unhex(t, "ffffffff 03 03 00 00002000 0102030405060708"), err: "unexpected answer"},
		{name: "dbus", kind: "dbus", answers: bus(reply, acquired)},
		{name: "dbus big-endian", kind: "dbus", answers: bus(message(binary.BigEndian, 2, 10, field{code: 5, n: 1}, fromBus), message(binary.BigEndian, 4, 10, field{code: 3, text: "NameAcquired"}, fromBus))},
		{name: "dbus without fds", kind: "dbus", answers: slices.Concat([]byte("OK 0123\r\nERROR no\r\n"), acquired, reply)},
		{name: "dbus rejects", kind: "dbus", answers: []byte("REJECTED EXTERNAL\r\n"), err: "unexpected answer"},
		{name: "dbus another word", kind: "dbus", answers: []byte("OKAY 0123\r\n"), err: "unexpected answer"},
		{name: "dbus endless line", kind: "dbus", answers: bytes.Repeat([]byte("x"), 4096), err: "unexpected answer"},
		{name: "dbus refuses Hello", kind: "dbus", answers: bus(message(le, 3, 0, field{code: 5, n: 1}, fromBus)), err: "refused Hello"},
		{name: "dbus huge message", kind: "dbus", answers: bus(unhex(t, "6c020001 ffffff7f 01000000 08000000")), err: "unexpected answer"},
		{name: "dbus huge header", kind: "dbus", answers: bus(unhex(t, "6c020001 00000000 01000000 ffffffff")), err: "unexpected answer"},
		{name: "dbus another version", kind: "dbus", answers: bus(unhex(t, "6c020002 00000000 01000000 00000000")), err: "unexpected answer"},
		{name: "dbus replies twice", kind: "dbus", answers: bus(reply, reply), err: "unexpected message of type 2"},
		{name: "dbus another call's reply", kind: "dbus", answers: bus(message(le, 2, 0, field{code: 5, n: 9}, fromBus)), err: "reply to 9"},
		{name: "dbus another signal", kind: "dbus", answers: bus(reply, message(le, 4, 0, field{code: 3, text: "NameLost"}, fromBus)), err: `member "NameLost"`},
		{name: "dbus somebody else", kind: "dbus", answers: bus(reply, message(le, 4, 0, field{code: 3, text: "NameAcquired"}, field{code: 7, text: ":1.5"})), err: `from ":1.5"`},
		{name: "dbus field cut off", kind: "dbus", answers: bus(unhex(t, "6c020001 00000000 01000000 08000000 0501750000000000")[:23], make([]byte, 1)), err: "unexpected message"},
		{name: "dbus string too long", kind: "dbus", answers: bus(unhex(t, "6c020001 00000000 01000000 0c000000 07017300 ffffffff 41000000 00000000")), err: "unexpected answer"},
		{name: "no such prelude", kind: "imap", err: `called "imap"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := &script{answers: bytes.NewReader(append(slices.Clone(tt.answers), more...))}
			if tt.err == "unexpected EOF" {
				d.answers = bytes.NewReader(tt.answers)
			}
			err := prelude.Run(tt.kind, d, prelude.Peer{Path: tt.path, UID: 1000})
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, expected %q in it", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tt.said != nil && !bytes.Equal(d.said.Bytes(), tt.said) {
				t.Errorf("said %x, expected %x", d.said.Bytes(), tt.said)
			}
			if rest, _ := io.ReadAll(d.answers); string(rest) != more {
				t.Errorf("left %q unread, expected %q", rest, more)
			}
		})
	}
}

func TestLwmsgGreeting(t *testing.T) {
	d := &script{answers: bytes.NewReader(unhex(t, "00000013 03 03 00 00002000 0102030405060708"))}
	if err := prelude.Run("lwmsg", d, prelude.Peer{}); err != nil {
		t.Fatal(err)
	}
	if got, want := d.said.Bytes(), unhex(t, "00000013 02 03 00 00002000"); len(got) != 19 || !bytes.HasPrefix(got, want) {
		t.Errorf("greeting %x, expected %x and a cookie of 8 bytes", got, want)
	}
}
