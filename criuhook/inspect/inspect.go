// SPDX-License-Identifier: Apache-2.0

// Package inspect tells what images hold and what a restore on this machine
// would make of it. It connects to nobody and writes nothing.
package inspect

import (
	"errors"
	"fmt"
	"time"

	"criuhook/criuhook/image"
	"criuhook/criuhook/restore"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Form is how a socket stands in the images.
type Form string

// The forms. A connection of criuhook's is Dormant or Dead; Missing says that
// the record and the images do not belong together.
const (
	Dormant   Form = "dormant"   // unconnected
	Dead      Form = "dead"      // closed by the peer
	Half      Form = "half"      // connected to a socket that is not in the images
	Inside    Form = "inside"    // connected to another socket of the images
	Listening Form = "listening" // others connect to it
	Other     Form = "other"
	Missing   Form = "missing"
)

// Report is what images hold.
type Report struct {
	RootPID   int // in its own pid namespace
	Processes int
	// OwnNetns: the tree has a network namespace of its own, in which a
	// restore looks for abstract names.
	OwnNetns bool
	// Record is nil if the images were not made with criuhook.
	Record *proto.Record
	// Rebuilt: there is no record, the Connections are half ones, and what a
	// restore with criuhook would do with them by the rules of this host.
	Rebuilt bool
	// Refused says, in several lines, why such a restore would not be done.
	// There are no Connections then, and the half ones are among Sockets.
	Refused     string
	Warnings    []string     // of such a restore
	Connections []Connection // of the record, in its order
	Sockets     []Socket     // all others
	Caches      []image.Cache
}

// Connection is one of the record, or of a rebuilt one.
type Connection struct {
	*proto.Connection
	Form    Form
	Restore Outcome
}

// Socket is a unix socket that the record says nothing of.
type Socket struct {
	image.Socket
	Form Form
	// PeerName is what the other half was bound to, of a Half.
	PeerName sockpeer.Name
}

// Read reads the images in dir, and looks who listens here. rules are asked for
// where images have half connections and no record.
func Read(dir string, rules func() (*rule.Set, error)) (*Report, error) {
	rec, recErr := image.ReadRecord(dir)
	if recErr != nil && !errors.Is(recErr, image.ErrNoRecord) {
		return nil, recErr
	}
	set, err := image.Open(dir)
	if err != nil {
		return nil, err
	}
	r := &Report{
		RootPID: set.RootPID(), Processes: len(set.PIDs()), OwnNetns: set.OwnNetns(), Record: rec, Caches: set.Caches(),
	}
	if restore.NeedsRebuild(set, recErr) {
		rec = r.rebuild(set, rules)
	}
	forms := map[uint32]Form{}
	for _, s := range sockets(set) {
		forms[s.Inode] = s.Form
		if !recorded(rec, s.Inode) {
			r.Sockets = append(r.Sockets, s)
		}
	}
	listeners, err := sockpeer.Listeners()
	if err != nil {
		return nil, fmt.Errorf("look who listens on this machine: %w", err)
	}
	for _, c := range rec.GetConnections() {
		form, ok := forms[c.GetInode()]
		if !ok {
			form = Missing
		}
		out := misfit(c, form)
		if out == nil || r.Rebuilt {
			out = new(outcome(c, r.OwnNetns, listeners))
		}
		r.Connections = append(r.Connections, Connection{c, form, *out})
	}
	return r, nil
}

// rebuild makes the record that such a restore would go by, nil if it would be
// refused.
func (r *Report) rebuild(set *image.Set, rules func() (*rule.Set, error)) *proto.Record {
	inForce, err := rules()
	if err != nil {
		r.Refused = err.Error()
		return nil
	}
	rec, warnings, err := restore.Rebuild(set, inForce)
	if err != nil {
		r.Refused = err.Error()
		return nil
	}
	r.Rebuilt, r.Warnings = true, warnings
	return rec
}

// Time is when the tree was frozen; the zero time: not known.
func (r *Report) Time() time.Time {
	if r.Record.GetUnixTime() == 0 {
		return time.Time{}
	}
	return time.Unix(r.Record.GetUnixTime(), 0)
}

func recorded(rec *proto.Record, inode uint32) bool {
	for _, c := range rec.GetConnections() {
		if c.GetInode() == inode {
			return true
		}
	}
	return false
}

func sockets(set *image.Set) []Socket {
	half := map[uint32]sockpeer.Name{}
	for _, x := range set.External() {
		half[x.Socket.Inode] = x.PeerName
	}
	var out []Socket
	for _, s := range set.Sockets() {
		name, isHalf := half[s.Inode]
		out = append(out, Socket{s, form(&s, isHalf), name})
	}
	return out
}

func form(s *image.Socket, half bool) Form {
	switch {
	case half:
		return Half
	case s.Peer != 0:
		return Inside
	case s.State == sockpeer.Listening:
		return Listening
	case s.Dead():
		return Dead
	case s.Dormant():
		return Dormant
	}
	return Other
}
