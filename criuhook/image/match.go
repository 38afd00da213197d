// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"slices"

	"criuhook/proto"
)

// ErrForeign: the record was written with other images; for errors.Is.
var ErrForeign = errors.New("it is not of these images")

// Match checks that the record was written with these images: each of its
// connections is in them, under the fds it names, in the form it says. Else a
// socket could be connected to the daemon of another.
func (s *Set) Match(rec *proto.Record) error {
	if len(rec.GetConnections()) == 0 {
		return nil
	}
	socks := map[uint32]Socket{}
	for _, sock := range s.Sockets() {
		socks[sock.Inode] = sock
	}
	for _, c := range rec.GetConnections() {
		if why := mismatch(c, socks); why != "" {
			return fmt.Errorf("%s: %w: %s %s; take %s from where these images were written, or dump again",
				s.f.path(RecordName), ErrForeign, describe(c), why, RecordName)
		}
	}
	return nil
}

// mismatch says why a connection of a record is not in the images.
func mismatch(c *proto.Connection, socks map[uint32]Socket) string {
	sock, ok := socks[c.GetInode()]
	if !ok || uint32(sock.Type) != c.GetType() {
		return "is not in them"
	}
	for _, h := range c.GetHolders() {
		if !slices.ContainsFunc(sock.Holders, func(o Holder) bool { return o.PID == int(h.GetPid()) && o.FD == int(h.GetFd()) }) {
			return fmt.Sprintf("is not under fd %d of process %d in them", h.GetFd(), h.GetPid())
		}
	}
	if c.GetAction() == proto.Action_ACTION_RECONNECT && !sock.Dormant() {
		return "is not unconnected in them"
	}
	return ""
}
