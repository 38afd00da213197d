// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"

	"criuhook/sockpeer"
)

// uskExtern marks the pseudo entry of a peer outside of the tree; in CRIU's
// criu/sk-unix.c it is USK_EXTERN.
const uskExtern = 1

// uskService marks a socket by which a process asked CRIU for its own dump:
// CRIU restores it as one whose peer has sent the answer, and gone. There it is
// USK_SERVICE.
const uskService = 2

// shutBoth is a socket that can neither receive nor send any more.
const shutBoth = 3

// Socket is a unix socket in the images.
type Socket struct {
	Inode uint32         `json:"inode"`
	Type  sockpeer.Type  `json:"type"`
	State sockpeer.State `json:"state"`
	Peer  uint32         `json:"peer"` // inode; 0: none
	// Name is what it is bound to. An accepted half has its listener's.
	Name     sockpeer.Name `json:"name,omitempty"`
	Shutdown int           `json:"shutdown"` // bit 0: receive, bit 1: send
	// Flags are the file status flags, without close-on-exec.
	Flags uint32 `json:"flags"`
	// Queued are the bytes in its receive queue, an empty datagram as one.
	Queued  uint64   `json:"queued"`
	Holders []Holder `json:"holders"`
	// NetnsID is CRIU's number of its network namespace; OwnNetns: that is
	// not the one CRIU itself ran in.
	NetnsID  uint32 `json:"netns_id"`
	OwnNetns bool   `json:"own_netns"`
	// Labelled: the images have a security label (SELinux) for an fd on it.
	Labelled bool `json:"-"`
	// Options and Owner are as CRIU's images have them. Do not change them.
	Options *sk_opts.SkOptsEntry `json:"-"`
	Owner   *fown.FownEntry      `json:"-"`
}

// Dormant reports whether the socket is unconnected and could be connected.
// That is the form of a connection that is to be made again; a socket that
// never was connected has it too.
func (s *Socket) Dormant() bool {
	return s.State == sockpeer.Closed && s.Peer == 0 && s.Shutdown == 0
}

// Dead reports whether the socket's peer is gone for good.
func (s *Socket) Dead() bool {
	return s.Type != sockpeer.Dgram && s.State == sockpeer.Established && s.Peer == 0 && s.Shutdown == shutBoth
}

// Sockets are the unix sockets of the tree, in the order of files.img,
// without CRIU's pseudo entries for peers.
func (s *Set) Sockets() []Socket {
	var out []Socket
	for _, r := range s.files {
		if u := r.unix(); u != nil && u.GetUflags()&uskExtern == 0 {
			out = append(out, s.socket(u))
		}
	}
	return out
}

// boundTo is the name of a socket. CRIU writes what sock_diag gives it: of a
// path with the NUL at its end, which is no part of it.
func boundTo(u *sk_unix.UnixSkEntry) sockpeer.Name {
	name := u.GetName()
	if i := bytes.IndexByte(name, 0); i > 0 {
		name = name[:i]
	}
	return sockpeer.Name(name)
}

func (s *Set) socket(u *sk_unix.UnixSkEntry) Socket {
	return Socket{
		Inode:    u.GetIno(),
		Type:     sockpeer.Type(u.GetType()),
		State:    sockpeer.State(u.GetState()),
		Peer:     u.GetPeer(),
		Name:     boundTo(u),
		Shutdown: int(u.GetShutdown()),
		Flags:    u.GetFlags(),
		Queued:   s.queued[u.GetId()],
		Holders:  s.users[u.GetId()],
		NetnsID:  u.GetNsId(),
		OwnNetns: u.NsId != nil && s.inv.RootIds != nil && u.GetNsId() != s.inv.RootIds.GetNetNsId(),
		Labelled: s.labelled[u.GetId()],
		Options:  u.GetOpts(),
		Owner:    u.GetFown(),
	}
}

// External is a half connection: a socket whose peer is not in the images.
type External struct {
	Socket Socket `json:"socket"`
	// PeerName is what the peer is bound to, as far as CRIU noted it.
	PeerName sockpeer.Name `json:"peer_name,omitempty"`
}

// External are the half connections. Images made by criuhook have none.
func (s *Set) External() []External {
	ours := map[uint32]bool{}
	names := map[uint32]sockpeer.Name{}
	for _, r := range s.files {
		u := r.unix()
		switch {
		case u == nil:
		case u.GetUflags()&uskExtern != 0:
			names[u.GetIno()] = boundTo(u)
		default:
			ours[u.GetIno()] = true
		}
	}
	var out []External
	for _, sock := range s.Sockets() {
		if sock.Peer != 0 && !ours[sock.Peer] {
			out = append(out, External{sock, names[sock.Peer]})
		}
	}
	return out
}
