// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"fmt"
	"regexp"
	"strings"

	"criuhook/sockpeer"
)

// YAML writes the set in the syntax of the configuration, each rule under a
// comment that says where it comes from and why. Parse reads the same rules
// back; Load would object to the names of the built-in ones.
func (s *Set) YAML() ([]byte, error) {
	var b strings.Builder
	if s.CRIU != "" {
		fmt.Fprintf(&b, "criu: %s\n", quote(s.CRIU))
	}
	b.WriteString("rules:\n")
	var explained *Rule
	for i := range s.Rules {
		r := &s.Rules[i]
		if !ruleName.MatchString(r.Name) {
			return nil, fmt.Errorf("write the rules as YAML: rule %d has the bad name %q", i+1, r.Name)
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		comment(&b, r.Source)
		if reasons := r.Reasons(); explained != nil && len(reasons) > 0 && r.SameReasons(explained) {
			comment(&b, "Explained at "+explained.Name+".")
		} else {
			for _, x := range reasons {
				comment(&b, x.Title+": "+x.Text)
			}
			explained = r
		}
		r.yaml(&b)
	}
	fmt.Fprintf(&b, "\nunknown: %s\ninbound: %s\n", s.Unknown, s.Inbound)
	s.Service.yaml(&b)
	return []byte(b.String()), nil
}

// yaml writes the rule as an element of the list.
func (r *Rule) yaml(b *strings.Builder) {
	fmt.Fprintf(b, "  - name: %s\n", quote(r.Name))
	key := func(key, value string) { fmt.Fprintf(b, "    %s: %s\n", key, value) }
	r.conditions(key)
	key("idle", r.Idle.String())
	key("busy", r.Busy.String())
	if r.Busy == Wait {
		key("patience", r.Patience.String())
	}
	if r.Idle != Reconnect {
		return
	}
	key("prelude", quote(r.Prelude))
	if r.To != "" {
		key("to", quote(r.To))
	}
	key("timeout", r.Timeout.String())
	key("absent", r.Absent.String())
}

func (r *Rule) conditions(key func(key, value string)) {
	if r.Path != "" {
		key("path", quote(r.Path))
	}
	if r.Type != nil {
		key("type", r.Type.String())
	}
	if r.Exe != "" {
		key("exe", quote(r.Exe))
	}
	if r.UID != nil {
		key("uid", fmt.Sprint(*r.UID))
	}
	if r.Direction != sockpeer.Outbound {
		key("direction", r.Direction.String())
	}
}

// comment writes text as comment lines of readable width.
func comment(b *strings.Builder, text string) {
	const width = 100
	line := ""
	for _, word := range strings.Fields(printable(text)) {
		if line != "" && len(line)+1+len(word) > width {
			fmt.Fprintf(b, "  #%s\n", line)
			line = ""
		}
		line += " " + word
	}
	if line != "" {
		fmt.Fprintf(b, "  #%s\n", line)
	}
}

// printable makes text safe for a comment and for a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f {
			return ' '
		}
		return r
	}, text)
}

// plainScalar is what no YAML reader takes for anything but a string.
var plainScalar = regexp.MustCompile(`^[/A-Za-z][/A-Za-z0-9._*-]*$`)

// yamlWords are the plain words that YAML 1.1 or 1.2 reads as something else.
var yamlWords = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off|true|false|null)$`)

// quote writes s as a YAML scalar of ASCII. Bytes that are not UTF-8, which
// YAML cannot hold, become U+FFFD.
func quote(s string) string {
	if plainScalar.MatchString(s) && !yamlWords.MatchString(s) {
		return s
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r >= ' ' && r < 0x7f:
			b.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
