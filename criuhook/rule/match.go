// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"errors"
	"path"
	"slices"
	"strings"

	"criuhook/sockpeer"
)

// Match returns the first rule that c falls under, nil if there is none. The
// result points into s. A rule's path is compared with the peer's name and with
// the one by which the application reaches the peer, if that is another; for an
// inbound connection with our own. A name that is neither abstract nor
// absolute falls under no path, because nobody can tell where it is.
func (s *Set) Match(c *sockpeer.Connection) *Rule {
	for i := range s.Rules {
		if s.Rules[i].matches(c) {
			return &s.Rules[i]
		}
	}
	return nil
}

func (r *Rule) matches(c *sockpeer.Connection) bool {
	if r.Direction != c.Direction {
		return false
	}
	if r.Type != nil && *r.Type != c.Type {
		return false
	}
	if r.UID != nil && int64(*r.UID) != c.Peer.UID {
		return false
	}
	if r.Exe != "" && !globMatches(r.Exe, c.Peer.Exe) {
		return false
	}
	if r.Path == "" {
		return true
	}
	return slices.ContainsFunc(names(c), func(name sockpeer.Name) bool {
		return placed(name) && globMatches(r.Path, name.Pattern())
	})
}

// names are all names of c that a rule's path may be about: a container sees
// the daemon's socket under another than the daemon.
func names(c *sockpeer.Connection) []sockpeer.Name {
	if c.Direction == sockpeer.Inbound || c.Peer.Path == "" {
		return []sockpeer.Name{matched(c)}
	}
	return []sockpeer.Name{matched(c), c.Peer.Path}
}

// matched is the name of c that a rule's path is about first of all.
func matched(c *sockpeer.Connection) sockpeer.Name {
	if c.Direction == sockpeer.Inbound {
		return c.Name
	}
	return c.Peer.Name
}

// placed: the name means the same whatever the current directory is.
func placed(n sockpeer.Name) bool {
	return n.Abstract() || strings.HasPrefix(string(n), "/")
}

func globMatches(glob, name string) bool {
	ok, err := path.Match(glob, name)
	return err == nil && ok
}

// checkGlob says what is wrong with a glob, nil if nothing is.
func checkGlob(glob string) error {
	if _, err := path.Match(glob, ""); err != nil {
		return errors.New("bad glob: a [ without its ], or a \\ at the end")
	}
	inClass, star := false, false
	for i := 0; i < len(glob); i++ {
		b := glob[i]
		if b == '*' && !inClass && star {
			return errors.New("bad glob: ** is not known, a * stands for what is between two slashes")
		}
		star = b == '*'
		switch b {
		case '\\':
			i++
		case '[':
			inClass = true
		case ']':
			inClass = false
		}
	}
	return nil
}

// escapeGlob makes a glob that matches name and, but for bytes that are not
// UTF-8, nothing else: those become ?, since YAML cannot hold them.
func escapeGlob(name string) string {
	var b strings.Builder
	for i, r := range name {
		switch {
		case strings.ContainsRune(`*?[\`, r):
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\uFFFD' && !strings.HasPrefix(name[i:], "\uFFFD"):
			b.WriteByte('?')
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// Waits reports whether a rule may wait for a busy connection.
func (s *Set) Waits() bool {
	return slices.ContainsFunc(s.Rules, func(r Rule) bool { return r.Busy == Wait })
}
