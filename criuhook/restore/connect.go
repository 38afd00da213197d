// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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

// each runs fn for each of the connections at the same time. All have one
// start: the times that their rules give them run side by side.
func each(ctx context.Context, conns []*proto.Connection, fn func(ctx context.Context, i int, slots chan struct{}) error) error {
	start := time.Now()
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	pending := make(chan struct{}, maxPending)
	slots := make(chan struct{}, maxConnecting)
	for i, c := range conns {
		wg.Go(func() {
			pending <- struct{}{}
			defer func() { <-pending }()
			ctx, cancel := context.WithDeadline(ctx, start.Add(time.Duration(c.Reconnect.TimeoutNs)))
			defer cancel()
			errs[i] = fn(ctx, i, slots)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// place is where a connection is made from.
type place struct {
	root string // where paths start
	pid  int    // that the daemon is to see; 0: ours
}

// connect connects a socket and greets. seen is the process that the daemon
// sees.
func connect(ctx context.Context, sock *sockpeer.Socket, c *proto.Connection, from place, slots chan struct{}) (seen int, err error) {
	// O_PATH on the link: a directory in the task's own mount namespace.
	fd, err := unix.Open(from.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open the root directory %s: %w", from.root, err)
	}
	root := os.NewFile(uintptr(fd), "root")
	defer root.Close()
	to := sockpeer.Name(c.Reconnect.To)
	id := c.GetIdentity()
	as, err := withinCaller(identity(c))
	if err != nil {
		return 0, err
	}
	conn := sockpeer.Connector{
		Root:        root,
		As:          as,
		PID:         from.pid,
		ListenerUID: c.Reconnect.ListenerUid,
		Slots:       slots,
		Or:          sockpeer.Name(c.Reconnect.GetOrTo()),
	}
	return conn.Connect(ctx, sock, to, func() error {
		return prelude.Run(c.Reconnect.Prelude, sock.Stream(ctx), prelude.Peer{Path: ownName(c).Pattern(), UID: id.GetUid()})
	})
}

// ownName is the name by which the daemon at the other end knows itself: the
// one it is bound to, or that a rule gives.
func ownName(c *proto.Connection) sockpeer.Name {
	if to := c.Reconnect.GetTo(); !bytes.Equal(to, c.GetPeer().GetPath()) {
		return sockpeer.Name(to)
	}
	return sockpeer.Name(c.GetPeer().GetName())
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
	// Of root's own rights an exec that some security module marks takes none.
	if !sockpeer.Elevated() || uid == 0 && os.Geteuid() == 0 && gid == os.Getegid() {
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
