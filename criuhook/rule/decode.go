// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"criuhook/sockpeer"
)

// Defaults of a rule, and the most a rule may ask for.
const (
	DefaultTimeout  = 2 * time.Second
	DefaultPatience = 2 * time.Second
	MaxDuration     = 5 * time.Minute
)

// MaxName is the size of sun_path (unix(7)) in bytes. A path needs one of
// them for the NUL at its end, an abstract name for the one at its start.
const MaxName = 108

// choice is a word of the configuration and what it means.
type choice[T any] struct {
	word  string
	value T
}

var (
	defaultActions = []choice[Action]{{"refuse", Refuse}, {"hangup", Hangup}}
	idleActions    = []choice[Action]{{"reconnect", Reconnect}, {"hangup", Hangup}, {"refuse", Refuse}}
	busyActions    = []choice[Action]{{"hangup", Hangup}, {"refuse", Refuse}, {"wait", Wait}}
	absents        = []choice[Absent]{{"hangup", AbsentHangup}, {"fail", AbsentFail}}
	types          = []choice[sockpeer.Type]{{"stream", sockpeer.Stream}, {"seqpacket", sockpeer.Seqpacket}, {"dgram", sockpeer.Dgram}}
	directions     = []choice[sockpeer.Direction]{{"outbound", sockpeer.Outbound}, {"inbound", sockpeer.Inbound}}
	preludes       = []choice[string]{{"none", "none"}, {"sssd", "sssd"}, {"lwmsg", "lwmsg"}, {"dbus", "dbus"}}
)

var ruleKeys = []string{
	"name", "path", "type", "exe", "uid", "direction", "idle", "busy",
	"patience", "prelude", "to", "timeout", "absent",
}

var ruleName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// decodeRule reads one rule. The second result is the node of its name, nil
// if it has none that can be used.
func decodeRule(rule *yaml.Node, p *problems) (Rule, *yaml.Node) {
	v := pairs(rule, "a rule", ruleKeys, p)
	if v == nil {
		return Rule{}, nil
	}
	r := Rule{Source: fmt.Sprintf("%s:%d", p.file, rule.Line)}
	var name *yaml.Node
	if n := v["name"]; n == nil {
		p.at(rule, "the rule has no name")
	} else if s, ok := text(n, "name", p); ok {
		if ruleName.MatchString(s) {
			r.Name, name = s, n
		} else {
			p.at(n, "bad name %q: up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit", s)
		}
	}
	decodeConditions(&r, rule, v, p)
	decodeActions(&r, rule, v, p)
	return r, name
}

func decodeConditions(r *Rule, rule *yaml.Node, v map[string]*yaml.Node, p *problems) {
	if n := v["path"]; n != nil {
		if s, ok := text(n, "path", p); ok {
			r.Path = s
			if s[0] != '/' && s[0] != '@' {
				p.at(n, "path must start with / or, for an abstract name, with @: %q", s)
			} else if err := checkGlob(s); err != nil {
				p.at(n, "path %q: %s", s, err)
			}
		}
	}
	if n := v["type"]; n != nil {
		t := oneOf(n, "type", types, p)
		r.Type = &t
	}
	if n := v["exe"]; n != nil {
		if s, ok := text(n, "exe", p); ok {
			r.Exe = s
			if s[0] != '/' {
				p.at(n, "exe must start with /: %q", s)
			} else if err := checkGlob(s); err != nil {
				p.at(n, "exe %q: %s", s, err)
			}
		}
	}
	if n := v["uid"]; n != nil {
		uid, err := strconv.ParseUint(n.Value, 10, 32)
		switch {
		case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int":
			p.at(n, "uid must be a number, not %s", kind(n))
		case err != nil || uid == 1<<32-1 || n.Value != strconv.FormatUint(uid, 10):
			p.at(n, "uid must be a decimal number from 0 to 4294967294, not %s", n.Value)
		default:
			u := uint32(uid)
			r.UID = &u
		}
	}
	if n := v["direction"]; n != nil {
		r.Direction = oneOf(n, "direction", directions, p)
	}
	if v["path"] == nil && v["exe"] == nil && v["uid"] == nil && v["type"] == nil {
		key := "unknown"
		if r.Direction == sockpeer.Inbound {
			key = "inbound"
		}
		p.at(rule, "the rule matches everything: give it a path, exe, uid or type, or set %q at the top of the file instead", key)
	}
}

