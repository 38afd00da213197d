// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"math"
	"strings"

	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Record is the plan as it is written beside the images: the connections that
// are reconnected or hung up. Holders carry their pids in the pid namespace of
// rootPID, the tree's root task (a pid as we see it). What is known only at
// the dump (who wrote it, when, which dump, caches) is left to the caller.
// A plan that still refuses or waits has no record.
func (p *Plan) Record(snap *sockpeer.Snapshot, rootPID int) (*proto.Record, error) {
	rec := &proto.Record{}
	if p.Empty() {
		return rec, nil
	}
	depth, err := rootDepth(snap, rootPID)
	if err != nil {
		return nil, err
	}
	for i := range p.Decisions {
		c, err := p.Decisions[i].record(snap, depth)
		if err != nil {
			return nil, err
		}
		rec.Connections = append(rec.Connections, c)
	}
	return rec, nil
}

// rootDepth is how many pid namespaces the root task is below ours.
func rootDepth(snap *sockpeer.Snapshot, rootPID int) (int, error) {
	if root, ok := snap.Processes[rootPID]; ok && len(root.NSPID) > 0 {
		return len(root.NSPID) - 1, nil
	}
	// The root may hold no connection. If one of its descendants is in our
	// own pid namespace, so is the root.
	for _, proc := range snap.Processes {
		if len(proc.NSPID) == 1 {
			return 0, nil
		}
	}
	return 0, fmt.Errorf("record the connections: the scan does not tell the pid namespace of the root task %d; it has probably ended", rootPID)
}

func (d *Decision) record(snap *sockpeer.Snapshot, depth int) (*proto.Connection, error) {
	c := &d.Connection
	rec := &proto.Connection{
		Inode: c.Inode,
		Type:  uint32(c.Type),
		Name:  []byte(c.Name),
		Peer: &proto.Peer{
			Inode: c.Peer.Inode,
			Name:  []byte(c.Peer.Name),
			Pid:   pid32(c.Peer.PID),
			Uid:   max(c.Peer.UID, -1),
			Exe:   utf8Text(c.Peer.Exe),
			Path:  []byte(c.Peer.Path),
		},
		Busy:   utf8Text(d.Busy),
		Reason: utf8Text(d.Reason),
		Netns:  c.Netns,
	}
	switch d.Action {
	case rule.Reconnect:
		if d.Rule == nil {
			return nil, fmt.Errorf("record the connections: %s is to be reconnected without a rule", d.where())
		}
		rec.Action = proto.Action_ACTION_RECONNECT
		rec.Reconnect = reconnect(d.Rule, c)
	case rule.Hangup:
		rec.Action = proto.Action_ACTION_HANGUP
	default:
		return nil, fmt.Errorf("record the connections: %s", d)
	}
	if d.Rule != nil {
		rec.Rule = utf8Text(d.Rule.Name)
		rec.BusyRefuses = d.Rule.Busy == rule.Refuse || d.Rule.Busy == rule.Wait
	}
	for _, h := range c.Holders {
		proc, ok := snap.Processes[h.PID]
		if !ok {
			return nil, fmt.Errorf("record the connections: the scan tells nothing of process %d, which holds fd %d to %s", h.PID, h.FD, d.peer())
		}
		if len(proc.NSPID) <= depth {
			return nil, fmt.Errorf("record the connections: process %d (%s) is not in the pid namespace of the root task or below", h.PID, clean(proc.Comm))
		}
		pid := proc.NSPID[depth]
		if pid <= 0 || pid > math.MaxInt32 || h.FD < 0 || h.FD > math.MaxInt32 {
			return nil, fmt.Errorf("record the connections: process %d fd %d: pid %d in its namespace is out of range", h.PID, h.FD, pid)
		}
		rec.Holders = append(rec.Holders, &proto.Holder{
			Pid: int32(pid), Fd: int32(h.FD), Cloexec: h.Cloexec, Comm: utf8Text(proc.Comm),
		})
	}
	if len(rec.Holders) == 0 {
		return nil, fmt.Errorf("record the connections: nobody holds socket %d", c.Inode)
	}
	id := snap.Processes[c.Holders[0].PID].Identity
	rec.Identity = &proto.Identity{Uid: id.UID, Gid: id.GID, Groups: id.Groups, CapEff: id.CapEff}
	return rec, nil
}

func reconnect(r *rule.Rule, c *sockpeer.Connection) *proto.Reconnect {
	to, or := []byte(c.Peer.Name), []byte(nil)
	switch {
	case r.To != "":
		to = []byte(r.To)
		if to[0] == '@' {
			to[0] = 0
		}
	case c.Peer.Path != "":
		to = []byte(c.Peer.Path)
		if !c.Peer.Elsewhere { // where the application is restored, it may be visible
			or = []byte(c.Peer.Name)
		}
	}
	prelude := r.Prelude
	if prelude == "" {
		prelude = "none"
	}
	uid := max(c.Peer.UID, -1)
	if r.UID != nil {
		uid = int64(*r.UID)
	}
	return &proto.Reconnect{
		To:          to,
		OrTo:        or,
		Prelude:     prelude,
		TimeoutNs:   int64(r.Timeout),
		AbsentFails: r.Absent == rule.AbsentFail,
		ListenerUid: uid,
	}
}

// pid32 is a pid for people: 0 if it is none.
func pid32(pid int) int32 {
	if pid < 0 || pid > math.MaxInt32 {
		return 0
	}
	return int32(pid)
}

// utf8Text is s as a protobuf string can hold it; the kernel allows any byte.
func utf8Text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// Describe names process, fd, peer and rule of a recorded connection.
func Describe(c *proto.Connection) string {
	where := "a connection"
	if len(c.Holders) > 0 {
		h := c.Holders[0]
		where = fmt.Sprintf("process %d (%s) fd %d", h.Pid, h.Comm, h.Fd)
	}
	name := "an unnamed peer"
	if n := sockpeer.Name(c.GetPeer().GetName()); n != "" {
		name = n.String()
	}
	if n := sockpeer.Name(c.GetPeer().GetPath()); n != "" {
		name += ", which it sees as " + n.String()
	}
	return fmt.Sprintf("%s, connected to %s (rule %q)", where, name, c.Rule)
}
