// SPDX-License-Identifier: Apache-2.0

package prelude

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// dbus authenticates and says Hello (D-Bus specification, "Authentication
// Protocol", "Message Bus"). The connection gets a new unique name: names
// owned, match rules and calls under way are lost.
func dbus(rw io.ReadWriter, uid uint32) error {
	const maxLine = 512
	id := hex.EncodeToString([]byte(strconv.FormatUint(uint64(uid), 10)))
	if err := dbusSay(rw, "\x00AUTH EXTERNAL "+id+"\r\n", maxLine, "OK "); err != nil {
		return err
	}
	if err := dbusSay(rw, "NEGOTIATE_UNIX_FD\r\n", maxLine, "AGREE_UNIX_FD", "ERROR"); err != nil {
		return err
	}
	if _, err := io.WriteString(rw, "BEGIN\r\n"); err != nil {
		return fmt.Errorf("send BEGIN: %w", err)
	}
	if _, err := rw.Write(dbusHello()); err != nil {
		return fmt.Errorf("send Hello: %w", err)
	}
	// The bus answers with the reply and the signal NameAcquired.
	const methodReturn, failure, signal = 2, 3, 4
	seen := map[byte]bool{}
	for !seen[methodReturn] || !seen[signal] {
		typ, err := dbusSkip(rw)
		switch {
		case err != nil:
			return err
		case typ == failure:
			return errors.New("the bus refused Hello")
		case typ != methodReturn && typ != signal || seen[typ]:
			return fmt.Errorf("unexpected message of type %d", typ)
		}
		seen[typ] = true
	}
	return nil
}

// dbusSay sends a line and reads one, byte for byte to its end, which must
// begin in one of the ways expected.
func dbusSay(rw io.ReadWriter, line string, most int, expected ...string) error {
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
	for _, e := range expected {
		if strings.HasPrefix(string(got), e) {
			return nil
		}
	}
	return unexpected(got)
}

// dbusHello is the method call org.freedesktop.DBus.Hello, serial 1.
func dbusHello() []byte {
	var fields []byte
	field := func(code byte, sig, value string) {
		fields = append(fields, make([]byte, -len(fields)&7)...)
		fields = append(fields, code, 1, sig[0], 0)
		fields = binary.LittleEndian.AppendUint32(fields, uint32(len(value)))
		fields = append(append(fields, value...), 0)
	}
	field(1, "o", "/org/freedesktop/DBus")
	field(2, "s", "org.freedesktop.DBus")
	field(3, "s", "Hello")
	field(6, "s", "org.freedesktop.DBus")
	msg := []byte{'l', 1, 0, 1}
	for _, v := range []uint32{0, 1, uint32(len(fields))} {
		msg = binary.LittleEndian.AppendUint32(msg, v)
	}
	msg = append(msg, fields...)
	return append(msg, make([]byte, -len(msg)&7)...)
}

// dbusSkip reads one message and returns its type.
func dbusSkip(r io.Reader) (typ byte, err error) {
	const most = 64 << 10
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, fmt.Errorf("read a message: %w", err)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[0] == 'B' {
		order = binary.BigEndian
	} else if head[0] != 'l' {
		return 0, unexpected(head)
	}
	body, fields := order.Uint32(head[4:]), order.Uint32(head[12:])
	if body > most || fields > most {
		return 0, unexpected(head)
	}
	padded := int64(fields+7)&^7 + int64(body)
	if n, err := io.CopyN(io.Discard, r, padded); err != nil {
		return 0, fmt.Errorf("read a message: %d of %d bytes: %w", n, padded, err)
	}
	return head[1], nil
}
