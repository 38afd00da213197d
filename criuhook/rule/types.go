// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"time"

	"criuhook/sockpeer"
)

// Action is what becomes of a connection.
type Action uint8

// Reconnect and Hangup let the dump go on, Refuse fails it, Wait lets the
// application run on for a while and decides again.
const (
	Refuse Action = iota
	Reconnect
	Hangup
	Wait
)

func (a Action) String() string {
	switch a {
	case Reconnect:
		return "reconnect"
	case Hangup:
		return "hangup"
	case Wait:
		return "wait"
	}
	return "refuse"
}

// MarshalText makes an Action readable in JSON and YAML.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Absent is what a restore does when the daemon does not come.
type Absent uint8

// AbsentHangup: the application finds a dead connection. AbsentFail: the
// restore fails.
const (
	AbsentHangup Absent = iota
	AbsentFail
)

func (a Absent) String() string {
	if a == AbsentFail {
		return "fail"
	}
	return "hangup"
}

// MarshalText makes an Absent readable in JSON and YAML.
func (a Absent) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// About explains a built-in rule to people: "criuhook rules" and docs/rules.md
// show it.
type About struct {
	// Client is what the clients of such a daemon do with their connections.
	Client string
	// Cost is what the rule's actions cost the application.
	Cost string
	// Known is where all that is known from: sources, and the tests that
	// observed it.
	Known string
}

// Rule says which connections, and what to do with them. A zero value of a
// condition matches everything.
type Rule struct {
	Name string
	// Path is a glob (path.Match) on the peer's name as the peer bound it or as
	// the application sees it, "@…" for abstract names; of an inbound
	// connection, on our own name.
	Path      string
	Type      *sockpeer.Type // nil: any
	Exe       string         // glob on the peer's executable
	UID       *uint32        // nil: any
	Direction sockpeer.Direction

	Idle     Action        // Reconnect, Hangup or Refuse
	Busy     Action        // Hangup, Refuse or Wait
	Patience time.Duration // only with Busy Wait
	// Prelude, To, Timeout and Absent mean something only with Idle
	// Reconnect and are zero otherwise.
	Prelude string // "none", "sssd", "lwmsg", "dbus"
	To      string // connect here instead; "": where it was
	Timeout time.Duration
	Absent  Absent

	// Why this action: shown by a refusal and by "criuhook rules".
	Why string
	// About is what more is known, of built-in rules.
	About About
	// Source is the file and line of the rule, or "built-in".
	Source string
}

// Set is everything the configuration says, in force and in order.
type Set struct {
	Rules   []Rule
	Unknown Action // outbound without a rule: Refuse or Hangup
	Inbound Action // inbound without a rule: Refuse or Hangup
	// CRIU is the path of the real CRIU; "": the configuration names none.
	CRIU string
	// Service is for "criuhook serve".
	Service Service
}
