// SPDX-License-Identifier: Apache-2.0

// Package restore is what all ways of restoring share: the connections that
// images hold as unconnected sockets are made anew before the application
// runs, by [Restore.Inherit] before CRIU starts, or by [Restore.Reconnect]
// when all tasks exist and none runs.
package restore

import (
	"context"
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Restore is one restore.
type Restore struct {
	log *logrus.Logger
	dir string
	set *image.Set
	rec *proto.Record // nil: nothing is to be done
	// half: the images are CRIU's alone, and hold half connections, which
	// CRIU restores only as inherited fds.
	half      bool
	inherited map[uint32]bool // inodes
}

func identity(c *proto.Connection) sockpeer.Identity {
	id := c.GetIdentity()
	return sockpeer.Identity{UID: id.GetUid(), GID: id.GetGid(), Groups: id.GetGroups(), CapEff: id.GetCapEff()}
}

// Open reads the images and the record in dir. rules decide about images that
// were made without us; nil leaves those to CRIU.
func Open(dir string, log *logrus.Logger, rules func() (*rule.Set, error)) (*Restore, error) {
	r := &Restore{log: log, dir: dir, inherited: map[uint32]bool{}}
	rec, err := image.ReadRecord(dir)
	none := errors.Is(err, image.ErrNoRecord)
	switch {
	case none && rules == nil:
		log.Debug("the images were not made with criuhook: nothing to reconnect")
		return r, nil
	case none:
	case err != nil:
		return nil, err
	case len(rec.Connections) == 0:
		return r, nil
	}
	set, openErr := image.Open(dir)
	switch {
	case none && openErr != nil:
		return r, nil // CRIU says better than we what is wrong with them
	case openErr != nil:
		return nil, openErr
	}
	r.set = set
	if !none {
		r.rec = rec
		return r, r.set.Match(rec)
	}
	if !NeedsRebuild(r.set, err) {
		return r, nil
	}
	return r, r.rebuild(rules)
}

// rebuild makes a record for images that have none.
func (r *Restore) rebuild(rules func() (*rule.Set, error)) error {
	set, err := rules()
	if err != nil {
		return err
	}
	rec, warnings, err := Rebuild(r.set, set)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		r.log.Warn(w)
	}
	r.rec, r.half = rec, true
	return nil
}

// reconnects are the connections that are to be made anew.
func (r *Restore) reconnects() []*proto.Connection {
	var out []*proto.Connection
	for _, c := range r.rec.GetConnections() {
		if c.Action == proto.Action_ACTION_RECONNECT {
			out = append(out, c)
		}
	}
	return out
}

// outcome says how an attempt ended, and does what the rule says if it failed.
// want is the process that the daemon should see. A socket that is to be inherited
// comes back only if all that CRIU does with it succeeds.
func (r *Restore) outcome(ctx context.Context, sock *sockpeer.Socket, c *proto.Connection, seen, want int, err error) error {
	if err == nil {
		as := fmt.Sprintf("reconnected as uid %d", c.GetIdentity().GetUid())
		if r.inherited[c.Inode] {
			as = fmt.Sprintf("connected as uid %d, for CRIU to hand to the application", c.GetIdentity().GetUid())
		}
		if seen != want {
			as += fmt.Sprintf("; the daemon sees process %d, of criuhook, instead of %d", seen, want)
		}
		r.log.Infof("%s: %s", plan.Describe(c), as)
		return nil
	}
	if cause := cancelled(ctx); cause != nil {
		return fmt.Errorf("%s: %w", plan.Describe(c), cause)
	}
	if r.half && errors.Is(err, sockpeer.ErrListener) && c.Reason != "" {
		err = fmt.Errorf("%w: %s", err, c.Reason)
	}
	if c.Reconnect.AbsentFails {
		return fmt.Errorf("%s: %w; the rule says \"absent: fail\": start the daemon and restore again", plan.Describe(c), err)
	}
	if e := hangup(sock); e != nil {
		return fmt.Errorf("%s: %w", plan.Describe(c), errors.Join(err, e))
	}
	r.log.Warnf("%s: %v; hung up, as its rule says: the application finds a closed connection", plan.Describe(c), err)
	return nil
}

// cancelled returns why nobody wants the restore any more. That the time of a
// rule is over is no reason.
func cancelled(ctx context.Context) error {
	if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	return nil
}
