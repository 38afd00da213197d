// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"
	"strings"

	"criuhook/criuhook/known"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// Make decides about every connection of the snapshot, in its order.
func Make(snap *sockpeer.Snapshot, rules *rule.Set) *Plan {
	p := &Plan{}
	for i := range snap.Connections {
		p.Decisions = append(p.Decisions, decide(&snap.Connections[i], snap, rules))
	}
	return p
}

func decide(c *sockpeer.Connection, snap *sockpeer.Snapshot, rules *rule.Set) Decision {
	d := Decision{Connection: *c, Is: known.Describe(c, snap.Processes), Busy: c.Busy()}
	if len(c.Holders) > 0 {
		d.Holder = snap.Processes[c.Holders[0].PID]
	}
	if r := rules.Match(c); r != nil {
		own := *r // the plan outlives a reload of the rules
		d.Rule = &own
	}
	if why := cannotDump(c, snap); why != "" {
		d.Action, d.Reason, d.final = rule.Refuse, why, true
		return d
	}
	d.byRule(rules)
	if d.Action == rule.Reconnect {
		d.checkReconnect(snap)
	}
	return d
}

// byRule sets what the rules say, before any regard to safety.
func (d *Decision) byRule(rules *rule.Set) {
	r := d.Rule
	if r == nil {
		d.Action, d.Reason = rules.Unknown, "no rule covers it, and unknown is refuse"
		if d.Connection.Direction == sockpeer.Inbound {
			d.Action, d.Reason = rules.Inbound, "somebody else connected to it, no rule covers it, and inbound is refuse"
		}
		if d.Action == rule.Hangup {
			d.Reason = ""
		} else {
			d.Action = rule.Refuse
		}
		return
	}
	d.Action = r.Idle
	if d.Busy != "" {
		d.Action = r.Busy
	}
	switch {
	case d.Action == rule.Reconnect && d.Busy != "":
		// No configuration can say so; bytes would be lost.
		d.Action, d.Reason = rule.Hangup, "a busy connection is never reconnected"
	case d.Action != rule.Refuse:
	case r.Idle == rule.Refuse && r.Why != "":
		d.Reason = r.Why
	case r.Idle == rule.Refuse:
		d.Reason = "the rule refuses such connections"
	default:
		d.Reason = "the rule refuses it while it is busy: " + d.Busy
	}
}

// cannotDump says why no rule can make CRIU dump the connection; "": one can.
func cannotDump(c *sockpeer.Connection, snap *sockpeer.Snapshot) string {
	if len(c.Holders) == 0 {
		return "the scan found no process that holds it; try again, and report it if it happens again"
	}
	for _, h := range c.Holders {
		if h.TID != 0 && h.TID != h.PID {
			return fmt.Sprintf("thread %d of process %d holds it in an fd table of its own (unshare(CLONE_FILES)), which CRIU cannot dump", h.TID, h.PID)
		}
		if _, ok := snap.Processes[h.PID]; !ok {
			return fmt.Sprintf("the scan tells nothing of process %d, which holds it; try again, and report it if it happens again", h.PID)
		}
	}
	return ""
}

// checkReconnect turns a reconnect that would not be safe into something else.
func (d *Decision) checkReconnect(snap *sockpeer.Snapshot) {
	c, r := &d.Connection, d.Rule
	switch {
	case c.Direction == sockpeer.Inbound || c.Peer.Name == "":
		d.Action = rule.Refuse
		d.Reason = "the rule wants it reconnected, but its peer has no name to connect to (it is the accepting end, or from socketpair)"
	case r.To == "" && !c.Peer.Name.Abstract() && !strings.HasPrefix(string(c.Peer.Name), "/"):
		d.Action = rule.Refuse
		d.Reason = "the rule wants it reconnected, but the listener's name is relative to a directory that is not known; give the rule a to"
	case r.Prelude != "" && r.Prelude != "none" && c.Type != sockpeer.Stream:
		d.Action = rule.Refuse
		d.Reason = fmt.Sprintf("the rule wants prelude %s, which needs a stream, and this is a %s socket", r.Prelude, c.Type)
	case c.Shutdown != 0:
		// It will not become whole again, so there is nothing to wait for.
		d.Reason = "it is half closed, which a new connection would not be"
		d.Action = rule.Hangup
		if r.Busy != rule.Hangup {
			d.Action = rule.Refuse
		}
	case c.Peer.UID < 0:
		d.Action = rule.Hangup
		d.Reason = "not reconnected: the listener's user is not known, so a restore could not tell another server from it"
	case r.To == "" && c.Peer.Elsewhere && c.Peer.Path == "":
		d.Action = rule.Hangup
		d.Reason = fmt.Sprintf("not reconnected: for process %d the name leads to another file than the daemon's, or could not be looked up in time; give the rule a to", c.Holders[0].PID)
	default:
		for _, h := range c.Holders {
			if snap.Processes[h.PID].MixedIdentity {
				d.Action = rule.Hangup
				d.Reason = fmt.Sprintf("not reconnected: the threads of process %d have different rights, so that nobody can tell as whom to connect", h.PID)
				return
			}
		}
		if a, b, differ := identities(c, snap); differ {
			d.Action = rule.Hangup
			d.Reason = fmt.Sprintf("not reconnected: processes %d and %d share it and have different rights, so that nobody can tell as whom to connect", a, b)
		}
	}
}

// identities finds two holders that the kernel would not show alike.
func identities(c *sockpeer.Connection, snap *sockpeer.Snapshot) (a, b int, differ bool) {
	first := c.Holders[0].PID
	want := snap.Processes[first].Identity
	for _, h := range c.Holders[1:] {
		if !sameIdentity(want, snap.Processes[h.PID].Identity) {
			return first, h.PID, true
		}
	}
	return 0, 0, false
}

func sameIdentity(a, b sockpeer.Identity) bool {
	return a.UID == b.UID && a.GID == b.GID && a.CapEff == b.CapEff &&
		slices.Equal(groupSet(a.Groups), groupSet(b.Groups))
}

func groupSet(groups []uint32) []uint32 {
	s := slices.Clone(groups)
	slices.Sort(s)
	return slices.Compact(s)
}
