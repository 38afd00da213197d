// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"context"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lookUpTime bounds how long a scan waits for file systems, all in all: the
// tree is frozen, and a server of one may be part of it.
const lookUpTime = 500 * time.Millisecond

// socketFile is a socket file that a path leads to.
type socketFile struct {
	dev, ino uint64 // as stat(2) tells them
	// layered: stat(2) shows another device than sock_diag.
	layered bool
}

// is reports whether it is the file that sock_diag tells of.
func (f socketFile) is(v VFS) bool { return uint32(f.ino) == v.Inode && kernelDev(f.dev) == v.Dev }

// maybe is for when no more is known.
func (f socketFile) maybe(v VFS) bool { return uint32(f.ino) == v.Inode && f.layered || v == VFS{} }

// maxLookUps bounds the threads that look names up at the same time.
const maxLookUps = 64

// addElsewhere finds the connections whose application would reach another
// file by the peer's name than the peer's, or none, and by which name it
// reaches the peer's.
func (s *scan) addElsewhere(conns []Connection) {
	ctx, cancel := context.WithTimeout(context.Background(), lookUpTime)
	defer cancel()
	keys := map[lookUp]bool{}
	for i := range conns {
		if c := &conns[i]; c.hasPath() {
			keys[lookUp{c.Holders[0].PID, c.Peer.Name}] = true
			if c.Peer.PID > 0 {
				keys[lookUp{c.Peer.PID, c.Peer.Name}] = true
			}
		}
	}
	known := lookUps(sideBySide(ctx, keys, func(l lookUp) *socketFile { return findSocket(l.pid, l.name) }))
	searches := map[search]bool{}
	for i := range conns {
		if c := &conns[i]; c.hasPath() {
			owned := !s.unowned[c.Inode]
			c.Peer.Elsewhere = known.elsewhere(c.Holders[0].PID, &c.Peer, owned)
			if s, ok := known.search(c, owned); ok {
				searches[s] = true
			}
		}
	}
	if len(searches) == 0 {
		return
	}
	found := sideBySide(ctx, searches, findPath)
	for i := range conns {
		if c := &conns[i]; c.hasPath() {
			if s, ok := known.search(c, !s.unowned[c.Inode]); ok {
				name, answered := found[s]
				c.Peer.Path = name
				c.Peer.Elsewhere = c.Peer.Elsewhere || !answered // nobody can tell
			}
		}
	}
}

// search is how to find another name for the peer of c; false: its own leads
// there, or what to look for is not known.
func (known lookUps) search(c *Connection, owned bool) (search, bool) {
	pid, p := c.Holders[0].PID, &c.Peer
	ours, ok := known[lookUp{pid, p.Name}]
	if !ok || ours != nil && !p.Elsewhere {
		return search{}, false
	}
	s := search{pid: pid, file: p.VFS, name: p.Name}
	if owned && p.PID > 0 {
		if theirs := known[lookUp{p.PID, p.Name}]; theirs != nil {
			s.peer = p.PID
			if !theirs.maybe(p.VFS) && !theirs.is(p.VFS) || p.VFS == (VFS{}) { // made anew, or not visible
				s.file, s.was = VFS{Dev: kernelDev(theirs.dev), Inode: uint32(theirs.ino)}, p.VFS
			}
		}
	}
	return s, s.file != VFS{}
}

// hasPath reports whether the connection could be made again by a path.
func (c *Connection) hasPath() bool {
	return c.Direction == Outbound && strings.HasPrefix(string(c.Peer.Name), "/")
}

// elsewhere compares what a name leads to for a process and for its peer.
// owned: Peer.PID holds the peer's half, or listens. A daemon may have made its
// socket file anew since, so that it is not the one it was bound to. A look-up
// that had no answer may lead anywhere.
func (known lookUps) elsewhere(pid int, p *Peer, owned bool) bool {
	ours, ok := known[lookUp{pid, p.Name}]
	if !ok {
		return true
	}
	if ours == nil || ours.is(p.VFS) {
		return false
	}
	if owned && p.PID > 0 {
		theirs, ok := known[lookUp{p.PID, p.Name}]
		if !ok {
			return true
		}
		if theirs != nil {
			return theirs.dev != ours.dev || theirs.ino != ours.ino
		}
		if sameRoot(pid, p.PID) {
			return false
		}
	}
	return !ours.maybe(p.VFS)
}

// sameRoot reports whether paths mean the same to two processes.
func sameRoot(a, b int) bool {
	for _, what := range []string{"ns/mnt", "root"} {
		x, err1 := os.Readlink(procPath(a, what))
		y, err2 := os.Readlink(procPath(b, what))
		if err1 != nil || err2 != nil || x != y {
			return false
		}
	}
	return true
}

// lookUp is a name as a process sees it.
type lookUp struct {
	pid  int
	name Name
}

// lookUps are socket files by name; nil: there is none. What is missing could
// not be looked up in time.
type lookUps map[lookUp]*socketFile

// sideBySide looks things up at the same time: a file system that does not
// answer costs what is in it only, and the threads that are left behind there.
// What has no answer when ctx ends is missing.
func sideBySide[K comparable, V any](ctx context.Context, keys map[K]bool, look func(K) V) map[K]V {
	type result struct {
		key   K
		value V
	}
	found := make(chan result, len(keys))
	slots := make(chan struct{}, maxLookUps)
	for key := range keys {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			found <- result{key, look(key)}
		}()
	}
	known := make(map[K]V, len(keys))
	for len(known) < len(keys) {
		select {
		case r := <-found:
			known[r.key] = r.value
		case <-ctx.Done():
			return known
		}
	}
	return known
}

// findSocket finds the socket file that a name leads a process to.
func findSocket(pid int, name Name) *socketFile {
	fd, err := openFor(pid, name)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if unix.Fstat(fd, &st) != nil || unix.Fstatfs(fd, &fs) != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil
	}
	return &socketFile{
		dev: st.Dev, ino: st.Ino,
		layered: fs.Type == unix.BTRFS_SUPER_MAGIC || fs.Type == unix.OVERLAYFS_SUPER_MAGIC,
	}
}

// openFor opens what a path leads to, below a process' root, as [Connector] does.
func openFor(pid int, name Name) (fd int, err error) {
	root, err := unix.Open(procPath(pid, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	return openBelow(root, name)
}

// openBelow opens what a path leads to, from a root that it cannot leave.
func openBelow(root int, name Name) (fd int, err error) {
	return unix.Openat2(root, strings.TrimLeft(string(name), "/"), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT,
	})
}
