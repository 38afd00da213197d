// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// include/uapi/linux/unix_diag.h; x/sys has none of them.
const (
	sockDiagByFamily = 20

	udiagShowName  = 0x01
	udiagShowVFS   = 0x02
	udiagShowPeer  = 0x04
	udiagShowIcons = 0x08
	udiagShowRqlen = 0x10
	udiagShowUID   = 0x40
	udiagShowAll   = udiagShowName | udiagShowVFS | udiagShowPeer | udiagShowIcons | udiagShowRqlen | udiagShowUID

	unixDiagName     = 0
	unixDiagVFS      = 1
	unixDiagPeer     = 2
	unixDiagIcons    = 3
	unixDiagRqlen    = 4
	unixDiagShutdown = 6
	unixDiagUID      = 7

	unixDiagReqLen = 24
	unixDiagMsgLen = 16
)

// diagSocket is one unix socket as sock_diag tells it.
type diagSocket struct {
	inode    uint32
	typ      Type
	state    State
	name     Name
	vfs      VFS
	peer     uint32
	icons    []uint32 // of a listener: who waits to be accepted
	rqueue   uint32
	wqueue   uint32
	shutdown int
	uid      int64
	netns    uint64
}

// diagConn asks sock_diag in one network namespace.
type diagConn struct {
	c     *netlink.Conn
	netns uint64
}

func dialDiag(ns netns) (*diagConn, error) {
	config := &netlink.Config{}
	if !ns.own() {
		config.NetNS = int(ns.file.Fd())
	}
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, config)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag in network namespace %d: %w", ns.inode, err)
	}
	return &diagConn{c: c, netns: ns.inode}, nil
}

func (d *diagConn) Close() error { return d.c.Close() }

// all returns every unix socket of the namespace. Sockets that come or go
// meanwhile may be missed, as the kernel walks its table in several steps:
// one() asks for those exactly.
func (d *diagConn) all() ([]diagSocket, error) {
	return d.query(0, netlink.Request|netlink.Dump)
}

// one returns the socket with this inode, or nil if there is none.
func (d *diagConn) one(inode uint32) (*diagSocket, error) {
	s, err := d.query(inode, netlink.Request)
	if errors.Is(err, unix.ENOENT) || err == nil && len(s) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &s[0], nil
}

func (d *diagConn) query(inode uint32, flags netlink.HeaderFlags) ([]diagSocket, error) {
	req := make([]byte, unixDiagReqLen)
	req[0] = unix.AF_UNIX
	ne := binary.NativeEndian
	ne.PutUint32(req[4:], ^uint32(0)) // all states
	ne.PutUint32(req[8:], inode)
	ne.PutUint32(req[12:], udiagShowAll)
	ne.PutUint32(req[16:], ^uint32(0)) // no cookie
	ne.PutUint32(req[20:], ^uint32(0))
	msgs, err := d.c.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: flags},
		Data:   req,
	})
	if err != nil {
		return nil, fmt.Errorf("ask sock_diag for unix sockets in network namespace %d: %w", d.netns, err)
	}
	out := make([]diagSocket, 0, len(msgs))
	for _, m := range msgs {
		s, err := parseDiag(m.Data)
		if err != nil {
			return nil, err
		}
		s.netns = d.netns
		out = append(out, s)
	}
	return out, nil
}

// parseDiag reads a struct unix_diag_msg and its attributes.
func parseDiag(b []byte) (diagSocket, error) {
	if len(b) < unixDiagMsgLen || b[0] != unix.AF_UNIX {
		return diagSocket{}, fmt.Errorf("sock_diag answered %d bytes that are no unix_diag_msg", len(b))
	}
	s := diagSocket{
		typ:   Type(b[1]),
		state: State(b[2]),
		inode: binary.NativeEndian.Uint32(b[4:8]),
		uid:   -1,
	}
	ad, err := netlink.NewAttributeDecoder(b[unixDiagMsgLen:])
	if err != nil {
		return diagSocket{}, fmt.Errorf("read sock_diag's attributes of socket %d: %w", s.inode, err)
	}
	for ad.Next() {
		switch ad.Type() {
		case unixDiagName:
			s.name = cleanName(ad.Bytes())
		case unixDiagVFS:
			// struct unix_diag_vfs: inode first, then device
			if v := ad.Bytes(); len(v) >= 8 {
				s.vfs = VFS{Inode: binary.NativeEndian.Uint32(v[:4]), Dev: binary.NativeEndian.Uint32(v[4:8])}
			}
		case unixDiagPeer:
			s.peer = ad.Uint32()
		case unixDiagIcons:
			v := ad.Bytes()
			for ; len(v) >= 4; v = v[4:] {
				s.icons = append(s.icons, binary.NativeEndian.Uint32(v[:4]))
			}
		case unixDiagRqlen:
			if v := ad.Bytes(); len(v) >= 8 {
				s.rqueue, s.wqueue = binary.NativeEndian.Uint32(v[:4]), binary.NativeEndian.Uint32(v[4:8])
			}
		case unixDiagShutdown:
			s.shutdown = int(ad.Uint8())
		case unixDiagUID:
			s.uid = int64(ad.Uint32())
		}
	}
	if err := ad.Err(); err != nil {
		return diagSocket{}, fmt.Errorf("read sock_diag's attributes of socket %d: %w", s.inode, err)
	}
	return s, nil
}

// cleanName drops what follows the first NUL of a path: the kernel hands out
// as many bytes as bind() was given. An abstract name is kept to its last byte.
func cleanName(b []byte) Name {
	if len(b) == 0 || b[0] == 0 {
		return Name(b)
	}
	s, _, _ := strings.Cut(string(b), "\x00")
	return Name(s)
}

// nameFromSockaddr reads a struct sockaddr_un of n bytes (getpeername(2)).
func nameFromSockaddr(b []byte) Name {
	if len(b) <= 2 || binary.NativeEndian.Uint16(b) != unix.AF_UNIX {
		return ""
	}
	return cleanName(b[2:])
}
