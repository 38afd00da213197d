// SPDX-License-Identifier: Apache-2.0

package prelude_test

import (
	"bytes"
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

// message is a D-Bus message of a type with fields and body of given sizes.
func message(typ byte, fields, body int) []byte {
	b := []byte{'l', typ, 0, 1}
	for _, v := range []int{body, 7, fields} {
		b = binary.LittleEndian.AppendUint32(b, uint32(v))
	}
	return append(b, make([]byte, (fields+7)&^7+body)...)
}

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
		{name: "dbus", kind: "dbus", answers: slices.Concat([]byte("OK 0123\r\nAGREE_UNIX_FD\r\n"), message(2, 61, 9), message(4, 141, 9))},
		{name: "dbus without fds", kind: "dbus", answers: slices.Concat([]byte("OK 0123\r\nERROR no\r\n"), message(4, 8, 0), message(2, 3, 1))},
		{name: "dbus rejects", kind: "dbus", answers: []byte("REJECTED EXTERNAL\r\n"), err: "unexpected answer"},
		{name: "dbus endless line", kind: "dbus", answers: bytes.Repeat([]byte("x"), 4096), err: "unexpected answer"},
		{name: "dbus refuses Hello", kind: "dbus", answers: slices.Concat([]byte("OK 0123\r\nAGREE_UNIX_FD\r\n"), message(3, 8, 0)), err: "refused Hello"},
		{name: "dbus huge message", kind: "dbus", answers: slices.Concat([]byte("OK 0123\r\nAGREE_UNIX_FD\r\n"), message(2, 8, 0)[:4], unhex(t, "ffffff7f 01000000 08000000")), err: "unexpected answer"},
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
