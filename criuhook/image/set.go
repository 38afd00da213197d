// SPDX-License-Identifier: Apache-2.0

// Package image reads CRIU's image directories, brings what a dump wrote into
// criuhook's one form, and reads and writes the record criuhook.img.
//
// It touches files only. The directory may be given as a magic link such as
// /proc/PID/fd/N.
package image

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	fsimg "github.com/checkpoint-restore/go-criu/v7/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_packet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-packet"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	pb "google.golang.org/protobuf/proto"
)

const (
	filesName = "files.img"
	remapName = "remap-fpath.img"
	queueName = "sk-queues.img"

	// imagesV1_1 is the only version of images since CRIU 1.6 (magic.h).
	imagesV1_1 = 2
	fdCloexec  = 1 // FD_CLOEXEC
)

// Set is what the images of one dump hold, as far as criuhook cares.
type Set struct {
	f     *folder
	inv   inventory.InventoryEntry
	tasks []*task
	files []*file
	remap []*remap
	// users are the fds of each file, by the file's id.
	users map[uint32][]Holder
	// labelled are the files with a security label, by id.
	labelled map[uint32]bool
	// queued are the bytes in receive queues, by the socket's id.
	queued map[uint32]uint64
	// receivers are the ids of the sockets in whose queues a file is, as
	// SCM_RIGHTS, by the file's id.
	receivers map[uint32][]uint32
	dir       fs.FileInfo // the directory, to know it again
	threadsMu sync.Mutex  // guards the tasks' threads
}

// Holder is one fd of one process.
type Holder struct {
	PID     int  `json:"pid"` // in the pid namespace of the tree's root task
	FD      int  `json:"fd"`
	Cloexec bool `json:"cloexec"`
}

type task struct {
	pid, ppid int
	pgid, sid int                         // 0: none that the pid namespace has
	ids       *criu_core.TaskKobjIdsEntry // nil: a zombie
	mm        *mm.MmEntry                 // nil: none, or another task's
	fs        *fsimg.FsEntry
	tids      []int    // of all threads, the first is pid
	threads   []thread // nil: not read yet
}

// file is a record of files.img. What does not change stays raw.
type file struct {
	raw   []byte
	entry *fdinfo.FileEntry
}

func (r *file) unix() *sk_unix.UnixSkEntry {
	if r.entry.GetType() != fdinfo.FdTypes_UNIXSK {
		return nil
	}
	return r.entry.GetUsk()
}

func (r *file) reg() *regfile.RegFileEntry {
	if r.entry.GetType() != fdinfo.FdTypes_REG {
		return nil
	}
	return r.entry.GetReg()
}

type remap struct {
	raw   []byte
	entry *remap_file_path.RemapFilePathEntry
}

// remapGhost is the form of old images: the top bit of the target (image.h).
const remapGhost = 1 << 31

// ghost returns the number of the ghost file, and whether it is one.
func (r *remap) ghost() (uint32, bool) {
	id := r.entry.GetRemapId()
	if r.entry.RemapType == nil {
		return id &^ remapGhost, id&remapGhost != 0
	}
	return id, r.entry.GetRemapType() == remap_file_path.RemapType_GHOST
}

// linked reports whether it leads to another entry of files.img.
func (r *remap) linked() bool {
	if _, ghost := r.ghost(); ghost {
		return false
	}
	return r.entry.RemapType == nil || r.entry.GetRemapType() == remap_file_path.RemapType_LINKED
}

// Open reads the images in dir. It holds nothing open afterwards.
func Open(dir string) (*Set, error) {
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer f.close()
	return load(f)
}

