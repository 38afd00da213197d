// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Inherited is a socket for CRIU to use instead of the one that was dumped.
type Inherited struct {
	Socket *sockpeer.Socket
	Key    string // CRIU's name of it, for --inherit-fd
}

// Leave leaves a socket to the caller, who has one of his own for CRIU to
// inherit under this key.
func (r *Restore) Leave(key string) {
	for _, s := range r.sockets() {
		if key == inheritKey(s.Inode) {
			r.inherited[s.Inode] = true
		}
	}
}

// LeaveDatagrams leaves the datagram sockets of images that are CRIU's alone to
// CRIU, which was told to connect them (--ext-unix-sk).
func (r *Restore) LeaveDatagrams() {
	if !r.half {
		return
	}
	for _, s := range r.sockets() {
		if s.Type == sockpeer.Dgram {
			r.inherited[s.Inode] = true
		}
	}
}

// inheritKey is CRIU's name of a socket to inherit (criu/sk-unix.c,
// socket_d_name).
func inheritKey(inode uint32) string { return fmt.Sprintf("socket:[%d]", inode) }

// Inherit connects all sockets that can be made before their processes exist.
// It is the better way, since the daemon then sees the pid of the process to
// be restored, if that is free. The others are left for Reconnect. The sockets
// are the caller's to close, once CRIU has them.
func (r *Restore) Inherit(ctx context.Context) (out []Inherited, err error) {
	defer func() {
		if err != nil {
			for _, in := range out {
				in.Socket.Close()
			}
			out = nil
		}
	}()
	var conns []*proto.Connection
	socks := map[uint32]*image.Socket{}
	for i, all := 0, r.sockets(); i < len(all); i++ {
		socks[all[i].Inode] = &all[i]
	}
	for _, c := range r.rec.GetConnections() {
		s := socks[c.Inode]
		if s == nil || r.inherited[c.Inode] {
			continue
		}
		why := r.cannotInherit(s, c)
		switch {
		case c.Action != proto.Action_ACTION_RECONNECT && !r.half:
			continue // CRIU restores it as it is
		case why != "" && r.half:
			return out, fmt.Errorf("%s: these images were made without criuhook, and hold half of a connection that cannot be made before its process exists: %s; dump with criuhook", describeSocket(s), why)
		case why != "":
			r.log.Debugf("%s: connected when its process exists: %s", describeSocket(s), why)
			continue
		}
		if r.half && c.Action == proto.Action_ACTION_HANGUP {
			s = ended(s)
		}
		sock, err := newSocket(s)
		if err != nil {
			return out, fmt.Errorf("%s: %w", describeSocket(s), err)
		}
		out = append(out, Inherited{sock, inheritKey(c.Inode)})
		conns = append(conns, c)
		r.inherited[c.Inode] = true
	}
	return out, r.connectAll(ctx, conns, out)
}

func (r *Restore) connectAll(ctx context.Context, conns []*proto.Connection, socks []Inherited) error {
	var errs []error
	var again []*proto.Connection
	var those []*sockpeer.Socket
	for i, c := range conns {
		if c.Action == proto.Action_ACTION_RECONNECT {
			again, those = append(again, c), append(those, socks[i].Socket)
			continue
		}
		if err := hangup(socks[i].Socket); err != nil {
			errs = append(errs, err)
			continue
		}
		why := cmp.Or(c.Reason, c.Busy, "its rule says so")
		r.log.Warnf("%s: hung up: %s; the application finds a closed connection", plan.Describe(c), why)
	}
	errs = append(errs, each(ctx, again, func(ctx context.Context, i int, slots chan struct{}) error {
		c, pid := again[i], 0
		if !r.set.OwnPIDNS() {
			pid = int(c.Holders[0].Pid)
		}
		seen, err := connect(ctx, those[i], c, place{"/", pid}, slots)
		return r.outcome(ctx, those[i], c, seen, int(c.Holders[0].Pid), err)
	}))
	if cause := cancelled(ctx); cause != nil {
		return cause // once, not for each of them
	}
	return errors.Join(errs...)
}

// TakeBack undoes Inherit: it closes these sockets, which are connected in place
// then. It returns false if they cannot be, and keeps them.
func (r *Restore) TakeBack(socks []Inherited) bool {
	if r.half {
		return false
	}
	for _, s := range r.sockets() {
		for _, in := range socks {
			if in.Key == inheritKey(s.Inode) {
				delete(r.inherited, s.Inode)
			}
		}
	}
	for _, in := range socks {
		in.Socket.Close()
	}
	return true
}

func (r *Restore) sockets() []image.Socket {
	if r.rec == nil {
		return nil
	}
	return r.set.Sockets()
}

// cannotInherit says why a socket cannot be made before its process exists.
func (r *Restore) cannotInherit(s *image.Socket, c *proto.Connection) string {
	if !r.set.SharesRoot(int(c.Holders[0].Pid)) {
		return "its process has a root directory or mount namespace of its own"
	}
	switch {
	case s.Type == sockpeer.Dgram:
		// To any that no other socket of the images sends to, CRIU adds one that
		// does, and waits for ever for it: an inherited one does not make it
		// (add_fake_unix_queuers, open_unixsk_standalone in criu/sk-unix.c).
		return "it is a datagram socket, which CRIU cannot inherit"
	case r.half && c.Action == proto.Action_ACTION_HANGUP:
		return inheritable(ended(s))
	case s.Labelled:
		return "it has a security label of its own"
	}
	return inheritable(s)
}

// ended is a socket of which nothing but its options is to come back.
func ended(s *image.Socket) *image.Socket {
	dead := *s
	dead.Queued, dead.Shutdown = 0, 0
	return &dead
}

// Connects reports whether there is a connection to make.
func (r *Restore) Connects() bool { return len(r.reconnects()) > 0 }

// MaxPID is the highest pid that is to be restored; 0: not known, as there is
// nothing to reconnect.
func (r *Restore) MaxPID() int {
	if r.set == nil {
		return 0
	}
	return r.set.MaxPID()
}

// InPlace reports whether there is work for Reconnect.
func (r *Restore) InPlace() bool {
	for _, c := range r.reconnects() {
		if !r.half && !r.inherited[c.Inode] {
			return true
		}
	}
	return false
}

func describeSocket(s *image.Socket) string {
	if len(s.Holders) == 0 {
		return fmt.Sprintf("socket %d", s.Inode)
	}
	return fmt.Sprintf("process %d fd %d, socket %d", s.Holders[0].PID, s.Holders[0].FD, s.Inode)
}
