// SPDX-License-Identifier: Apache-2.0

package prelude

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
)

// lwmsg exchanges the greetings of PBIS' lwmsg (pbis-open:
// lwmsg/include/connection-private.h): 19 bytes each way, big-endian: u32
// length, u8 type, u8 flags, u8 greeting flags, u32 packet size, 8 bytes cookie.
// The server keeps silent until greeted, and remembers no cookie.
func lwmsg(rw io.ReadWriter) error {
	const (
		length     = 19
		connect    = 2
		accept     = 3
		firstLast  = 3
		packetSize = 8192
	)
	b := binary.BigEndian.AppendUint32(nil, length)
	b = append(b, connect, firstLast, 0)
	b = binary.BigEndian.AppendUint32(b, packetSize)
	b = append(b, make([]byte, 8)...)
	if _, err := rand.Read(b[length-8:]); err != nil {
		return fmt.Errorf("make a cookie: %w", err)
	}
	if _, err := rw.Write(b); err != nil {
		return fmt.Errorf("send the greeting: %w", err)
	}
	// A server that shuts down answers with a shorter packet.
	head := make([]byte, 6)
	if _, err := io.ReadFull(rw, head); err != nil {
		return fmt.Errorf("read the greeting: %w", err)
	}
	if binary.BigEndian.Uint32(head) != length || head[4] != accept || head[5] != firstLast {
		return unexpected(head)
	}
	rest := make([]byte, length-len(head))
	if _, err := io.ReadFull(rw, rest); err != nil {
		return fmt.Errorf("read the greeting: %w", err)
	}
	if rest[0] != 0 { // a way to log in without SO_PEERCRED, not of Linux
		return unexpected(append(head, rest...))
	}
	// The application goes by the size it agreed on, which nobody else knows:
	// in all builds that of the offer.
	if size := binary.BigEndian.Uint32(rest[1:]); size != packetSize {
		return fmt.Errorf("the server takes packets of %d bytes, the application sends up to %d", size, packetSize)
	}
	return nil
}