func load(f *folder) (*Set, error) {
	s := &Set{f: f, users: map[uint32][]Holder{}, labelled: map[uint32]bool{}, queued: map[uint32]uint64{}, receivers: map[uint32][]uint32{}}
	var err error
	if s.dir, err = f.root.Stat("."); err != nil {
		return nil, fmt.Errorf("open the images directory %s: %w", f.dir, err)
	}
	for _, step := range []func() error{s.loadInventory, s.loadFiles, s.loadTasks, s.loadRemaps, s.loadQueues} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Set) loadInventory() error {
	found, err := s.f.one("inventory.img", magicInventory, &s.inv)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("read %s: there is none: not a directory of CRIU's images, or the dump failed", s.f.path("inventory.img"))
	}
	if s.inv.GetImgVersion() != imagesV1_1 || !s.inv.GetFdinfoPerId() {
		return fmt.Errorf("read %s: images of version %d are not known to this criuhook; dump with a CRIU that it supports", s.f.path("inventory.img"), s.inv.GetImgVersion())
	}
	return nil
}

func (s *Set) loadFiles() error {
	found, err := each(s.f, filesName, magicFiles,
		func() *fdinfo.FileEntry { return &fdinfo.FileEntry{} },
		func(raw []byte, m *fdinfo.FileEntry) error {
			if m.GetType() == fdinfo.FdTypes_UNIXSK && m.GetUsk() == nil || m.GetType() == fdinfo.FdTypes_REG && m.GetReg() == nil {
				return fmt.Errorf("file %#x says nothing of what it is", m.GetId())
			}
			s.files = append(s.files, &file{raw, m})
			return nil
		})
	if err == nil && !found {
		return fmt.Errorf("read %s: there is none; older CRIU, which kept sockets in unixsk.img, and --stream are not supported; dump to a directory with a current CRIU", s.f.path(filesName))
	}
	return err
}

func (s *Set) loadTasks() error {
	seen, threads := map[int]bool{}, map[int]bool{}
	found, err := each(s.f, "pstree.img", magicPstree,
		func() *pstree.PstreeEntry { return &pstree.PstreeEntry{} },
		func(_ []byte, m *pstree.PstreeEntry) error {
			pid := int(m.GetPid())
			if seen[pid] {
				return fmt.Errorf("process %d is there twice", pid)
			}
			seen[pid] = true
			tids, err := threadIDs(pid, m.GetThreads(), threads)
			if err != nil {
				return err
			}
			s.tasks = append(s.tasks, &task{pid: pid, ppid: int(m.GetPpid()), pgid: int(m.GetPgid()), sid: int(m.GetSid()), tids: tids})
			return nil
		})
	if err != nil {
		return err
	}
	if !found || len(s.tasks) == 0 {
		return fmt.Errorf("read %s: it names no process: the dump is not complete", s.f.path("pstree.img"))
	}
	tables := map[uint32][]*fdinfo.FdinfoEntry{}
	for _, t := range s.tasks {
		if err := s.loadTask(t, tables); err != nil {
			return err
		}
	}
	return nil
}

// loadTask reads what one task has. Tasks that share an fd table share its
// image; so they do with their memory, where only the first has an image.
func (s *Set) loadTask(t *task, tables map[uint32][]*fdinfo.FdinfoEntry) error {
	ids := &criu_core.TaskKobjIdsEntry{}
	found, err := s.f.one(fmt.Sprintf("ids-%d.img", t.pid), magicIDs, ids)
	if err != nil {
		return err
	}
	if found {
		t.ids = ids
		table, ok := tables[ids.GetFilesId()]
		if !ok {
			_, err := each(s.f, fmt.Sprintf("fdinfo-%d.img", ids.GetFilesId()), magicFdinfo,
				func() *fdinfo.FdinfoEntry { return &fdinfo.FdinfoEntry{} },
				func(_ []byte, m *fdinfo.FdinfoEntry) error {
					table = append(table, m)
					return nil
				})
			if err != nil {
				return err
			}
			tables[ids.GetFilesId()] = table
		}
		for _, e := range table {
			if e.GetXattrSecuritySelinux() != "" {
				s.labelled[e.GetId()] = true
			}
			s.users[e.GetId()] = append(s.users[e.GetId()], Holder{t.pid, int(e.GetFd()), e.GetFlags()&fdCloexec != 0})
		}
	}
	mem := &mm.MmEntry{}
	if found, err = s.f.one(mmName(t.pid), magicMM, mem); err != nil {
		return err
	}
	if found {
		t.mm = mem
	}
	where := &fsimg.FsEntry{}
	if found, err = s.f.one(fmt.Sprintf("fs-%d.img", t.pid), magicFS, where); err != nil {
		return err
	}
	if found {
		t.fs = where
	}
	return nil
}

