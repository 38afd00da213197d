// SPDX-License-Identifier: Apache-2.0

package interpose

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Offsets and values of netlink(7), sock_diag(7) and
// include/uapi/linux/unix_diag.h.
const (
	nlHeaderLen      = 16
	sockDiagByFamily = 20

	diagMsgLen  = 16
	offFamily   = 0
	offType     = 1
	offState    = 2
	offInode    = 4
	attrHdrLen  = 4
	attrPeer    = 2
	attrIcons   = 3
	attrShut    = 6
	attrUnknown = 0x3000 // no attribute CRIU knows; it skips those
	attrMask    = 0x3fff // without the flags NLA_F_NESTED, NLA_F_NET_BYTEORDER

	stateEstablished = 1
	stateClosed      = 7
	shutdownBoth     = 3
)

// walk calls fn for every netlink message in b, header included.
func walk(b []byte, fn func(msg []byte, typ uint16) error) error {
	for len(b) >= nlHeaderLen {
		n := int(binary.NativeEndian.Uint32(b))
		if n < nlHeaderLen || n > len(b) {
			return fmt.Errorf("netlink message of %d bytes in an answer of %d", n, len(b))
		}
		if err := fn(b[:n], binary.NativeEndian.Uint16(b[4:])); err != nil {
			return err
		}
		b = b[min(align(n), len(b)):]
	}
	return nil
}

func align(n int) int { return (n + 3) &^ 3 }

// asksForUnix reports whether a request is for a dump of unix sockets.
func asksForUnix(b []byte) bool {
	return len(b) > nlHeaderLen && binary.NativeEndian.Uint16(b[4:]) == sockDiagByFamily &&
		b[nlHeaderLen+offFamily] == unix.AF_UNIX
}

// endsDump reports whether an answer holds the last message of a dump.
func endsDump(b []byte) (done bool, err error) {
	err = walk(b, func(_ []byte, typ uint16) error {
		done = done || typ == unix.NLMSG_DONE || typ == unix.NLMSG_ERROR
		return nil
	})
	return done, err
}

// edit gives the sockets in forms the form they shall have in the image, in
// place: no message changes its length. It reports whether it changed b.
func edit(b []byte, forms map[uint32]Form) (changed bool, err error) {
	err = walk(b, func(msg []byte, typ uint16) error {
		if typ != sockDiagByFamily {
			return nil
		}
		body := msg[nlHeaderLen:]
		if len(body) < diagMsgLen || body[offFamily] != unix.AF_UNIX {
			return nil
		}
		form, ours := forms[binary.NativeEndian.Uint32(body[offInode:])]
		if form == Dead && body[offType] == unix.SOCK_DGRAM {
			form = Dormant // a datagram socket whose peer has gone is unconnected
		}
		if ours {
			body[offState] = stateClosed
			if form == Dead {
				body[offState] = stateEstablished
			}
			changed = true
		}
		return attributes(body[diagMsgLen:], func(hdr, val []byte, typ uint16) {
			switch {
			case ours && typ == attrPeer:
				binary.NativeEndian.PutUint16(hdr[2:], attrUnknown)
			case ours && typ == attrShut && len(val) > 0:
				val[0] = 0
				if form == Dead {
					val[0] = shutdownBoth
				}
			case typ == attrIcons && hasAny(val, forms):
				// The backlog of a listener outside of the tree: CRIU
				// would restore our half as one that waits in it.
				binary.NativeEndian.PutUint16(hdr[2:], attrUnknown)
				changed = true
			}
		})
	})
	return changed, err
}

// attributes calls fn with the header and value of every attribute.
func attributes(b []byte, fn func(hdr, val []byte, typ uint16)) error {
	for len(b) >= attrHdrLen {
		n := int(binary.NativeEndian.Uint16(b))
		if n < attrHdrLen || n > len(b) {
			return fmt.Errorf("netlink attribute of %d bytes in %d", n, len(b))
		}
		fn(b[:attrHdrLen], b[attrHdrLen:n], binary.NativeEndian.Uint16(b[2:])&attrMask)
		b = b[min(align(n), len(b)):]
	}
	return nil
}

// hasAny reports whether one of the inodes in an ICONS attribute is in forms.
func hasAny(icons []byte, forms map[uint32]Form) bool {
	for ; len(icons) >= 4; icons = icons[4:] {
		if _, ok := forms[binary.NativeEndian.Uint32(icons)]; ok {
			return true
		}
	}
	return false
}
