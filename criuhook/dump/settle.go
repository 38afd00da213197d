// SPDX-License-Identifier: Apache-2.0

package dump

import (
	"context"
	"fmt"

	"github.com/sirupsen/logrus"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Settle brings the images into the one form and writes the record. They are
// complete and the tree is still frozen; if this fails, the dump has to fail,
// so that CRIU lets the application run on. external are the files that CRIU
// was told to leave out. Once ctx has ended, nothing in the directory changes
// any more.
func (d *Dump) Settle(ctx context.Context, dir string, rec *proto.Record, external ...image.ExternalFile) error {
	if err := d.recheck(rec); err != nil {
		return err
	}
	return d.files(func() error { return d.edit(ctx, dir, rec, external) })
}

func (d *Dump) edit(ctx context.Context, dir string, rec *proto.Record, external []image.ExternalFile) error {
	if err := image.MarkService(ctx, dir, d.services); err != nil {
		return err
	}
	if err := image.Normalize(ctx, dir, rec, external...); err != nil {
		return err
	}
	if err := d.warnCaches(dir); err != nil {
		return err
	}
	for _, c := range rec.Caches {
		d.late().Infof("%s: in the images it is zero pages (mappings: %d) and /dev/null (fds: %d): a client opens the cache anew", c.Path, c.Mappings, c.Fds)
	}
	return image.Commit(ctx, dir, rec)
}

// lateKey marks what is logged once the images are written.
type lateKey struct{}

func (d *Dump) late() *logrus.Entry {
	return d.Log.WithContext(context.WithValue(context.Background(), lateKey{}, true))
}

// Late reports whether something was logged once the images were written. Then
// it must not go to a file that may be in them: CRIU refuses to restore one that
// has grown, unless it is open for appending only (files-reg.c, validate_file).
func Late(e *logrus.Entry) bool {
	return e.Context != nil && e.Context.Value(lateKey{}) != nil
}

// warnCaches names the caches that somebody has open without being a client.
// CRIU restores these fds as those of any file.
func (d *Dump) warnCaches(dir string) error {
	set, err := image.Open(dir)
	if err != nil {
		return err
	}
	for _, c := range set.Caches() {
		for _, h := range c.Holders {
			d.late().Warnf("process %d fd %d has the cache %s open and does not map it: a restore needs that file, of the same size", h.PID, h.FD, c.Path)
		}
	}
	return nil
}

// Unchanged fails if a connection that Settle took for idle is no longer that.
func (d *Dump) Unchanged(rec *proto.Record) error {
	now := pb.CloneOf(rec)
	if err := d.recheck(now); err != nil {
		return err
	}
	for i, c := range rec.Connections {
		if later := now.Connections[i]; later.Action != c.Action {
			return fmt.Errorf("%s: %s, when its images were finished already: dump again", plan.Describe(c), later.Busy)
		}
	}
	return nil
}

// recheck looks at the connections again: the daemons were not frozen, and an
// answer that came after the freeze shows that a request was under way which
// nothing told of then.
func (d *Dump) recheck(rec *proto.Record) error {
	if len(rec.Connections) == 0 {
		return nil
	}
	snap, err := sockpeer.Scan(d.Root)
	if err != nil {
		return err
	}
	now := make(map[uint32]*sockpeer.Connection, len(snap.Connections))
	for i := range snap.Connections {
		now[snap.Connections[i].Inode] = &snap.Connections[i]
	}
	for _, c := range rec.Connections {
		if c.Action != proto.Action_ACTION_RECONNECT {
			continue
		}
		why := "the peer closed it while CRIU dumped"
		if cur := now[c.Inode]; cur != nil {
			if cur.RecvQueue == 0 && cur.SendQueue == 0 {
				continue
			}
			why = "the peer answered while CRIU dumped"
		}
		if c.BusyRefuses {
			return &RefusedError{fmt.Sprintf("%s: %s, and rule %q refuses busy connections: dump again", plan.Describe(c), why, c.Rule)}
		}
		d.late().Warnf("%s: %s, so a request was under way: it will be hung up instead of reconnected", plan.Describe(c), why)
		c.Action, c.Reconnect, c.Busy = proto.Action_ACTION_HANGUP, nil, why
	}
	return nil
}