func mmName(pid int) string { return fmt.Sprintf("mm-%d.img", pid) }

func (s *Set) loadRemaps() error {
	_, err := each(s.f, remapName, magicRemap,
		func() *remap_file_path.RemapFilePathEntry { return &remap_file_path.RemapFilePathEntry{} },
		func(raw []byte, m *remap_file_path.RemapFilePathEntry) error {
			s.remap = append(s.remap, &remap{raw, m})
			return nil
		})
	return err
}

// loadQueues reads whose bytes are queued, without reading the bytes: each
// record is followed by as many as it says (criu/sk-queue.c).
func (s *Set) loadQueues() error {
	file, _, err := s.f.open(queueName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if err := s.readQueues(bufio.NewReader(file)); err != nil {
		return fmt.Errorf("read %s: %w", s.f.path(queueName), err)
	}
	return nil
}

func (s *Set) readQueues(r *bufio.Reader) error {
	head := make([]byte, 8)
	if _, err := io.ReadFull(r, head); err != nil {
		return fmt.Errorf("it ends within its head: %w", err)
	}
	if _, err := records(head, magicSkQueues); err != nil {
		return err
	}
	for n := 1; ; n++ {
		var size [4]byte
		_, err := io.ReadFull(r, size[:])
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("record %d is truncated: %w", n, err)
		}
		// An SCM_RIGHTS message has at most 253 files (SCM_MAX_FD).
		length := binary.LittleEndian.Uint32(size[:])
		if length > 64<<10 {
			return fmt.Errorf("record %d claims %d bytes, more than are possible", n, length)
		}
		raw := make([]byte, length)
		if _, err := io.ReadFull(r, raw); err != nil {
			return fmt.Errorf("record %d is truncated: %w", n, err)
		}
		m := &sk_packet.SkPacketEntry{}
		if err := pb.Unmarshal(raw, m); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		if _, err := io.CopyN(io.Discard, r, int64(m.GetLength())); err != nil {
			return fmt.Errorf("the bytes of record %d are truncated: %w", n, err)
		}
		// A datagram may be empty and still is one.
		s.queued[m.GetIdFor()] += max(uint64(m.GetLength()), 1)
		for _, scm := range m.GetScm() {
			for _, id := range scm.GetRights() {
				s.receivers[id] = append(s.receivers[id], m.GetIdFor())
			}
		}
	}
}

// RootPID is the pid of the tree's root task, in its own pid namespace.
func (s *Set) RootPID() int { return s.root().pid }

func (s *Set) root() *task {
	for _, t := range s.tasks {
		if t.ppid == 0 {
			return t
		}
	}
	return s.tasks[0]
}

// IDs are all numbers that must be free for a restore, in order: those of
// processes and threads, and of process groups and sessions, whose leaders CRIU
// makes for the time of the restore if they had ended (pstree.c,
// prepare_pstree_ids).
func (s *Set) IDs() []int {
	var ids []int
	for _, t := range s.tasks {
		ids = append(append(ids, t.tids...), t.pgid, t.sid)
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	return slices.DeleteFunc(ids, func(id int) bool { return id <= 0 })
}

// MaxPID is the highest of [Set.IDs].
func (s *Set) MaxPID() int { return slices.Max(append(s.IDs(), 0)) }

// PIDs are the processes in the images, in CRIU's order.
func (s *Set) PIDs() []int {
	pids := make([]int, len(s.tasks))
	for i, t := range s.tasks {
		pids[i] = t.pid
	}
	return pids
}

// OwnNetns reports whether the tree has a network namespace of its own, one
// that a restore makes or is given.
func (s *Set) OwnNetns() bool {
	r := s.root().ids
	return r != nil && s.inv.RootIds != nil && r.GetNetNsId() != s.inv.RootIds.GetNetNsId()
}
