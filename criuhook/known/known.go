// SPDX-License-Identifier: Apache-2.0

// Package known tells in people's words what a connection is: which daemon is
// at the other end, what for, and which library of the process opened it. It
// goes by conventional names and asks nothing of the system.
package known

import (
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"criuhook/sockpeer"
)

// Description is what is known of a connection.
type Description struct {
	// Daemon and Service are who listens and what for; "": the name is of no
	// daemon known here.
	Daemon, Service string
	// Libraries are those that open such connections and that the process
	// Holder has mapped. One of them did it, or the program itself.
	Libraries []string
	Holder    int
	// Inherited: libraries open such connections, and no holder has one
	// mapped, so that it may be a parent's.
	Inherited bool

	text string
}

// String is the description as one phrase, such as "sssd, name service (nss
// pipe), opened by libnss_sss.so.2".
func (d Description) String() string { return d.text }

// Telling reports whether the description says more than what the connection
// says of its peer.
func (d Description) Telling() bool { return d.Daemon != "" || len(d.Libraries) > 0 }

// Describe tells what c is. processes are its holders, by pid; those whose
// mapped files are not known tell nothing of who opened it.
func Describe(c *sockpeer.Connection, processes map[int]sockpeer.Process) Description {
	if c.Direction == sockpeer.Inbound {
		return inbound(c)
	}
	var d Description
	s := find(c)
	if s == nil {
		d.text = "unknown: " + peer(&c.Peer) + place(c)
		d.byJava(c, processes)
		return d
	}
	d.Daemon, d.Service = s.daemon, s.service
	if s.variant != "" && filepath.Base(c.Peer.Exe) == s.variant {
		d.Daemon = s.variant
	}
	d.text = d.Daemon + ", " + d.Service
	told := d.opened(c, processes, s.libraries)
	switch {
	case len(d.Libraries) > 0:
		d.text += ", opened by " + join(d.Libraries) + of(&d, c)
	case s.own:
		d.byJava(c, processes)
	case told:
		d.Inherited = true
		d.text += ", perhaps inherited: no library that opens it is mapped"
	}
	return d
}

// byJava looks for what opens sockets for a Java program: its runtime.
func (d *Description) byJava(c *sockpeer.Connection, processes map[int]sockpeer.Process) {
	if d.opened(c, processes, javaLibraries); len(d.Libraries) > 0 {
		d.text += ", perhaps opened by Java itself (" + join(d.Libraries) + of(d, c) + ")"
	}
}

// inbound describes a connection that somebody made to the tree.
func inbound(c *sockpeer.Connection) Description {
	return Description{text: "a client of this process" + at(c.Name) + ": " + peer(&c.Peer)}
}

// opened looks for libraries among the files that the holders have mapped, the
// first holder first. told: of all of them it is known what they have mapped.
func (d *Description) opened(c *sockpeer.Connection, processes map[int]sockpeer.Process, libraries []string) (told bool) {
	told = true
	for _, h := range c.Holders {
		mapped := processes[h.PID].Mapped
		if mapped == nil {
			told = false
			continue
		}
		if found := among(mapped, libraries); len(found) > 0 {
			d.Libraries, d.Holder = found, h.PID
			break
		}
	}
	return told && len(c.Holders) > 0
}

// among returns the libraries of which there is a file, in their order, each
// by its name there without what comes behind the soname.
func among(files, libraries []string) []string {
	var found []string
	for _, l := range libraries {
		for _, f := range files {
			if name, ok := library(filepath.Base(f), l); ok {
				found = append(found, name)
				break
			}
		}
	}
	return found
}

// library reports whether a file is the library: of its soname, or of a
// version of that (libdbus-1.so.3.38.3), or of a glob.
func library(base, want string) (name string, ok bool) {
	if strings.Contains(want, "*") {
		ok, _ = path.Match(want, base)
		return clean(base), ok
	}
	return want, base == want || strings.HasPrefix(base, want+".")
}

// find returns the service that listens at the name a connection was made to:
// as the daemon bound it, else as the application sees it.
func find(c *sockpeer.Connection) *service {
	if s := named(c.Peer.Name); s != nil || c.Peer.Path == "" {
		return s
	}
	return named(c.Peer.Path)
}

func named(n sockpeer.Name) *service {
	name := n.Pattern()
	if !n.Abstract() {
		if !strings.HasPrefix(name, "/") {
			return nil
		}
		if rest, ok := strings.CutPrefix(name, "/var/run/"); ok {
			name = "/run/" + rest // the one is a link to the other
		}
	}
	for i := range services {
		for _, glob := range services[i].names {
			if ok, _ := path.Match(glob, name); ok {
				return &services[i]
			}
		}
	}
	return nil
}

// of names the process whose libraries they are, if it is not the first one.
func of(d *Description, c *sockpeer.Connection) string {
	if d.Holder == c.Holders[0].PID {
		return ""
	}
	return " of process " + strconv.Itoa(d.Holder)
}

// peer is the program at the other end.
func peer(p *sockpeer.Peer) string {
	switch {
	case p.Exe != "" && p.PID != 0:
		return clean(p.Exe) + " (process " + strconv.Itoa(p.PID) + ")"
	case p.PID != 0:
		return "process " + strconv.Itoa(p.PID)
	}
	return "a process that is not visible"
}

// place is where a connection leads.
func place(c *sockpeer.Connection) string {
	if c.Peer.Name == "" {
		// Who connects needs a name to connect to.
		return ", without a name, as from socketpair"
	}
	return at(c.Peer.Name)
}

func at(n sockpeer.Name) string {
	if n == "" {
		return ""
	}
	return " at " + n.String()
}

// join writes alternatives: a, b or c.
func join(words []string) string {
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// clean makes text from another process safe for a terminal.
func clean(s string) string {
	q := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
