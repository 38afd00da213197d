// SPDX-License-Identifier: Apache-2.0

// Package plan decides, from a scan and the rules, what becomes of each
// connection at a dump. It is pure: it asks nothing of the system.
package plan

import (
	"time"

	"criuhook/criuhook/known"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// Decision is what becomes of one connection, and why.
type Decision struct {
	Connection sockpeer.Connection
	// Holder is the process of the first holder.
	Holder sockpeer.Process
	// Is tells in people's words what the connection is.
	Is known.Description
	// Rule is the rule that matched; nil: none did.
	Rule *rule.Rule
	// Action is Wait for a busy connection that the rule gives time: the
	// caller lets the application run and plans anew, or calls Expire.
	Action rule.Action
	// Busy is why the connection is busy; "": it is idle.
	Busy string
	// Reason is why the action is not simply the rule's, or why it is a
	// refusal: one sentence for people.
	Reason string

	// final: the refusal is one that no rule can lift.
	final bool
}

// Plan holds the decisions of one dump, in the order of the scan.
type Plan struct {
	Decisions []Decision
}

// Refused returns the decisions by which the dump must not be.
func (p *Plan) Refused() []Decision { return p.with(rule.Refuse) }

// Waiting returns the decisions that stand only once the connection is idle.
func (p *Plan) Waiting() []Decision { return p.with(rule.Wait) }

// Empty reports whether there is nothing to do: no connection leaves the tree.
func (p *Plan) Empty() bool { return len(p.Decisions) == 0 }

func (p *Plan) with(a rule.Action) []Decision {
	var out []Decision
	for _, d := range p.Decisions {
		if d.Action == a {
			out = append(out, d)
		}
	}
	return out
}

// Expire turns each wait into a refusal whose rule's patience is over after
// the given time of waiting.
func (p *Plan) Expire(waited time.Duration) {
	for i := range p.Decisions {
		d := &p.Decisions[i]
		if d.Action == rule.Wait && d.Rule != nil && waited >= d.Rule.Patience {
			d.Action = rule.Refuse
			d.Reason = "it stayed busy for the " + d.Rule.Patience.String() + " the rule gives it: " + d.Busy
		}
	}
}

// Freeze turns every wait into a refusal: nobody in a frozen tree becomes idle.
func (p *Plan) Freeze() {
	for i := range p.Decisions {
		if d := &p.Decisions[i]; d.Action == rule.Wait {
			d.Action = rule.Refuse
			d.Reason = "it was busy again when CRIU froze the tree, and its rule does not let it be hung up; dump again: " + d.Busy
		}
	}
}
