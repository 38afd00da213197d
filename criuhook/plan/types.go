// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// Decision is what becomes of one connection, and why.
type Decision struct {
	Connection sockpeer.Connection
	// Holder is the process of the first holder.
	Holder sockpeer.Process
	// Rule is the rule that matched; nil: none did.
	Rule   *rule.Rule
	Action rule.Action
	// Busy is why the connection is busy; "": it is idle.
	Busy string
	// Reason is why the action is not simply the rule's, or why it is a
	// refusal: one sentence for people.
	Reason string
}

// Plan holds the decisions of one dump, in the order of the scan.
type Plan struct {
	Decisions []Decision
}
