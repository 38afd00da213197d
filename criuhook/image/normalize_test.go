// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_packet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-packet"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

const sssPasswd = "/var/lib/sss/mc/passwd"

func connection(ino, peer, typ uint32, a proto.Action) *proto.Connection {
	c := &proto.Connection{Inode: ino, Type: typ, Action: a, Peer: &proto.Peer{Inode: peer, Name: []byte("/run/d"), Uid: -1}, Holders: []*proto.Holder{{Pid: 7, Fd: 4}}}
	if a == proto.Action_ACTION_RECONNECT {
		c.Reconnect = &proto.Reconnect{To: []byte("/run/d"), Prelude: "none", TimeoutNs: 1e9, ListenerUid: -1}
	}
	return c
}

func record(cs ...*proto.Connection) *proto.Record { return &proto.Record{Connections: cs} }

func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

func unchanged(t *testing.T, dir string, before map[string]string) {
	t.Helper()
	after := content(t, dir)
	for n := range after {
		if before[n] != after[n] {
			t.Errorf("%s changed", n)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d files, there were %d", len(after), len(before))
	}
}

func TestNormalizeSockets(t *testing.T) {
	im := &images{}
	im.sock(1, 100, 1, 1, 200, 0, "")      // reconnect
	im.sock(2, 200, 2, 10, 0, 1, "/run/d") // its peer
	im.sock(3, 101, 1, 1, 201, 0, "")      // hangup
	im.sock(4, 201, 2, 10, 0, 1, "/run/e")
	im.sock(5, 102, 2, 1, 202, 0, "") // datagram, hangup
	im.sock(6, 103, 2, 1, 202, 0, "") // not in the record, same peer
	im.sock(7, 202, 2, 10, 0, 1, "/dev/log")
	im.queues = []*sk_packet.SkPacketEntry{{IdFor: pb.Uint32(3), Length: pb.Uint32(9)}}
	for i, id := range []uint32{1, 3, 5, 6} {
		im.fd(uint32(4+i), id, fdinfo.FdTypes_UNIXSK)
	}
	dir := im.write(t)
	rec := record(connection(100, 200, 1, proto.Action_ACTION_RECONNECT), connection(101, 201, 1, proto.Action_ACTION_HANGUP), connection(102, 202, 2, proto.Action_ACTION_HANGUP))
	if err := image.Normalize(t.Context(), dir, rec); err != nil {
		t.Fatal(err)
	}
	s, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	socks := s.Sockets()
	if len(socks) != 4 || !socks[0].Dormant() || !socks[1].Dead() || !socks[2].Dormant() || socks[3].Peer != 202 {
		t.Fatalf("sockets: %+v", socks)
	}
	if socks[1].Queued != 9 || len(socks[0].Holders) != 1 || socks[0].Holders[0] != (image.Holder{PID: 7, FD: 4, Cloexec: true}) || !socks[0].OwnNetns || !s.OwnNetns() || s.RootPID() != 7 {
		t.Fatalf("sockets: %+v", socks)
	}
	if x := s.External(); len(x) != 1 || x[0].Socket.Inode != 103 || x[0].PeerName != "/dev/log" {
		t.Fatalf("external: %+v", x)
	}
	if info, err := os.Stat(filepath.Join(dir, "files.img")); err != nil || info.Mode() != 0o640 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	before := content(t, dir)
	if err := image.Normalize(t.Context(), dir, rec); err != nil {
		t.Fatal(err)
	}
	unchanged(t, dir, before)
}

func TestNormalizeRefuses(t *testing.T) {
	reconnect := record(connection(100, 200, 1, proto.Action_ACTION_RECONNECT))
	tests := []struct {
		name  string
		build func(*images)
		rec   *proto.Record
		want  string
	}{
		{"missing socket", func(im *images) {}, reconnect, "do not hold connection 100"},
		{"other type", func(im *images) { im.sock(1, 100, 5, 1, 200, 0, "") }, reconnect, "type"},
		{"queued bytes", func(im *images) {
			im.sock(1, 100, 1, 7, 0, 0, "")
			im.queues = []*sk_packet.SkPacketEntry{{IdFor: pb.Uint32(1), Length: pb.Uint32(5)}}
		}, reconnect, "5 bytes not yet read"},
		{"peer inside", func(im *images) { im.sock(1, 100, 1, 1, 200, 0, ""); im.sock(2, 200, 1, 1, 100, 0, "") }, reconnect, "inside"},
		{"plugin", func(im *images) { im.sock(1, 100, 1, 1, 200, 4, "") }, reconnect, "plugin"},
		{"accepted", func(im *images) { im.sock(1, 100, 1, 1, 200, 0, "/run/x"); im.sock(2, 300, 1, 10, 0, 0, "/run/x") }, reconnect, "accepted"},
		{"twice", func(im *images) { im.sock(1, 100, 1, 1, 200, 0, ""); im.sock(2, 100, 1, 1, 200, 0, "") }, reconnect, "damaged"},
		{"writable mapping", func(im *images) { im.reg(3, sssPasswd); im.mapping(0x1000, 0x2000, 3).Prot = pb.Uint32(3) }, record(), "protection"},
		{"private mapping", func(im *images) {
			im.reg(3, sssPasswd)
			v := im.mapping(0x1000, 0x2000, 3)
			v.Status, v.Flags = pb.Uint32(1|1<<6), pb.Uint32(2)
		}, record(), "status"},
		{"writable fd of a mapping", func(im *images) { im.reg(3, sssPasswd); im.mapping(0x1000, 0x2000, 3).Fdflags = pb.Uint32(2) }, record(), "can write"},
		{"pages", func(im *images) {
			im.reg(3, sssPasswd)
			im.mapping(0x100000, 0x200000, 3)
			im.pages = []*pagemap.PagemapEntry{{Vaddr: pb.Uint64(0x110000), NrPages: pb.Uint32(1), Flags: pb.Uint32(4)}}
		}, record(), "has pages"},
		{"pages elsewhere", func(im *images) { im.client(4, 3); im.pagesElsewhere = true }, record(), "--page-server"},
		{"writable fd", func(im *images) { im.client(4, 3).Flags = pb.Uint32(2) }, record(), "process 7 has fd 4"},
		{"not a regular file", func(im *images) { im.client(4, 3).Mode = pb.Uint32(0o010600) }, record(), "not a regular file"},
		{"no /dev", func(im *images) { im.client(4, 3).MntId = pb.Int32(12) }, record(), "no /dev/null"},
		{"external, not mapped", func(im *images) { im.reg(3, "file[1:2]").Ext = pb.Bool(true); im.fd(4, 3, fdinfo.FdTypes_REG) }, record(), "does not map it"},
		{"program", func(im *images) { im.reg(1, sssPasswd) }, record(), "its program"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			im := &images{}
			tt.build(im)
			dir := im.write(t)
			before := content(t, dir)
			err := image.Normalize(t.Context(), dir, tt.rec, image.ExternalFile{Key: "file[1:2]", Path: sssPasswd})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want one with %q", err, tt.want)
			}
			unchanged(t, dir, before)
		})
	}
}

