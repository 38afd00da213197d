// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"golang.org/x/sys/unix"
	pb "google.golang.org/protobuf/proto"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// sockets gives each connection of the record its form.
func (e *edit) sockets(rec *proto.Record) error {
	ours := map[uint32]*file{}
	for _, r := range e.files {
		u := r.unix()
		if u == nil || u.GetUflags()&uskExtern != 0 {
			continue
		}
		if ours[u.GetIno()] != nil {
			return fmt.Errorf("two sockets in %s have the inode %d: the images are damaged", filesName, u.GetIno())
		}
		ours[u.GetIno()] = r
	}
	left := map[uint32]bool{} // inodes of peers that lost one of ours
	for _, c := range rec.GetConnections() {
		r := ours[c.GetInode()]
		if r == nil {
			return fmt.Errorf("the images do not hold %s, which was there when the tree was frozen; dump again", describe(c))
		}
		e.leaves[r.unix().GetId()] = true
		if err := e.socketOf(c, r, ours, left); err != nil {
			return fmt.Errorf("%s: %w", describe(c), err)
		}
	}
	e.dropPeers(left)
	return nil
}

func (e *edit) socketOf(c *proto.Connection, r *file, ours map[uint32]*file, left map[uint32]bool) error {
	u := r.unix()
	switch {
	case u.GetType() != c.GetType():
		return fmt.Errorf("it is of type %v in the images; dump again", sockpeer.Type(u.GetType()))
	case sockpeer.State(u.GetState()) == sockpeer.Listening:
		return fmt.Errorf("it is a listening socket in the images; dump again")
	case u.GetUflags() != 0:
		return fmt.Errorf("CRIU marked it in the images (flags %#x), so that a plugin or CRIU itself restores it; take the plugin away, or a rule that refuses it", u.GetUflags())
	case u.GetPeer() != 0 && ours[u.GetPeer()] != nil:
		return fmt.Errorf("its peer %d is inside the images; dump again", u.GetPeer())
	}
	dormant, err := e.wantsDormant(c, u)
	if err != nil {
		return err
	}
	sock := e.socket(u)
	if dormant && sock.Dormant() || !dormant && sock.Dead() {
		return nil
	}
	entry := pb.Clone(r.entry).(*fdinfo.FileEntry)
	u = entry.GetUsk()
	if p := u.GetPeer(); p != 0 {
		left[p] = true
	}
	u.Peer = pb.Uint32(0)
	if dormant {
		u.State = pb.Uint32(uint32(sockpeer.Closed))
		u.Shutdown = nil
	} else {
		u.State = pb.Uint32(uint32(sockpeer.Established))
		u.Shutdown = sk_opts.SkShutdown_BOTH.Enum()
	}
	e.changed[r] = entry
	return nil
}

// wantsDormant tells a dormant socket from a dead one. A datagram socket has
// no dead form. Queued bytes come back in a dead stream and in an unconnected
// datagram socket (criu/sk-unix.c, add_fake_unix_queuers), else they are lost.
func (e *edit) wantsDormant(c *proto.Connection, u *sk_unix.UnixSkEntry) (bool, error) {
	n := e.queued[u.GetId()]
	switch c.GetAction() {
	case proto.Action_ACTION_RECONNECT:
		if n > 0 {
			return false, fmt.Errorf("it is to be reconnected, but holds %d bytes not yet read, which would be lost; dump again, or let a rule hang it up", n)
		}
		if u.GetType() != unix.SOCK_DGRAM && len(u.GetName()) > 0 {
			if err := e.nameFree(u); err != nil {
				return false, err
			}
		}
		return true, nil
	case proto.Action_ACTION_HANGUP:
		return u.GetType() == unix.SOCK_DGRAM, nil
	}
	return false, fmt.Errorf("unknown action %d", c.GetAction())
}

// nameFree refuses a dormant socket that would bind the name of a listener:
// it was accepted there, and cannot be connected again.
func (e *edit) nameFree(u *sk_unix.UnixSkEntry) error {
	for _, r := range e.files {
		l := r.unix()
		if l != nil && l.GetUflags()&uskExtern == 0 && sockpeer.State(l.GetState()) == sockpeer.Listening &&
			string(l.GetName()) == string(u.GetName()) {
			return fmt.Errorf("it is to be reconnected, but was accepted by the listener %d on %v; let a rule hang it up", l.GetIno(), boundTo(l))
		}
	}
	return nil
}

// dropPeers drops the pseudo entries of peers that nobody is connected to any
// more.
func (e *edit) dropPeers(left map[uint32]bool) {
	for _, r := range e.files {
		if u := r.unix(); u != nil && u.GetPeer() != 0 && e.changed[r] == nil {
			delete(left, u.GetPeer())
		}
	}
	for _, r := range e.files {
		if u := r.unix(); u != nil && u.GetUflags()&uskExtern != 0 && left[u.GetIno()] {
			e.dropped[r] = true
		}
	}
}

// describe names a connection by inode, peer and first holder.
func describe(c *proto.Connection) string {
	s := fmt.Sprintf("connection %d to %q (peer %d)", c.GetInode(), sockpeer.Name(c.GetPeer().GetName()).String(), c.GetPeer().GetInode())
	if len(c.GetHolders()) > 0 {
		h := c.GetHolders()[0]
		s += fmt.Sprintf(" of process %d (%s) on fd %d", h.GetPid(), h.GetComm(), h.GetFd())
	}
	return s
}
