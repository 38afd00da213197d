// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
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
// file by the peer's name than the peer's.
func (s *scan) addElsewhere(conns []Connection) {
	keys := map[lookUp]bool{}
	for i := range conns {
		if c := &conns[i]; c.hasPath() {
			keys[lookUp{c.Holders[0].PID, c.Peer.Name}] = true
			if c.Peer.PID > 0 {
				keys[lookUp{c.Peer.PID, c.Peer.Name}] = true
			}
		}
	}
	known := lookUpAll(keys)
	for i := range conns {
		if c := &conns[i]; c.hasPath() {
			c.Peer.Elsewhere = known.elsewhere(c.Holders[0].PID, &c.Peer, !s.unowned[c.Inode])
		}
	}
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

// lookUpAll looks names up side by side: a file system that does not answer
// costs its own names only, and the threads that are left behind in it.
func lookUpAll(keys map[lookUp]bool) lookUps {
	type result struct {
		key  lookUp
		file *socketFile
	}
	found := make(chan result, len(keys))
	slots := make(chan struct{}, maxLookUps)
	for key := range keys {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			found <- result{key, findSocket(key.pid, key.name)}
		}()
	}
	late := time.NewTimer(lookUpTime)
	defer late.Stop()
	known := lookUps{}
	for len(known) < len(keys) {
		select {
		case r := <-found:
			known[r.key] = r.file
		case <-late.C:
			return known
		}
	}
	return known
}

// findSocket walks a path below a process' root, as [Connector] does.
func findSocket(pid int, name Name) *socketFile {
	root, err := unix.Open(procPath(pid, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(root)
	fd, err := openBelow(root, name)
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

// openBelow opens what a path leads to, from a root that it cannot leave.
func openBelow(root int, name Name) (fd int, err error) {
	return unix.Openat2(root, strings.TrimLeft(string(name), "/"), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT,
	})
}