func TestNormalizeCaches(t *testing.T) {
	im := &images{}
	im.reg(1, "/usr/bin/app")
	im.reg(3, sssPasswd).MntId = pb.Int32(12)          // an fd
	im.reg(4, sssPasswd)                               // its mapping
	im.reg(5, "var/lib/sss/mc/group (deleted)")        // a ghost
	im.reg(6, "/var/cache/nscd/hosts").Mode = nil      // a link remap
	im.reg(7, "/var/cache/nscd/link_remap.7")          // its target
	im.reg(8, "file[1a:2b]").Ext = pb.Bool(true)       // external
	im.reg(9, "/dev/null").MntId = pb.Int32(13)        // of somebody else
	im.reg(10, "/var/cache/nscd/unrelated").Size = nil // not a cache
	im.sock(11, 100, 1, 7, 0, 0, "")                   // untouched
	im.fd(5, 3, fdinfo.FdTypes_REG)
	im.mapping(0x1000, 0x2000, 4)
	im.mapping(0x2000, 0x3000, 4).Flags = pb.Uint32(0x2001)
	im.mapping(0x4000, 0x5000, 5)
	im.mapping(0x6000, 0x7000, 6)
	im.mapping(0x8000, 0x9000, 8)
	im.mapping(0xa000, 0xb000, 10)
	im.remap(5, 1, remap_file_path.RemapType_GHOST)
	im.remap(6, 7, remap_file_path.RemapType_LINKED)
	im.remap(10, 99, remap_file_path.RemapType_PROCFS)
	dir := im.write(t)

	s, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if c := s.Caches(); len(c) != 3 || c[0].Mappings != 2 || len(c[0].Holders) != 1 || !c[1].Unlinked {
		t.Fatalf("caches: %+v", c)
	}
	rec := record()
	if err := image.Normalize(t.Context(), dir, rec, image.ExternalFile{Key: "file[1a:2b]", Path: "/run/nscd/dbAbCdEf"}); err != nil {
		t.Fatal(err)
	}
	want := []*proto.Cache{{Path: sssPasswd, Mappings: 2, Fds: 1}, {Path: "/var/lib/sss/mc/group", Unlinked: true, Mappings: 1},
		{Path: "/var/cache/nscd/hosts", Unlinked: true, Mappings: 1}, {Path: "/run/nscd/dbAbCdEf", Unlinked: true, Mappings: 1}}
	if !pb.Equal(rec, &proto.Record{Caches: want}) {
		t.Errorf("record: %v", rec)
	}
	mem := &mm.MmEntry{}
	if err := pb.Unmarshal(recordsOf(t, dir, "mm-7.img")[0], mem); err != nil {
		t.Fatal(err)
	}
	for i, v := range mem.GetVmas()[:5] {
		flags := uint32(0x22)
		if i == 1 {
			flags |= 0x2000
		}
		if v.GetStatus() != 1|1<<9 || v.GetFlags() != flags || v.GetShmid() != 0 || v.GetPgoff() != 0 || v.GetFd() != -1 || v.Fdflags != nil || v.GetProt() != 1 || v.GetMadv() != 4 {
			t.Errorf("mapping %d: %v", i, v)
		}
	}
	if !pb.Equal(mem.Vmas[5], im.vmas[5]) {
		t.Errorf("an unrelated mapping changed: %v", mem.Vmas[5])
	}
	var ids []uint32
	for _, raw := range recordsOf(t, dir, "files.img") {
		f := &fdinfo.FileEntry{}
		if err := pb.Unmarshal(raw, f); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, f.GetId())
		if g := f.GetReg(); f.GetId() == 3 && (g.GetName() != "/dev/null" || g.Size != nil || g.Mode != nil || g.GetPos() != 0 || g.GetMntId() != 12) {
			t.Errorf("the fd's file: %v", g)
		}
	}
	if len(ids) != 5 || ids[0] != 1 || ids[1] != 3 || ids[2] != 9 || ids[3] != 10 || ids[4] != 11 {
		t.Errorf("files left: %v", ids)
	}
	if n := len(recordsOf(t, dir, "remap-fpath.img")); n != 1 {
		t.Errorf("%d remaps left", n)
	}
	if _, err := os.Stat(filepath.Join(dir, "ghost-file-1.img")); !os.IsNotExist(err) {
		t.Errorf("the ghost: %v", err)
	}
	before := content(t, dir)
	if err := image.Normalize(t.Context(), dir, rec); err != nil || len(rec.Caches) != 4 {
		t.Fatalf("again: %v, %v", err, rec)
	}
	unchanged(t, dir, before)
}

