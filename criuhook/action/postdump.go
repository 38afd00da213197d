// SPDX-License-Identifier: Apache-2.0

package action

import (
	"errors"
	"fmt"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// postDump brings the images into the one form and writes the record. They are
// complete and the tree is still frozen; if this fails, CRIU lets the
// application run on and the dump counts as failed.
func (s *Script) postDump() error {
	id, err := dumpID(s.CRIU)
	if err != nil {
		return err
	}
	rec, err := image.ReadPlan(s.ImagesDir)
	if err != nil && !errors.Is(err, image.ErrNoRecord) {
		return err
	}
	if rec == nil || rec.DumpId != id {
		if done, e := image.ReadRecord(s.ImagesDir); e == nil && done.DumpId == id {
			return nil // an earlier run of this script
		}
		// A record of an earlier dump must not stand beside these images.
		return errors.Join(image.RemoveStale(s.ImagesDir), errors.New("the connections that leave the tree were not settled when CRIU froze it: "+
			"a rule refused one, or the process that followed CRIU was killed; the messages of criuhook above say which. "+
			"The application runs on, and these images must not be used"))
	}
	if err := s.recheck(rec); err != nil {
		return err
	}
	if err := image.Normalize(s.ImagesDir, rec); err != nil {
		return err
	}
	if err := s.warnCaches(); err != nil {
		return err
	}
	for _, c := range rec.Caches {
		s.Log.Infof("%s: %d mappings are zero pages in the images, %d fds /dev/null: a client opens the cache anew", c.Path, c.Mappings, c.Fds)
	}
	return image.Commit(s.ImagesDir, rec)
}

// warnCaches names the caches that somebody has open without being a client.
// CRIU restores these fds as those of any file.
func (s *Script) warnCaches() error {
	set, err := image.Open(s.ImagesDir)
	if err != nil {
		return err
	}
	for _, c := range set.Caches() {
		for _, h := range c.Holders {
			s.Log.Warnf("process %d fd %d has the cache %s open and does not map it: a restore needs that file, of the same size", h.PID, h.FD, c.Path)
		}
	}
	return nil
}

// recheck looks at the connections again: the daemons were not frozen, and an
// answer that came after the freeze shows that a request was under way which
// nothing told of then.
func (s *Script) recheck(rec *proto.Record) error {
	if len(rec.Connections) == 0 {
		return nil
	}
	snap, err := sockpeer.Scan(s.Root)
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
			return fmt.Errorf("%s: %s, and rule %q refuses busy connections: dump again", describe(c), why, c.Rule)
		}
		s.Log.Warnf("%s: %s, so a request was under way: it will be hung up instead of reconnected", describe(c), why)
		c.Action, c.Reconnect, c.Busy = proto.Action_ACTION_HANGUP, nil, why
	}
	return nil
}

// describe names process, fd and peer of a recorded connection.
func describe(c *proto.Connection) string {
	where := "a connection"
	if len(c.Holders) > 0 {
		h := c.Holders[0]
		where = fmt.Sprintf("process %d (%s) fd %d", h.Pid, h.Comm, h.Fd)
	}
	name := "an unnamed peer"
	if n := sockpeer.Name(c.GetPeer().GetName()); n != "" {
		name = n.String()
	}
	return fmt.Sprintf("%s, connected to %s (rule %q)", where, name, c.Rule)
}
