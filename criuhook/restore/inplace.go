// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"context"
	"errors"
	"fmt"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Reconnect connects in place the sockets that stand unconnected in the images
// and were not inherited. All tasks exist and none runs yet; root is the root
// task, in our pid namespace.
func (r *Restore) Reconnect(ctx context.Context, root int) error {
	if r.half {
		return nil
	}
	var conns []*proto.Connection
	for _, c := range r.reconnects() {
		if !r.inherited[c.Inode] {
			conns = append(conns, c)
		}
	}
	if len(conns) == 0 {
		return nil
	}
	pids, err := restoredPIDs(root)
	if err != nil {
		return err
	}
	return each(ctx, conns, func(ctx context.Context, i int, slots chan struct{}) error {
		return r.reconnect(ctx, conns[i], pids, slots)
	})
}

// restoredPIDs maps pids in the pid namespace of the root task to ours.
func restoredPIDs(root int) (map[int]int, error) {
	tree, err := sockpeer.Tree(root)
	if err != nil {
		return nil, err
	}
	first, err := sockpeer.ReadProcess(root)
	if err != nil {
		return nil, err
	}
	depth := len(first.NSPID) - 1
	pids := make(map[int]int, len(tree))
	for _, pid := range tree {
		p, err := sockpeer.ReadProcess(pid)
		if err != nil {
			return nil, err
		}
		if len(p.NSPID) > depth {
			pids[p.NSPID[depth]] = pid
		}
	}
	return pids, nil
}

// reconnect connects one dormant socket, or does what its rule says.
func (r *Restore) reconnect(ctx context.Context, c *proto.Connection, pids map[int]int, slots chan struct{}) error {
	sock, pid, err := dormant(c, pids)
	if err != nil {
		return fmt.Errorf("%s: %w", plan.Describe(c), err)
	}
	if sock == nil {
		r.log.Debugf("%s: connected already", plan.Describe(c))
		return nil
	}
	defer sock.Close()
	seen, err := connect(ctx, sock, c, place{root: fmt.Sprintf("/proc/%d/root", pid)}, slots)
	return r.outcome(ctx, sock, c, seen, pid, err)
}

// dormant opens the restored socket, or returns nil if it is connected.
func dormant(c *proto.Connection, pids map[int]int) (*sockpeer.Socket, int, error) {
	if len(c.Holders) == 0 {
		return nil, 0, errors.New("the record names no process that holds it: the images are damaged")
	}
	h := c.Holders[0]
	pid, ok := pids[int(h.Pid)]
	if !ok {
		return nil, 0, fmt.Errorf("no process %d was restored: %s is not of these images", h.Pid, image.RecordName)
	}
	sock, err := sockpeer.Duplicate(pid, int(h.Fd))
	if err != nil {
		return nil, 0, err
	}
	t, err := sock.Type()
	if err != nil || uint32(t) != c.Type || !sock.IsUnix() {
		sock.Close()
		return nil, 0, fmt.Errorf("fd %d of process %d is no unix %s socket: %s is not of these images",
			h.Fd, h.Pid, sockpeer.Type(c.Type), image.RecordName)
	}
	connected, err := sock.Connected()
	if err != nil || connected {
		sock.Close()
		return nil, 0, err
	}
	return sock, pid, nil
}