func TestNormalizeWithoutMountNamespace(t *testing.T) {
	im := &images{}
	im.client(4, 3)
	dir := im.write(t)
	if err := image.Normalize(t.Context(), dir, record()); err != nil {
		t.Fatal(err)
	}
	f := &fdinfo.FileEntry{}
	if err := pb.Unmarshal(recordsOf(t, dir, "files.img")[0], f); err != nil || f.GetReg().GetName() != "/dev/null" || f.GetReg().MntId != nil {
		t.Errorf("%v %v", err, f)
	}
}

func TestDeadSocketKeepsItsForm(t *testing.T) {
	im := &images{}
	im.sock(1, 100, 5, 1, 0, 0, "").Shutdown = sk_opts.SkShutdown_BOTH.Enum()
	dir := im.write(t)
	before := content(t, dir)
	if err := image.Normalize(t.Context(), dir, record(connection(100, 0, 5, proto.Action_ACTION_HANGUP))); err != nil {
		t.Fatal(err)
	}
	unchanged(t, dir, before)
}

func TestCachePath(t *testing.T) {
	for name, want := range map[string]string{
		"var/cache/nscd/netgroup":               "/var/cache/nscd/netgroup",
		"/var/db/nscd/passwd":                   "/var/db/nscd/passwd",
		"/run/nscd/db1aB2cD":                    "/run/nscd/db1aB2cD",
		"/var/run/nscd/db1aB2cD (deleted)":      "/var/run/nscd/db1aB2cD",
		"/var/lib/sss/mc/sid.cr_link (deleted)": "/var/lib/sss/mc/sid",
		"/var/lib/sss/mc/passwd.bak":            "",
		"/run/nscd/socket":                      "",
		"/srv/var/lib/sss/mc/passwd":            "",
		"":                                      "",
	} {
		if got, _, ok := image.CachePath(name); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", name, got, ok)
		}
	}
}

