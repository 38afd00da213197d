// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// rulesDir is where the advice puts new rules.
var rulesDir = rule.Dir(rule.DefaultConfig)

// String is the decision in one line, for logs.
func (d *Decision) String() string {
	to := d.peer()
	if d.Is.Daemon != "" {
		to += " [" + d.Is.String() + "]"
	}
	s := fmt.Sprintf("%s: %s to %s: %s (%s)", d.where(), d.what(), to, d.Action, d.ruleName())
	if d.Reason != "" {
		return s + ": " + d.Reason
	}
	if d.Busy != "" {
		return s + ": busy: " + d.Busy
	}
	return s
}

// Explain is the message of a refusal, of several lines: what, by whom and
// with whom, why, and what would allow it.
func (d *Decision) Explain() string { return d.head() + d.advice() }

// Explain is the message of all refusals of the plan, each piece of advice
// only once; "" if nothing is refused.
func (p *Plan) Explain() string {
	var b strings.Builder
	refused := p.Refused()
	done := make([]bool, len(refused))
	for i := range refused {
		if done[i] {
			continue
		}
		advice := refused[i].advice()
		for j := i; j < len(refused); j++ {
			if !done[j] && refused[j].advice() == advice {
				b.WriteString(refused[j].head())
				done[j] = true
			}
		}
		b.WriteString(advice)
	}
	return b.String()
}

func (d *Decision) head() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s: %s\n", d.where(), d.what(), d.Action)
	for _, h := range d.Connection.Holders[min(1, len(d.Connection.Holders)):] {
		fmt.Fprintf(&b, "  also:   process %d fd %d\n", h.PID, h.FD)
	}
	if d.Is.Telling() {
		fmt.Fprintf(&b, "  is:     %s\n", d.Is)
	}
	fmt.Fprintf(&b, "  peer:   %s\n", d.peer())
	if d.Connection.Name != "" {
		fmt.Fprintf(&b, "  we are: %s\n", d.Connection.Name)
	}
	if d.Busy != "" {
		fmt.Fprintf(&b, "  busy:   %s\n", d.Busy)
	}
	fmt.Fprintf(&b, "  rule:   %s\n", d.ruleName())
	if d.Reason != "" {
		fmt.Fprintf(&b, "  why:    %s\n", d.Reason)
	}
	return b.String()
}

// advice is what to do about a refusal; "" for any other action.
func (d *Decision) advice() string {
	c := &d.Connection
	switch {
	case d.Action != rule.Refuse:
		return ""
	case d.final:
		return "  to do:  no rule can allow this; if the application can, let it close the connection before the dump\n"
	case d.Rule != nil && d.Rule.Source != rule.BuiltInSource:
		return fmt.Sprintf("  to do:  change %s%s\n", d.ruleName(), d.change())
	}
	file := filepath.Join(rulesDir, rule.SnippetName(c)+".yaml")
	return fmt.Sprintf("  to do:  to allow it, write this to %s (criuhook rules check FILE tells whether it is right):\n%s",
		file, indent(rule.Snippet(c), "    "))
}

// change says what of the user's own rule to change.
func (d *Decision) change() string {
	r, c := d.Rule, &d.Connection
	unplaced := c.Direction == sockpeer.Inbound || c.Peer.Name == ""
	switch {
	case d.Busy != "" && r.Idle != rule.Refuse && r.Busy == rule.Wait:
		return ": give it a longer patience, or busy: hangup; or try again while the connection is idle"
	case d.Busy != "" && r.Idle != rule.Refuse:
		return ": busy: hangup, or busy: wait; or try again while the connection is idle"
	case r.Idle == rule.Refuse && !unplaced:
		return ": idle: hangup, or idle: reconnect with the prelude of its protocol"
	case c.Shutdown != 0 && r.Idle == rule.Reconnect && !unplaced:
		return ": busy: hangup"
	}
	return ": idle: hangup"
}

// where is the process and fd that hold the connection.
func (d *Decision) where() string {
	if len(d.Connection.Holders) == 0 {
		return fmt.Sprintf("socket %d", d.Connection.Inode)
	}
	h := d.Connection.Holders[0]
	return fmt.Sprintf("process %d (%s) fd %d", h.PID, clean(d.Holder.Comm), h.FD)
}

func (d *Decision) what() string {
	c := &d.Connection
	return fmt.Sprintf("%s unix %s connection, inode %d", c.Direction, c.Type, c.Inode)
}

// peer is everything known of the other end.
func (d *Decision) peer() string {
	p := &d.Connection.Peer
	name := p.Name.String()
	if p.Name == "" {
		name = "a socket without a name"
	}
	var more []string
	if p.Path != "" {
		more = append(more, "for the application "+p.Path.String())
	}
	if p.PID != 0 {
		more = append(more, "process "+strconv.Itoa(p.PID))
	}
	if p.Exe != "" {
		more = append(more, clean(p.Exe))
	}
	if p.UID >= 0 {
		more = append(more, "uid "+strconv.FormatInt(p.UID, 10))
	} else {
		more = append(more, "uid not known")
	}
	return name + " (" + strings.Join(more, ", ") + ")"
}

func (d *Decision) ruleName() string {
	switch {
	case d.Rule == nil:
		return "no rule"
	case d.Rule.Source == "":
		return "rule " + d.Rule.Name
	}
	return "rule " + d.Rule.Name + ", " + d.Rule.Source
}

// clean makes text from another process safe for a terminal.
func clean(s string) string {
	q := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

func indent(text, by string) string {
	return by + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n"+by) + "\n"
}