func decodeActions(r *Rule, rule *yaml.Node, v map[string]*yaml.Node, p *problems) {
	if n := v["idle"]; n != nil {
		before := len(p.list)
		r.Idle = oneOf(n, "idle", idleActions, p)
		if len(p.list) > before {
			return // what goes with it cannot be judged
		}
	} else {
		p.at(rule, "the rule has no idle: say idle: %s", words(idleActions))
	}
	if r.Idle != Refuse {
		r.Busy = Hangup
	}
	if n := v["busy"]; n != nil {
		r.Busy = oneOf(n, "busy", busyActions, p)
		if v["idle"] != nil && r.Idle == Refuse && r.Busy != Refuse {
			p.at(n, "busy: %s makes no sense with idle: refuse", r.Busy)
		}
	}
	if r.Idle == Reconnect && r.Direction == sockpeer.Inbound {
		p.at(v["idle"], "idle: reconnect is not possible with direction: inbound, the other side would have to connect: use hangup or refuse")
	}
	if r.Busy == Wait {
		r.Patience = DefaultPatience
	}
	if n := v["patience"]; n != nil {
		r.Patience = duration(n, "patience", p)
		if r.Busy != Wait {
			p.at(n, "patience means something only with busy: wait")
		}
	}
	decodeReconnect(r, v, p)
}

func decodeReconnect(r *Rule, v map[string]*yaml.Node, p *problems) {
	if r.Idle != Reconnect {
		for _, key := range []string{"prelude", "to", "timeout", "absent"} {
			if n := v[key]; n != nil && v["idle"] != nil {
				p.at(n, "%s means something only with idle: reconnect", key)
			}
		}
		return
	}
	r.Prelude, r.Timeout = "none", DefaultTimeout
	if n := v["prelude"]; n != nil {
		r.Prelude = oneOf(n, "prelude", preludes, p)
		if r.Prelude != "none" && r.Type != nil && *r.Type != sockpeer.Stream {
			p.at(n, "prelude: %s is not possible with type: %s, only with stream", r.Prelude, r.Type)
		}
	}
	if n := v["to"]; n != nil {
		if s, ok := text(n, "to", p); ok {
			r.To = s
			if err := checkTo(s); err != nil {
				p.at(n, "to: %q: %s", s, err)
			}
		}
	}
	if n := v["timeout"]; n != nil {
		r.Timeout = duration(n, "timeout", p)
	}
	if n := v["absent"]; n != nil {
		r.Absent = oneOf(n, "absent", absents, p)
	}
}

func checkTo(s string) error {
	limit := MaxName - 1
	if s[0] == '@' {
		limit = MaxName
	}
	switch {
	case s[0] != '/' && s[0] != '@':
		return fmt.Errorf("must start with / or, for an abstract name, with @")
	case s == "@":
		return fmt.Errorf("the abstract name is empty")
	case strings.ContainsAny(s, `*?[\`):
		return fmt.Errorf("must be one name, not a glob")
	case s[0] == '/' && strings.ContainsRune(s, 0):
		return fmt.Errorf("a path cannot hold a NUL byte")
	case len(s) > limit:
		return fmt.Errorf("longer than %d bytes, the most a socket's name can be", limit)
	}
	return nil
}

// text is a string that is not empty.
func text(n *yaml.Node, key string, p *problems) (string, bool) {
	switch {
	case n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null":
		p.at(n, "%s must be a string, not %s", key, kind(n))
	case n.ShortTag() != "!!str":
		p.at(n, "%s must be a string, not %s: put it in quotes", key, kind(n))
	case n.Value == "":
		p.at(n, "%s is empty", key)
	default:
		return n.Value, true
	}
	return "", false
}

// oneOf is one of a few words; the first choice after a mistake.
func oneOf[T any](n *yaml.Node, key string, choices []choice[T], p *problems) T {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		p.at(n, "%s must be %s, not %s", key, words(choices), kind(n))
		return choices[0].value
	}
	for _, c := range choices {
		if c.word == n.Value {
			return c.value
		}
	}
	p.at(n, "%s must be %s, not %q", key, words(choices), n.Value)
	return choices[0].value
}

func words[T any](choices []choice[T]) string {
	var b strings.Builder
	for i, c := range choices {
		switch {
		case i == 0:
		case i == len(choices)-1:
			b.WriteString(" or ")
		default:
			b.WriteString(", ")
		}
		b.WriteString(c.word)
	}
	return b.String()
}

func duration(n *yaml.Node, key string, p *problems) time.Duration {
	return durationUpTo(n, key, MaxDuration, p)
}

func durationUpTo(n *yaml.Node, key string, longest time.Duration, p *problems) time.Duration {
	if n.Kind != yaml.ScalarNode {
		p.at(n, "%s must be a duration such as 2s, not %s", key, kind(n))
		return 0
	}
	d, err := time.ParseDuration(n.Value)
	switch {
	case err != nil:
		p.at(n, "%s must be a duration with a unit, such as 2s or 500ms, not %q", key, n.Value)
	case d <= 0 || d > longest:
		p.at(n, "%s must be more than 0 and at most %s, not %s", key, longest, n.Value)
	default:
		return d
	}
	return 0
}