// files are the regular files of images, by id.
func files(t *testing.T, dir string) map[uint32]string {
	t.Helper()
	out := map[uint32]string{}
	for _, raw := range recordsOf(t, dir, "files.img") {
		f := &fdinfo.FileEntry{}
		if err := pb.Unmarshal(raw, f); err != nil {
			t.Fatal(err)
		}
		out[f.GetId()] = f.GetReg().GetName()
	}
	return out
}

// Who reads a cache as a file, and does not map it, gets no /dev/null.
func TestCacheReadAsAFile(t *testing.T) {
	for _, tt := range []struct {
		name  string
		build func(*images)
	}{
		{"open", func(im *images) { im.reg(3, sssPasswd); im.fd(4, 3, fdinfo.FdTypes_REG) }},
		{"open for writing", func(im *images) { im.reg(3, sssPasswd).Flags = pb.Uint32(2); im.fd(4, 3, fdinfo.FdTypes_REG) }},
		{"unlinked", func(im *images) {
			im.reg(3, sssPasswd)
			im.fd(4, 3, fdinfo.FdTypes_REG)
			im.remap(3, 1, remap_file_path.RemapType_GHOST)
		}},
		{"in a queue", func(im *images) {
			im.reg(3, sssPasswd)
			im.sock(1, 100, 1, 1, 200, 0, "")
			im.sock(2, 200, 1, 1, 100, 0, "")
			im.queues = []*sk_packet.SkPacketEntry{{IdFor: pb.Uint32(1), Length: pb.Uint32(1), Scm: []*sk_packet.ScmEntry{{Type: pb.Uint32(1), Rights: []uint32{3}}}}}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := &images{}
			tt.build(im)
			dir := im.write(t)
			before := content(t, dir)
			rec := record()
			if err := image.Normalize(t.Context(), dir, rec); err != nil || len(rec.Caches) != 0 {
				t.Errorf("%v, recorded: %v", err, rec.Caches)
			}
			unchanged(t, dir, before)
		})
	}
}

