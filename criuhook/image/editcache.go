// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	pb "google.golang.org/protobuf/proto"

	"criuhook/proto"
)

const devNull = "/dev/null"

// oPath is O_PATH, the same on every architecture criuhook knows.
const oPath = unix.O_PATH

// errNext ends messages about a cache that is used as no client uses it.
const errNext = "only clients that map it for reading are understood; let the process close it before the dump, or dump without criuhook"

// caches takes every name-service cache that a client uses out of the images:
// mappings become private anonymous memory, fds become /dev/null. Clients map
// their cache; whoever only has it open, a backup say, reads it as a file, and
// CRIU restores it as any file.
func (e *edit) caches(external []ExternalFile) ([]*proto.Cache, error) {
	files := e.cacheFiles(external)
	if len(files) == 0 {
		return nil, nil
	}
	byID := map[uint32]*cacheFile{}
	for _, c := range files {
		if c.entry.GetId() != c.id || byID[c.id] != nil {
			return nil, fmt.Errorf("cache %s: the id %#x of its entry in %s is ambiguous: the images are damaged", c.path, c.id, filesName)
		}
		byID[c.id] = c
	}
	var out []*proto.Cache
	sums := map[*cacheFile]*proto.Cache{}
	for _, c := range files {
		for _, old := range out {
			if old.Path == c.path && old.Unlinked == c.unlinked {
				sums[c] = old
			}
		}
		if sums[c] == nil {
			sums[c] = &proto.Cache{Path: c.path, Unlinked: c.unlinked}
			out = append(out, sums[c])
		}
	}
	mapped := e.mapped(byID)
	for _, t := range e.tasks {
		if err := e.mappings(t, byID, sums); err != nil {
			return nil, err
		}
	}
	for _, c := range files {
		fds := uint32(len(e.users[c.id]) + len(e.receivers[c.id]))
		switch {
		case fds == 0:
			e.dropped[c.file] = true
			continue
		case !e.ofClient(c, mapped):
			if c.reg().GetExt() {
				return nil, fmt.Errorf("%s on the cache %s, which was unlinked and is not in the images, and does not map it; %s", e.who(c), c.path, errNext)
			}
			delete(byID, c.id) // its ghost stays too
			continue
		}
		sums[c].Fds += fds
		if err := e.makeNull(c); err != nil {
			return nil, err
		}
	}
	e.unmapRemaps(byID)
	return slices.DeleteFunc(out, func(c *proto.Cache) bool { return c.Mappings+c.Fds == 0 }), nil
}

// user is whoever shares a memory and maps a cache. The memory goes by its id,
// for one of several tasks that share it has the image.
type user struct {
	memory uint32
	path   string
}

// mapped finds who maps which cache, at whatever entry of files.img: there are
// several when the daemon made a new file at the path.
func (e *edit) mapped(byID map[uint32]*cacheFile) map[user]bool {
	out := map[user]bool{}
	for _, t := range e.tasks {
		for _, v := range t.mm.GetVmas() {
			if c := byID[uint32(v.GetShmid())]; mapsFile(v) && v.GetShmid() <= 1<<32-1 && c != nil {
				out[user{t.ids.GetVmId(), c.path}] = true
			}
		}
	}
	return out
}

// ofClient reports whether one of those that hold the fds of a cache maps it:
// an fd that a child got by fork is its parent's description. So is one that
// nscd has sent and the client not yet received: it waits in a connection that
// leaves the tree.
func (e *edit) ofClient(c *cacheFile, mapped map[user]bool) bool {
	if slices.ContainsFunc(e.receivers[c.id], func(sock uint32) bool { return e.leaves[sock] }) {
		return true
	}
	return slices.ContainsFunc(e.users[c.id], func(h Holder) bool {
		return slices.ContainsFunc(e.tasks, func(t *task) bool {
			return t.pid == h.PID && mapped[user{t.ids.GetVmId(), c.path}]
		})
	})
}

// who names the first that has a cache open.
func (e *edit) who(c *cacheFile) string {
	if u := e.users[c.id]; len(u) > 0 {
		return fmt.Sprintf("process %d has fd %d", u[0].PID, u[0].FD)
	}
	return "an fd in a socket's queue is"
}

