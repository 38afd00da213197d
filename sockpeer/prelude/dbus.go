// SPDX-License-Identifier: Apache-2.0

package prelude

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Message types and header fields (D-Bus specification, "Message Format").
const (
	dbusMethodReturn = 2
	dbusError        = 3
	dbusSignal       = 4

	dbusMember      = 3
	dbusReplySerial = 5
	dbusSender      = 7
)

// dbusBus is the name of the bus itself.
const dbusBus = "org.freedesktop.DBus"

// dbusSerial is the serial number of Hello, the only call of ours.
const dbusSerial = 1

// dbus authenticates and says Hello (D-Bus specification, "Authentication
// Protocol", "Message Bus"). The connection gets a new unique name: names
// owned, match rules and calls under way are lost.
func dbus(rw io.ReadWriter, uid uint32) error {
	id := hex.EncodeToString([]byte(strconv.FormatUint(uint64(uid), 10)))
	if err := dbusSay(rw, "\x00AUTH EXTERNAL "+id+"\r\n", "OK"); err != nil {
		return err
	}
	if err := dbusSay(rw, "NEGOTIATE_UNIX_FD\r\n", "AGREE_UNIX_FD", "ERROR"); err != nil {
		return err
	}
	if _, err := io.WriteString(rw, "BEGIN\r\n"); err != nil {
		return fmt.Errorf("send BEGIN: %w", err)
	}
	if _, err := rw.Write(dbusHello()); err != nil {
		return fmt.Errorf("send Hello: %w", err)
	}
	// The bus answers with the reply and the signal NameAcquired. Nobody else
	// knows the new name yet, and match rules there are none.
	var replied, acquired bool
	for !replied || !acquired {
		m, err := dbusRead(rw)
		switch {
		case err != nil:
			return err
		case m.sender != "" && m.sender != dbusBus:
			return fmt.Errorf("unexpected message of type %d from %q", m.typ, m.sender)
		case m.typ == dbusError && m.replySerial == dbusSerial:
			return errors.New("the bus refused Hello")
		case m.typ == dbusMethodReturn && m.replySerial == dbusSerial && !replied:
			replied = true
		case m.typ == dbusSignal && m.member == "NameAcquired" && !acquired:
			acquired = true
		default:
			return fmt.Errorf("unexpected message of type %d, member %q, reply to %d", m.typ, m.member, m.replySerial)
		}
	}
	return nil
}

// dbusSay sends a line and reads one, byte for byte to its end, whose first
// word must be one of those expected.
func dbusSay(rw io.ReadWriter, line string, expected ...string) error {
	const most = 512
	if _, err := io.WriteString(rw, line); err != nil {
		return fmt.Errorf("send %q: %w", line, err)
	}
	var got []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(got), "\r\n"); got = append(got, b[0]) {
		if len(got) >= most {
			return unexpected(got)
		}
		if _, err := io.ReadFull(rw, b); err != nil {
			return fmt.Errorf("read the answer to %q: %w", line, err)
		}
	}
	if word, _, _ := strings.Cut(strings.TrimSuffix(string(got), "\r\n"), " "); !slices.Contains(expected, word) {
		return unexpected(got)
	}
	return nil
}

// dbusHello is the method call org.freedesktop.DBus.Hello.
func dbusHello() []byte {
	var fields []byte
	field := func(code byte, sig, value string) {
		fields = append(fields, make([]byte, -len(fields)&7)...)
		fields = append(fields, code, 1, sig[0], 0)
		fields = binary.LittleEndian.AppendUint32(fields, uint32(len(value)))
		fields = append(append(fields, value...), 0)
	}
	field(1, "o", "/org/freedesktop/DBus")
	field(2, "s", dbusBus)
	field(3, "s", "Hello")
	field(6, "s", dbusBus)
	msg := []byte{'l', 1, 0, 1}
	for _, v := range []uint32{0, dbusSerial, uint32(len(fields))} {
		msg = binary.LittleEndian.AppendUint32(msg, v)
	}
	msg = append(msg, fields...)
	return append(msg, make([]byte, -len(msg)&7)...)
}

// dbusMessage is what matters of a message.
type dbusMessage struct {
	typ            byte
	replySerial    uint32
	sender, member string
}

// dbusRead reads one message, to its end.
func dbusRead(r io.Reader) (m dbusMessage, err error) {
	// Names are of 255 bytes at the most, and there are few of them.
	const most = 4 << 10
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return m, fmt.Errorf("read a message: %w", err)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[0] == 'B' {
		order = binary.BigEndian
	} else if head[0] != 'l' {
		return m, unexpected(head)
	}
	const version = 1
	body, length := order.Uint32(head[4:]), order.Uint32(head[12:])
	if head[3] != version || body > most || length > most {
		return m, unexpected(head)
	}
	rest := make([]byte, (length+7)&^7+body)
	if n, err := io.ReadFull(r, rest); err != nil {
		return m, fmt.Errorf("read a message: %d of %d bytes: %w", n, len(rest), err)
	}
	m.typ = head[1]
	if !m.parse(rest[:length], order) {
		return m, unexpected(slices.Concat(head, rest))
	}
	return m, nil
}

// parse reads the header's fields: each begins at a multiple of 8 (here of the
// array as well) with its code and the signature of its value.
func (m *dbusMessage) parse(b []byte, order binary.ByteOrder) bool {
	for at := 0; at < len(b); at = (at + 7) &^ 7 {
		// Code; a signature of one letter, with its length before and a NUL
		// behind it; a length or a number, or the length of a signature.
		if len(b)-at < 6 || b[at+1] != 1 || b[at+3] != 0 {
			return false
		}
		code, kind := b[at], b[at+2]
		at += 4
		if kind == 'g' {
			at += 1 + int(b[at]) + 1
			if at > len(b) {
				return false
			}
			continue
		}
		if len(b)-at < 4 {
			return false
		}
		n := order.Uint32(b[at:])
		at += 4
		if kind == 'u' {
			if code == dbusReplySerial {
				m.replySerial = n
			}
			continue
		}
		if kind != 's' && kind != 'o' || n >= uint32(len(b)-at) || b[at+int(n)] != 0 {
			return false
		}
		switch value := string(b[at : at+int(n)]); code {
		case dbusMember:
			m.member = value
		case dbusSender:
			m.sender = value
		}
		at += int(n) + 1
	}
	return true
}
