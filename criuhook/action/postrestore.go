// SPDX-License-Identifier: Apache-2.0

package action

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/sockpeer"
	"criuhook/sockpeer/prelude"
)

// Bounds on what runs at the same time: threads that connect, and connections
// that are being made or wait for their daemon.
const (
	maxConnecting = 64
	maxPending    = 4096
)

// postRestore connects the dormant sockets. All tasks exist and none runs yet.
func (s *Script) postRestore(ctx context.Context) error {
	rec, err := image.ReadRecord(s.ImagesDir)
	if errors.Is(err, image.ErrNoRecord) {
		s.Log.Debug("the images were not made with criuhook: nothing to reconnect")
		return nil
	}
	if err != nil {
		return err
	}
	if len(rec.Connections) == 0 {
		return nil
	}
	set, err := image.Open(s.ImagesDir)
	if err != nil {
		return err
	}
	if err := set.Match(rec); err != nil {
		return err
	}
	pids, err := restoredPIDs(s.Root)
	if err != nil {
		return err
	}
	// One start for all: their times run side by side.
	start := time.Now()
	errs := make([]error, len(rec.Connections))
	var wg sync.WaitGroup
	pending := make(chan struct{}, maxPending)
	slots := make(chan struct{}, maxConnecting)
	for i, c := range rec.Connections {
		if c.Action != proto.Action_ACTION_RECONNECT {
			continue
		}
		wg.Go(func() {
			pending <- struct{}{}
			defer func() { <-pending }()
			ctx, cancel := context.WithDeadline(ctx, start.Add(time.Duration(c.Reconnect.TimeoutNs)))
			defer cancel()
			errs[i] = s.reconnect(ctx, c, pids, slots)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
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
func (s *Script) reconnect(ctx context.Context, c *proto.Connection, pids map[int]int, slots chan struct{}) error {
	sock, pid, err := dormant(c, pids)
	if err != nil {
		return fmt.Errorf("%s: %w", describe(c), err)
	}
	if sock == nil {
		s.Log.Debugf("%s: connected already", describe(c))
		return nil
	}
	defer sock.Close()
	err = connect(ctx, sock, pid, c, slots)
	if err == nil {
		s.Log.Infof("%s: reconnected as uid %d", describe(c), c.GetIdentity().GetUid())
		return nil
	}
	if c.Reconnect.AbsentFails {
		return fmt.Errorf("%s: %w; the rule says \"absent: fail\": start the daemon and restore again", describe(c), err)
	}
	if e := hangup(sock); e != nil {
		return fmt.Errorf("%s: %w", describe(c), errors.Join(err, e))
	}
	s.Log.Warnf("%s: %v; hung up, as its rule says: the application finds a closed connection", describe(c), err)
	return nil
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

func connect(ctx context.Context, sock *sockpeer.Socket, pid int, c *proto.Connection, slots chan struct{}) error {
	// O_PATH on the link: a directory in the task's own mount namespace.
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the root directory of process %d: %w", pid, err)
	}
	root := os.NewFile(uintptr(fd), "root")
	defer root.Close()
	to := sockpeer.Name(c.Reconnect.To)
	id := c.GetIdentity()
	as := sockpeer.Identity{UID: id.GetUid(), GID: id.GetGid(), Groups: id.GetGroups(), CapEff: id.GetCapEff()}
	if as, err = withinCaller(as); err != nil {
		return err
	}
	conn := sockpeer.Connector{
		Root:        root,
		As:          as,
		ListenerUID: c.Reconnect.ListenerUid,
		Slots:       slots,
	}
	return conn.Connect(ctx, sock, to, func() error {
		return prelude.Run(c.Reconnect.Prelude, sock.Stream(ctx), prelude.Peer{Path: to.Pattern(), UID: id.GetUid()})
	})
}

// hangup makes what is left of an attempt a dead connection.
func hangup(sock *sockpeer.Socket) error {
	if connected, err := sock.Connected(); err != nil || connected {
		return err // shut down by Connect
	}
	return sockpeer.Hangup(sock)
}

// withinCaller keeps a setuid run within the rights of who called it, who may
// have written the images: that user, no other group, no capability.
func withinCaller(id sockpeer.Identity) (sockpeer.Identity, error) {
	uid, gid := os.Getuid(), os.Getgid()
	if uid == os.Geteuid() && gid == os.Getegid() {
		return id, nil
	}
	own, err := os.Getgroups()
	if err != nil {
		return id, fmt.Errorf("read our groups: %w", err)
	}
	own = append(own, gid)
	for _, g := range append([]uint32{id.GID}, id.Groups...) {
		if !slices.Contains(own, int(g)) {
			return id, fmt.Errorf("the record wants gid %d, which uid %d, who runs a setuid CRIU, is not in: restore as root, or as who was dumped", g, uid)
		}
	}
	if int(id.UID) != uid {
		return id, fmt.Errorf("the record wants uid %d, and uid %d runs a setuid CRIU: restore as root, or as who was dumped", id.UID, uid)
	}
	id.CapEff = 0
	return id, nil
}