// mappings edits the mappings of one task.
func (e *edit) mappings(t *task, byID map[uint32]*cacheFile, sums map[*cacheFile]*proto.Cache) error {
	if c := byID[t.mm.GetExeFileId()]; t.mm != nil && c != nil {
		return fmt.Errorf("process %d runs the cache %s as its program; %s", t.pid, c.path, errNext)
	}
	if t.fs != nil && (byID[t.fs.GetCwdId()] != nil || byID[t.fs.GetRootId()] != nil) {
		return fmt.Errorf("process %d has a cache as its directory: the images are damaged", t.pid)
	}
	var pages []span
	for _, v := range t.mm.GetVmas() {
		if !mapsFile(v) || v.GetShmid() > 1<<32-1 || byID[uint32(v.GetShmid())] == nil {
			continue
		}
		c := byID[uint32(v.GetShmid())]
		where := fmt.Sprintf("process %d: the mapping %#x-%#x of the cache %s", t.pid, v.GetStart(), v.GetEnd(), c.path)
		if err := explained(v); err != nil {
			return fmt.Errorf("%s %w; %s", where, err, errNext)
		}
		if !e.memory[t] {
			var err error
			if pages, err = e.pages(t); err != nil {
				return err
			}
		}
		for _, p := range pages {
			if p.start < v.GetEnd() && v.GetStart() < p.end {
				return fmt.Errorf("%s has pages in the images (%#x-%#x), which a mapping of a shared file cannot have; %s", where, p.start, p.end, errNext)
			}
		}
		anonymous(v)
		e.memory[t] = true
		sums[c].Mappings++
	}
	return nil
}

// explained says why a mapping is not that of a client of the cache.
func explained(v *vma.VmaEntry) error {
	if v.GetProt() != unix.PROT_READ {
		return fmt.Errorf("has the protection %#x where %#x (read) is expected", v.GetProt(), unix.PROT_READ)
	}
	if v.GetStatus() != vmaRegular|vmaFileShared {
		return fmt.Errorf("has the status %#x where %#x (a shared file) is expected", v.GetStatus(), vmaRegular|vmaFileShared)
	}
	if v.GetFlags()&^(unix.MAP_LOCKED|unix.MAP_NORESERVE) != unix.MAP_SHARED {
		return fmt.Errorf("has the flags %#x where %#x (shared) is expected", v.GetFlags(), unix.MAP_SHARED)
	}
	if v.GetFdflags()&unix.O_ACCMODE != unix.O_RDONLY {
		return errors.New("was made through an fd that can write")
	}
	return nil
}

// anonymous makes a mapping what CRIU itself writes for private anonymous
// memory (criu/proc_parse.c, handle_vma). Without pages it reads as zeros.
func anonymous(v *vma.VmaEntry) {
	keep := v.GetFlags() & (unix.MAP_LOCKED | unix.MAP_NORESERVE)
	v.Status = pb.Uint32(vmaRegular | vmaAnonPrivate)
	v.Flags = pb.Uint32(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | keep)
	v.Shmid = pb.Uint64(0)
	v.Pgoff = pb.Uint64(0)
	v.Fd = pb.Int64(-1)
	v.Fdflags = nil
}

// span is a range of addresses, the end not included.
type span struct{ start, end uint64 }

// pages are the ranges of a task for which the images have pages, be they
// here or in the images of an earlier dump.
func (e *edit) pages(t *task) ([]span, error) {
	name := fmt.Sprintf("pagemap-%d.img", t.pid)
	recs, found, err := e.f.records(name, magicPagemap)
	if err != nil {
		return nil, err
	}
	if !found || len(recs) == 0 {
		return nil, fmt.Errorf("read %s: there is none, or it is empty; if the memory was sent elsewhere (--page-server, --stream), "+
			"it cannot be checked that none of it belongs to the mappings of caches: dump without such an option, into this directory", e.f.path(name))
	}
	size := uint64(os.Getpagesize())
	var out []span
	for i, raw := range recs[1:] { // the first one is a head
		m := &pagemap.PagemapEntry{}
		if err := pb.Unmarshal(raw, m); err != nil {
			return nil, fmt.Errorf("read %s: record %d: %w", e.f.path(name), i+2, err)
		}
		n := max(uint64(m.GetNrPages()), longNrPages(m))
		if n > (1<<64-1-m.GetVaddr())/size {
			return nil, fmt.Errorf("read %s: record %d: %d pages at %#x are not possible", e.f.path(name), i+2, n, m.GetVaddr())
		}
		out = append(out, span{m.GetVaddr(), m.GetVaddr() + n*size})
	}
	return out, nil
}

