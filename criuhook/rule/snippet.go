// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"fmt"
	"math"
	"path/filepath"
	"regexp"
	"strings"

	"criuhook/sockpeer"
)

// Snippet is a configuration file, to be put into rules.d or its rule under
// rules: of an existing file, with which a connection that was refused for
// want of a rule would be dumped. It says as little as it can: this name,
// this type, this user.
func Snippet(c *sockpeer.Connection) string {
	r := Rule{Name: SnippetName(c), Type: &c.Type, Direction: c.Direction}
	name := matched(c)
	switch {
	case placed(name):
		r.Path = escapeGlob(name.Pattern())
	case strings.HasPrefix(c.Peer.Exe, "/"):
		r.Exe = escapeGlob(c.Peer.Exe)
	case c.Direction == sockpeer.Inbound:
		return "# There is no name that a rule could go by. This is for every inbound connection without a rule:\ninbound: hangup\n"
	default:
		return "# There is no name that a rule could go by. This is for every outbound connection without a rule:\nunknown: hangup\n"
	}
	if c.Peer.UID >= 0 && c.Peer.UID < math.MaxUint32 {
		uid := uint32(c.Peer.UID)
		r.UID = &uid
	}
	var b strings.Builder
	b.WriteString("rules:\n")
	fmt.Fprintf(&b, "  - name: %s\n", quote(r.Name))
	r.conditions(func(key, value string) { fmt.Fprintf(&b, "    %s: %s\n", key, value) })
	switch {
	case c.Direction == sockpeer.Inbound:
		b.WriteString("    idle: hangup        # the other side connects again\n")
	case r.Path == "" || r.UID == nil:
		b.WriteString("    idle: hangup        # a new connection is not possible: the listener's name or user is not known\n")
	case isBuiltIn(c, stdoutRule):
		b.WriteString("    idle: hangup        # what is printed later is lost: EPIPE, or SIGPIPE\n")
	case c.Shutdown != 0:
		b.WriteString("    idle: hangup        # it is half closed, which a new connection would not be\n")
	case isBuiltIn(c, "dbus-"):
		b.WriteString("    idle: reconnect     # unique name, owned names and match rules are lost; or hangup, without prelude\n" +
			"    prelude: dbus\n")
	default:
		b.WriteString("    idle: reconnect     # a new connection, without any greeting; or hangup: the application finds it dead\n")
	}
	if busy := c.Busy(); busy != "" {
		fmt.Fprintf(&b, "    busy: hangup        # now: %s; or wait\n", printable(busy))
	} else {
		b.WriteString("    busy: hangup        # or refuse, or wait\n")
	}
	return b.String()
}

// SnippetName is the name of the rule in the Snippet for c, and so what a
// file for it is best called.
func SnippetName(c *sockpeer.Connection) string {
	name := matched(c)
	switch {
	case placed(name):
		return ruleNameFrom(name.Pattern())
	case strings.HasPrefix(c.Peer.Exe, "/"):
		return ruleNameFrom("exe-" + filepath.Base(c.Peer.Exe))
	case c.Direction == sockpeer.Inbound:
		return "inbound"
	}
	return "unknown"
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9._]+`)

func ruleNameFrom(s string) string {
	const most = 50
	s = notInName.ReplaceAllString(s, "-")
	s = strings.TrimSuffix(s, ".sock")
	if len(s) > most {
		s = s[len(s)-most:]
	}
	s = strings.Trim(s, "-._")
	if s == "" {
		s = "connection"
	}
	for _, r := range BuiltIn() {
		if r.Name == s {
			return s + "-local"
		}
	}
	return s
}

// isBuiltIn: c falls under a built-in rule whose name begins so.
func isBuiltIn(c *sockpeer.Connection, name string) bool {
	r := (&Set{Rules: BuiltIn()}).Match(c)
	return r != nil && strings.HasPrefix(r.Name, name)
}
