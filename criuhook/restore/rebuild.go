// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"criuhook/criuhook/image"
	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// RefusedError: images that plain CRIU made must not be restored as they are.
// It says why, and what would allow it, in several lines.
type RefusedError struct{ Text string }

func (e *RefusedError) Error() string { return strings.TrimRight(e.Text, "\n") }

// anyRoot is who must listen where no rule demands another user: CRIU's images
// do not tell who did at the dump.
const anyRoot = 0

// Reasons of a rebuilt record.
const (
	whyRoot   = "CRIU's images do not tell as whom the daemon ran, so it must run as root; a rule with uid: allows another user"
	whyUserns = "not reconnected: process %d is in a user namespace of its own, so that CRIU's images do not tell its rights as they are outside of it"
)

// warnUnread is true of every connection that is reconnected.
const warnUnread = "CRIU's images do not tell whether the daemons had read all that was sent to them: an answer to it would be lost; " +
	"only a dump with criuhook can tell"

// noteUID belongs to the rules that a refusal proposes.
const noteUID = "  note:   CRIU's images do not tell the listener's user, so the rule proposed hangs up; one with idle: reconnect, that user as uid:, " +
	"and the prelude of the protocol makes a new connection\n"

// NeedsRebuild reports whether the images hold half connections that nobody
// recorded. recErr is the error of image.ReadRecord.
func NeedsRebuild(set *image.Set, recErr error) bool {
	return errors.Is(recErr, image.ErrNoRecord) && len(set.External()) > 0
}

// Rebuild makes the record that a dump with criuhook would have written, from
// images that plain CRIU made with --external unix[INO], as far as they tell,
// and from the rules of this host. Its sockets are half connections in the
// images, neither dormant nor dead. The warnings are what a person should
// know. The error is a [*RefusedError] if the rules do not allow it.
func Rebuild(set *image.Set, rules *rule.Set) (rec *proto.Record, warnings []string, err error) {
	r := &rebuilder{set: set, rules: rules, processes: map[int]sockpeer.Process{}, calls: map[int][]image.Call{}, userns: map[int]bool{}, listens: map[sockpeer.Name]bool{}}
	for _, sock := range set.Sockets() {
		if sock.State == sockpeer.Listening {
			r.listens[sock.Name] = true
		}
	}
	var made plan.Plan
	for _, x := range set.External() {
		d, err := r.decide(x)
		if err != nil {
			return nil, nil, err
		}
		if d != nil {
			made.Decisions = append(made.Decisions, *d)
		}
	}
	if text := made.Explain(); text != "" {
		if slices.ContainsFunc(made.Refused(), func(d plan.Decision) bool { return d.Rule == nil && d.Connection.Direction == sockpeer.Outbound }) {
			text += noteUID
		}
		r.refusals = append(r.refusals, text)
	}
	if len(r.refusals) > 0 {
		return nil, r.warnings, &RefusedError{"the images were made without criuhook, and the rules of this host do not allow to restore them:\n" + strings.Join(r.refusals, "")}
	}
	rec, err = made.Record(&sockpeer.Snapshot{Processes: r.processes}, set.RootPID())
	if err != nil {
		return nil, r.warnings, err
	}
	for i, c := range rec.Connections {
		if c.Reconnect != nil && made.Decisions[i].Rule.UID == nil {
			c.Reconnect.ListenerUid, c.Reason = anyRoot, whyRoot
		}
	}
	if slices.ContainsFunc(rec.Connections, func(c *proto.Connection) bool { return c.Reconnect != nil }) {
		r.warn(warnUnread)
	}
	if err := image.Validate(rec); err != nil {
		return nil, r.warnings, fmt.Errorf("rebuild the record from CRIU's images: %w: they are damaged, take them from where they were written", err)
	}
	return rec, r.warnings, nil
}

type rebuilder struct {
	set       *image.Set
	rules     *rule.Set
	processes map[int]sockpeer.Process // by pid in the images
	calls     map[int][]image.Call
	userns    map[int]bool           // who is in one of its own
	listens   map[sockpeer.Name]bool // names at which the tree listens
	refusals  []string               // those that plan.Explain has no words for
	warnings  []string
}

func (r *rebuilder) warn(format string, a ...any) {
	if text := fmt.Sprintf(format, a...); !slices.Contains(r.warnings, text) {
		r.warnings = append(r.warnings, text)
	}
}