// longNrPages is the 64-bit field nr_pages, number 5, of newer CRIU, which
// go-criu does not know yet.
func longNrPages(m *pagemap.PagemapEntry) uint64 {
	var n uint64
	for b := []byte(m.ProtoReflect().GetUnknown()); len(b) > 0; {
		num, typ, l := protowire.ConsumeTag(b)
		if l < 0 {
			return n
		}
		b = b[l:]
		if num == 5 && typ == protowire.VarintType {
			n, _ = protowire.ConsumeVarint(b)
		}
		if l = protowire.ConsumeFieldValue(num, typ, b); l < 0 {
			return n
		}
		b = b[l:]
	}
	return n
}

// makeNull turns the entry of an open cache into one of /dev/null. The id
// stays, and with it all that is shared between fds; nobody else's /dev/null
// gets shared with them.
func (e *edit) makeNull(c *cacheFile) error {
	who := e.who(c)
	g := c.reg()
	if m := g.Mode; m != nil && *m&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s on the cache %s, which is not a regular file (mode %#o); %s", who, c.path, *m, errNext)
	}
	if fl := g.GetFlags(); fl&unix.O_ACCMODE != unix.O_RDONLY || fl&oPath != 0 {
		return fmt.Errorf("%s on the cache %s, opened with the flags %#o; %s", who, c.path, fl, errNext)
	}
	mnt, err := e.mountOfNull(c, who)
	if err != nil {
		return err
	}
	entry := pb.Clone(c.entry).(*fdinfo.FileEntry)
	// Size, mode and build-id were the cache's: without them CRIU checks
	// nothing. Access mode aside, flags mean nothing on /dev/null.
	entry.Reg = &regfile.RegFileEntry{
		Id:    g.Id,
		Flags: pb.Uint32(unix.O_RDONLY),
		Pos:   pb.Uint64(0),
		Fown:  entry.GetReg().GetFown(),
		Name:  pb.String(devNull),
		MntId: mnt,
	}
	e.changed[c.file] = entry
	return nil
}

// mountOfNull returns the mount id for a new /dev/null entry. For CRIU it
// only says in which mount namespace to open the path (criu/mount.c,
// mntns_get_root_by_mnt_id); none stands for the one CRIU runs in. In a
// namespace that the restore makes, only files under /dev that the tree has
// open, or that CRIU is told to mount, show that there is a /dev.
func (e *edit) mountOfNull(c *cacheFile, who string) (*int32, error) {
	var inDev *int32
	own := false // the tree has a mount namespace of its own
	for _, r := range e.files {
		g := r.reg()
		if g == nil {
			continue
		}
		own = own || g.MntId != nil && g.GetMntId() >= 0
		name := "/" + strings.TrimLeft(g.GetName(), "/")
		if name == devNull && !g.GetExt() {
			return firstOf(ownMount(c), g.MntId), nil
		}
		if inDev == nil && strings.HasPrefix(name, "/dev/") && !strings.HasPrefix(name, "/dev/shm/") {
			inDev = g.MntId
		}
	}
	if !own {
		return nil, nil
	}
	if m := firstOf(ownMount(c), inDev); inDev != nil && m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("%s on the cache %s, and no /dev/null or other device is open in the tree to show that a restore will find one; open /dev/null in the process (as stdin, say), or close the fd before the dump", who, c.path)
}

// ownMount is the mount of the cache itself; CRIU notes none for externals.
func ownMount(c *cacheFile) *int32 {
	if m := c.reg().MntId; m != nil && *m >= 0 {
		return m
	}
	return nil
}

func firstOf(a, b *int32) *int32 {
	if a != nil {
		return a
	}
	return b
}

// unmapRemaps takes away the remaps of caches: their ghosts, and the entries
// of links that CRIU made to unlinked ones (--link-remap). Such a link itself,
// a file beside the cache, is CRIU's and stays.
func (e *edit) unmapRemaps(byID map[uint32]*cacheFile) {
	linked := map[uint32]bool{}
	for _, r := range e.remap {
		if byID[r.entry.GetOrigId()] == nil {
			continue
		}
		e.unmap[r] = true
		if r.linked() {
			linked[r.entry.GetRemapId()] = true
		}
	}
	for _, r := range e.remap {
		if r.linked() && !e.unmap[r] {
			delete(linked, r.entry.GetRemapId())
		}
	}
	for _, r := range e.files {
		if g := r.reg(); g != nil && linked[g.GetId()] && byID[g.GetId()] == nil && len(e.users[g.GetId()]) == 0 {
			e.dropped[r] = true
		}
	}
}
