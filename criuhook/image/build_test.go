// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_packet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-packet"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/checkpoint-restore/go-criu/v7/magic"
	pb "google.golang.org/protobuf/proto"
)

var magics = magic.LoadMagic().ByName

// images is a dump of one process, pid 7, with memory and one fd table.
type images struct {
	files  []*fdinfo.FileEntry
	fds    []*fdinfo.FdinfoEntry
	vmas   []*vma.VmaEntry
	remaps []*remap_file_path.RemapFilePathEntry
	pages  []*pagemap.PagemapEntry
	queues []*sk_packet.SkPacketEntry
	// child makes process 8, a child of 7 with memory of its own, which maps
	// nothing, and an fd table of its own.
	child []*fdinfo.FdinfoEntry
	// pagesElsewhere leaves out the pagemap, as CRIU does with --page-server.
	pagesElsewhere bool
}

func stream(kind string, msgs ...pb.Message) []byte {
	var b []byte
	if kind != "INVENTORY" {
		b = binary.LittleEndian.AppendUint32(b, 0x54564319)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(magics[kind]))
	for _, m := range msgs {
		raw, err := pb.Marshal(m)
		if err != nil {
			panic(err)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(raw)))
		b = append(b, raw...)
		if q, ok := m.(*sk_packet.SkPacketEntry); ok {
			b = append(b, make([]byte, q.GetLength())...)
		}
	}
	return b
}

func list[M pb.Message](in []M) []pb.Message {
	out := make([]pb.Message, len(in))
	for i, m := range in {
		out[i] = m
	}
	return out
}

func (im *images) write(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	put := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	ids := &criu_core.TaskKobjIdsEntry{VmId: pb.Uint32(1), FilesId: pb.Uint32(2), FsId: pb.Uint32(1), SighandId: pb.Uint32(1), NetNsId: pb.Uint32(9)}
	root := pb.Clone(ids).(*criu_core.TaskKobjIdsEntry)
	root.NetNsId = pb.Uint32(5)
	put("inventory.img", stream("INVENTORY", &inventory.InventoryEntry{ImgVersion: pb.Uint32(2), FdinfoPerId: pb.Bool(true), RootIds: root}))
	tree := []pb.Message{&pstree.PstreeEntry{Pid: pb.Uint32(7), Ppid: pb.Uint32(0), Pgid: pb.Uint32(7), Sid: pb.Uint32(7), Threads: []uint32{7}}}
	if im.child != nil {
		tree = append(tree, &pstree.PstreeEntry{Pid: pb.Uint32(8), Ppid: pb.Uint32(7), Pgid: pb.Uint32(7), Sid: pb.Uint32(7), Threads: []uint32{8}})
		own := pb.Clone(ids).(*criu_core.TaskKobjIdsEntry)
		own.VmId, own.FilesId = pb.Uint32(2), pb.Uint32(3)
		put("ids-8.img", stream("IDS", own))
		put("fdinfo-3.img", stream("FDINFO", list(im.child)...))
	}
	put("pstree.img", stream("PSTREE", tree...))
	put("ids-7.img", stream("IDS", ids))
	put("fdinfo-2.img", stream("FDINFO", list(im.fds)...))
	put("files.img", stream("FILES", list(im.files)...))
	z := pb.Uint64(0)
	put("mm-7.img", stream("MM", &mm.MmEntry{MmStartCode: z, MmEndCode: z, MmStartData: z, MmEndData: z, MmStartStack: z, MmStartBrk: z, MmBrk: z,
		MmArgStart: z, MmArgEnd: z, MmEnvStart: z, MmEnvEnd: z, ExeFileId: pb.Uint32(1), Vmas: im.vmas}))
	if !im.pagesElsewhere {
		put("pagemap-7.img", stream("PAGEMAP", append([]pb.Message{&pagemap.PagemapHead{PagesId: pb.Uint32(1)}}, list(im.pages)...)...))
	}
	if len(im.remaps) > 0 {
		put("remap-fpath.img", stream("REMAP_FPATH", list(im.remaps)...))
		put("ghost-file-1.img", []byte("ghost"))
	}
	if len(im.queues) > 0 {
		put("sk-queues.img", stream("SK_QUEUES", list(im.queues)...))
	}
	return dir
}

func owner() *fown.FownEntry {
	z := pb.Uint32(0)
	return &fown.FownEntry{Uid: z, Euid: z, Signum: z, PidType: z, Pid: z}
}

func (im *images) sock(id, ino, typ, state, peer, uflags uint32, name string) *sk_unix.UnixSkEntry {
	z := pb.Uint64(0)
	u := &sk_unix.UnixSkEntry{Id: &id, Ino: &ino, Type: &typ, State: &state, Flags: pb.Uint32(2), Uflags: &uflags, Backlog: pb.Uint32(0), Peer: &peer,
		Fown: owner(), Name: []byte(name), NsId: pb.Uint32(9),
		Opts: &sk_opts.SkOptsEntry{SoSndbuf: pb.Uint32(1), SoRcvbuf: pb.Uint32(1), SoSndTmoSec: z, SoSndTmoUsec: z, SoRcvTmoSec: z, SoRcvTmoUsec: z}}
	im.files = append(im.files, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: &id, Usk: u})
	return u
}

func (im *images) reg(id uint32, name string) *regfile.RegFileEntry {
	g := &regfile.RegFileEntry{Id: &id, Flags: pb.Uint32(0), Pos: pb.Uint64(3), Fown: owner(), Name: &name, Size: pb.Uint64(99), Mode: pb.Uint32(0o100600)}
	im.files = append(im.files, &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: &id, Reg: g})
	return g
}

func (im *images) fd(fd, id uint32, typ fdinfo.FdTypes) {
	im.fds = append(im.fds, &fdinfo.FdinfoEntry{Id: &id, Flags: pb.Uint32(1), Type: &typ, Fd: &fd})
}

// mapping is one as a client of a cache has it: r--s.
func (im *images) mapping(start, end uint64, id uint32) *vma.VmaEntry {
	v := &vma.VmaEntry{Start: &start, End: &end, Pgoff: pb.Uint64(4096), Shmid: pb.Uint64(uint64(id)), Prot: pb.Uint32(1), Flags: pb.Uint32(1),
		Status: pb.Uint32(1 | 1<<7), Fd: pb.Int64(-1), Madv: pb.Uint64(4), Fdflags: pb.Uint32(0)}
	im.vmas = append(im.vmas, v)
	return v
}

// client has fd on the cache of entry id, and maps it.
func (im *images) client(fd, id uint32) *regfile.RegFileEntry {
	im.mapping(0x1000, 0x2000, id)
	im.fd(fd, id, fdinfo.FdTypes_REG)
	return im.reg(id, sssPasswd)
}

func (im *images) remap(orig, target uint32, typ remap_file_path.RemapType) {
	im.remaps = append(im.remaps, &remap_file_path.RemapFilePathEntry{OrigId: &orig, RemapId: &target, RemapType: &typ})
}