// nscd has sent its database, and the client was frozen before it took it.
func TestCacheInAConnection(t *testing.T) {
	im := &images{}
	im.reg(3, sssPasswd)
	im.sock(1, 100, 1, 1, 0, 0, "").Shutdown = sk_opts.SkShutdown_BOTH.Enum()
	im.queues = []*sk_packet.SkPacketEntry{{IdFor: pb.Uint32(1), Length: pb.Uint32(1), Scm: []*sk_packet.ScmEntry{{Type: pb.Uint32(1), Rights: []uint32{3}}}}}
	dir := im.write(t)
	rec := record(connection(100, 200, 1, proto.Action_ACTION_HANGUP))
	if err := image.Normalize(t.Context(), dir, rec); err != nil {
		t.Fatal(err)
	}
	if len(rec.Caches) != 1 || rec.Caches[0].Fds != 1 {
		t.Errorf("recorded: %v", rec.Caches)
	}
	set, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if left := set.Caches(); len(left) != 0 {
		t.Errorf("the images still refer to %+v", left)
	}
}

// A client and another process at the same cache: each its own way.
func TestCacheOfClientAndOthers(t *testing.T) {
	fd := func(fd, id uint32) *fdinfo.FdinfoEntry {
		return &fdinfo.FdinfoEntry{Id: &id, Flags: pb.Uint32(1), Type: fdinfo.FdTypes_REG.Enum(), Fd: &fd}
	}
	for _, tt := range []struct {
		name  string
		child []*fdinfo.FdinfoEntry
		map3  bool // the client's mapping has the entry of the child's fd
		want  *proto.Cache
		left  string // at entry 3
	}{
		{"child holds the parent's description", []*fdinfo.FdinfoEntry{fd(9, 5)}, false, &proto.Cache{Path: sssPasswd, Mappings: 1, Fds: 2}, ""},
		{"child reads it", []*fdinfo.FdinfoEntry{fd(9, 3)}, false, &proto.Cache{Path: sssPasswd, Mappings: 1, Fds: 1}, sssPasswd},
		{"child reads it, one entry", []*fdinfo.FdinfoEntry{fd(9, 3)}, true, &proto.Cache{Path: sssPasswd, Mappings: 2, Fds: 1}, sssPasswd},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := &images{child: tt.child}
			im.reg(3, sssPasswd)
			im.remap(3, 1, remap_file_path.RemapType_GHOST)
			im.reg(5, sssPasswd)
			im.remap(5, 1, remap_file_path.RemapType_GHOST)
			im.fd(4, 5, fdinfo.FdTypes_REG)
			im.mapping(0x1000, 0x2000, 5)
			if tt.map3 {
				im.mapping(0x3000, 0x4000, 3)
			}
			dir := im.write(t)
			rec := record()
			if err := image.Normalize(t.Context(), dir, rec); err != nil {
				t.Fatal(err)
			}
			tt.want.Unlinked = true
			if !pb.Equal(rec, &proto.Record{Caches: []*proto.Cache{tt.want}}) {
				t.Errorf("recorded: %v", rec)
			}
			got := files(t, dir)
			if got[5] != "/dev/null" || got[3] != tt.left {
				t.Errorf("files: %v", got)
			}
			_, err := os.Stat(filepath.Join(dir, "ghost-file-1.img"))
			if keep := tt.left != ""; keep != (err == nil) {
				t.Errorf("the ghost: %v", err)
			}
			mem := &mm.MmEntry{}
			if err := pb.Unmarshal(recordsOf(t, dir, "mm-7.img")[0], mem); err != nil {
				t.Fatal(err)
			}
			for _, v := range mem.GetVmas() {
				if v.GetShmid() != 0 {
					t.Errorf("a mapping is left: %v", v)
				}
			}
			before := content(t, dir)
			if err := image.Normalize(t.Context(), dir, rec); err != nil {
				t.Fatal(err)
			}
			unchanged(t, dir, before)
		})
	}
}