// decide leaves the decision to plan, but for what a restore cannot know or
// do. It returns nil for what it refused itself.
func (r *rebuilder) decide(x image.External) (*plan.Decision, error) {
	c := r.connection(x)
	if len(c.Holders) == 0 {
		r.refusals = append(r.refusals, fmt.Sprintf("socket %d to %s: no process holds it, it is on its way in the queue of another socket\n"+
			"  to do:  let the application receive or close it, and dump again\n", c.Inode, peerText(c)))
		return nil, nil
	}
	if err := r.readHolders(c); err != nil {
		return nil, err
	}
	waits := r.waits(c)
	if waits != "" {
		c.Waiters = []sockpeer.Waiter{{}} // to plan, one is enough
	}
	one := &rule.Set{Unknown: r.rules.Unknown, Inbound: r.rules.Inbound}
	chosen := r.choose(c)
	if chosen != nil {
		own := *chosen
		own.UID = nil
		one.Rules, c.Peer.UID = []rule.Rule{own}, anyRoot
	}
	snap := &sockpeer.Snapshot{Connections: []sockpeer.Connection{*c}, Processes: r.processes}
	d := &plan.Make(snap, one).Decisions[0]
	// Only now what plan must not see: no uid is known, one may be demanded.
	d.Connection.Peer.UID, d.Connection.Waiters = -1, nil
	if chosen != nil {
		d.Rule.UID = chosen.UID
	}
	if waits != "" {
		d.Busy = waits
	}
	if d.Action == rule.Wait || d.Action == rule.Refuse && d.Busy != "" && d.Rule != nil && d.Rule.Idle != rule.Refuse {
		d.Action = rule.Refuse
		d.Reason = "its rule does not let it be hung up while it is busy, and at the dump it was, or may have been: " + d.Busy
		r.refusals = append(r.refusals, fmt.Sprintf("%s\n  to do:  change the rule to busy: hangup; or dump again, with criuhook or while the connection is idle\n", d))
		return nil, nil
	}
	for _, h := range c.Holders {
		if d.Action == rule.Reconnect && r.userns[h.PID] {
			d.Action, d.Reason = rule.Hangup, fmt.Sprintf(whyUserns, h.PID)
		}
	}
	return d, nil
}

// connection is a half connection as a scan would tell it.
func (r *rebuilder) connection(x image.External) *sockpeer.Connection {
	sock := x.Socket
	c := &sockpeer.Connection{
		Inode: sock.Inode, Type: sock.Type, State: sock.State, Direction: r.direction(x), Name: sock.Name,
		Flags: int(sock.Flags), Shutdown: sock.Shutdown,
		Peer:      sockpeer.Peer{Inode: sock.Peer, Name: x.PeerName, UID: -1},
		RecvQueue: uint32(min(sock.Queued, math.MaxUint32)),
	}
	for _, h := range sock.Holders {
		c.Holders = append(c.Holders, sockpeer.Holder{PID: h.PID, TID: h.PID, FD: h.FD, Cloexec: h.Cloexec})
	}
	return c
}

// direction tells who called connect(), as a scan does.
func (r *rebuilder) direction(x image.External) sockpeer.Direction {
	name := x.Socket.Name
	switch {
	case name == "":
		return sockpeer.Outbound
	case x.PeerName == "":
		return sockpeer.Inbound
	case x.Socket.Type != sockpeer.Dgram && r.listens[name]:
		return sockpeer.Inbound
	}
	return sockpeer.Outbound
}

// readHolders reads what the images say of the processes that hold c.
func (r *rebuilder) readHolders(c *sockpeer.Connection) error {
	for _, h := range c.Holders {
		if _, ok := r.processes[h.PID]; ok {
			continue
		}
		creds, err := r.set.Creds(h.PID)
		if err != nil {
			return err
		}
		comm, err := r.set.Comm(h.PID)
		if err != nil {
			return err
		}
		if r.calls[h.PID], err = r.set.Calls(h.PID); err != nil {
			return err
		}
		r.userns[h.PID] = creds.OwnUserns
		r.processes[h.PID] = sockpeer.Process{PID: h.PID, NSPID: []int{h.PID}, Comm: comm, Identity: creds.Identity, MixedIdentity: creds.Mixed}
	}
	return nil
}

// waits says who was, or may have been, blocked on c at the dump; "": nobody.
func (r *rebuilder) waits(c *sockpeer.Connection) string {
	for _, h := range c.Holders {
		for _, call := range r.calls[h.PID] {
			switch {
			case !call.MayWait(h.FD):
			case !call.Known:
				return fmt.Sprintf("thread %d may have waited on it: CRIU's images do not tell in which system call it was", call.TID)
			case call.FD < 0:
				return fmt.Sprintf("thread %d was in %s, perhaps on fd %d: CRIU's images do not tell", call.TID, call.Name, h.FD)
			default:
				return fmt.Sprintf("thread %d was in %s on fd %d", call.TID, call.Name, call.FD)
			}
		}
	}
	return ""
}

// choose finds the rule for c. What nobody knows of the peer decides nothing:
// a uid is demanded of the listener instead, a program cannot be, so that a
// rule that names one is passed over.
func (r *rebuilder) choose(c *sockpeer.Connection) *rule.Rule {
	for i := range r.rules.Rules {
		own := r.rules.Rules[i]
		own.UID, own.Exe = nil, ""
		if (&rule.Set{Rules: []rule.Rule{own}}).Match(c) == nil {
			continue
		}
		if r.rules.Rules[i].Exe == "" {
			return &r.rules.Rules[i]
		}
		r.warn("rule %s, %s, is passed over for the connection to %s: it names the program at the other end, which CRIU's images do not tell; a rule without exe: can match",
			own.Name, own.Source, peerText(c))
	}
	return nil
}

func peerText(c *sockpeer.Connection) string {
	if c.Peer.Name == "" {
		return "a peer without a name"
	}
	return c.Peer.Name.String()
}
