// SPDX-License-Identifier: Apache-2.0

// Package dump is what all ways of dumping share: to decide about a frozen
// tree, and to finish its images.
//
//	Decide   the tree is frozen, none of its files dumped
//	Note     right after: from here on the images are those of this dump
//	Settle   the images are written, the tree is still frozen
package dump

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Dump is one dump.
type Dump struct {
	Root    int // the tree's root task
	Rules   *rule.Set
	Log     *logrus.Logger
	Version string // ours, for the record
	ID      string // tells this dump from every other one
	// Service is the inode of our own end of a connection by which somebody in the
	// tree may have asked for this dump; 0: there is none. CRIU restores the other end
	// itself, with the answer in it (USK_SERVICE in criu/sk-unix.c).
	Service uint32
	// Files, if not nil, makes the calls that read and write images, such as with
	// the rights of somebody else.
	Files func(func() error) error

	services []uint32 // inodes of that other end, once the tree is frozen
}

// RefusedError: the dump must not be. It says why, and what would allow it, in
// several lines.
type RefusedError struct{ Text string }

func (e *RefusedError) Error() string { return strings.TrimRight(e.Text, "\n") }

// Decided is what becomes of the connections of a tree.
type Decided struct {
	Plan     *plan.Plan
	Snapshot *sockpeer.Snapshot
	record   *proto.Record
}

// Decide scans the tree and makes the plan; calls is what was noted of the
// tasks before they were stopped. The tree has to be frozen, since nothing in
// the plan may change any more. The error is a [*RefusedError] if a rule wants
// that, or if a rule waits for a busy connection: nothing in a frozen tree
// becomes idle. Nothing is written.
func (d *Dump) Decide(calls sockpeer.Calls) (*Decided, error) {
	snap, err := sockpeer.ScanStopped(d.Root, calls)
	if err != nil {
		return nil, err
	}
	d.services = d.takeServices(snap)
	for _, l := range snap.Pending {
		d.Log.Warnf("process %d fd %d listens at %s, and %d clients wait there to be accepted: they are not in the images", l.Listener.PID, l.Listener.FD, l.Name, l.Count)
	}
	p := plan.Make(snap, d.Rules)
	waits := p.Waiting()
	refused := len(p.Refused()) > 0
	p.Freeze()
	if len(p.Refused()) > 0 {
		text := &RefusedError{p.Explain()}
		if refused {
			return nil, text
		}
		busy := &BusyError{text, waits[0].Rule.Patience}
		for _, d := range waits {
			busy.Patience = min(busy.Patience, d.Rule.Patience)
		}
		return nil, busy
	}
	rec, err := p.Record(snap, d.Root)
	if err != nil {
		return nil, err
	}
	rec.DumpId, rec.WrittenBy, rec.UnixTime = d.ID, "criuhook "+d.Version, time.Now().Unix()
	return &Decided{p, snap, rec}, nil
}

// takeServices takes the connections to Service out of a scan.
func (d *Dump) takeServices(snap *sockpeer.Snapshot) (inodes []uint32) {
	snap.Connections = slices.DeleteFunc(snap.Connections, func(c sockpeer.Connection) bool {
		is := d.Service != 0 && c.Peer.Inode == d.Service
		if is {
			inodes = append(inodes, c.Inode)
		}
		return is
	})
	return inodes
}

// Services are the inodes of the sockets by which the tree asked for this dump,
// after Decide: CRIU is to be told that they are external.
func (d *Dump) Services() []uint32 { return d.services }

// Plan decides about the running tree: what it finds may change.
func (d *Dump) Plan() (p *plan.Plan, services []uint32, err error) {
	snap, err := sockpeer.Scan(d.Root)
	if err != nil {
		return nil, nil, err
	}
	services = d.takeServices(snap)
	return plan.Make(snap, d.Rules), services, nil
}

// BusyError is a refusal only because rules wait for busy connections: it is
// worth another try once the tree has run on, until Patience has passed since
// the first.
type BusyError struct {
	*RefusedError
	Patience time.Duration
}

// Unwrap gives the refusal.
func (e *BusyError) Unwrap() error { return e.RefusedError }

// Note logs the decisions and writes criuhook.plan into the images directory.
// What an earlier dump left there goes first: CRIU overwrites its images now. Once
// ctx has ended, nothing in the directory changes any more.
func (d *Dump) Note(ctx context.Context, dir string, decided *Decided) error {
	err := d.files(func() error {
		if err := image.RemoveStale(ctx, dir); err != nil {
			return err
		}
		return image.WritePlan(ctx, dir, decided.record)
	})
	if err == nil {
		d.Report(decided)
	}
	return err
}

func (d *Dump) files(do func() error) error {
	if d.Files != nil {
		return d.Files(do)
	}
	return do()
}

// Report logs what becomes of each connection.
func (d *Dump) Report(decided *Decided) {
	for i := range decided.Plan.Decisions {
		c := &decided.Plan.Decisions[i]
		level := logrus.InfoLevel
		if c.Action == rule.Hangup && c.Reason != "" {
			level = logrus.WarnLevel // less than its rule promised
		}
		d.Log.Log(level, c.String())
	}
}

// Record is what was decided, as it is to stand beside the images.
func (d *Decided) Record() *proto.Record { return d.record }

// ID tells this dump from every other one: CRIU's pid, and when it was started
// (proc(5), field 22 of stat, clock ticks since boot).
func ID(criu int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", criu))
	if err != nil {
		return "", fmt.Errorf("look up CRIU, process %d: %w", criu, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the id of this boot: %w", err)
	}
	const starttime = 22 - 3 // after the name, field 2
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) <= starttime {
		return "", fmt.Errorf("read /proc/%d/stat: %d fields", criu, len(f))
	}
	return fmt.Sprintf("%s-%d-%s", strings.TrimSpace(string(boot)), criu, f[starttime]), nil
}
