// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	core_aarch64 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-aarch64"
	core_x86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/sockpeer"
)

// core is the image of a thread of amd64 that runs in user mode as uid 1000.
func core() *criu_core.CoreEntry {
	c := &criu_core.CoreEntry{
		Mtype:      criu_core.CoreEntry_X86_64.Enum(),
		ThreadInfo: &core_x86.ThreadInfoX86{Gpregs: &core_x86.UserX86RegsEntry{}, Fpregs: &core_x86.UserX86FpregsEntry{}},
		Tc:         &criu_core.TaskCoreEntry{Comm: pb.String("app")},
		ThreadCore: &criu_core.ThreadCoreEntry{Creds: &creds.CredsEntry{
			CapEff: []uint32{1 << 10, 1 << 1}, Groups: []uint32{33, 7},
		}},
	}
	zeros(c)
	cr := c.ThreadCore.Creds
	cr.Uid, cr.Euid, cr.Gid, cr.Egid = pb.Uint32(5), pb.Uint32(1000), pb.Uint32(6), pb.Uint32(1001)
	c.ThreadInfo.Gpregs.OrigAx = pb.Uint64(1<<64 - 1)
	return c
}

// zeros sets the numbers that CRIU always writes.
func zeros(m pb.Message) {
	r := m.ProtoReflect()
	fields := r.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.Message() != nil && !f.IsList() && r.Has(f):
			zeros(r.Get(f).Message().Interface())
		case f.Message() == nil && f.Cardinality().String() == "required" && !r.Has(f):
			r.Set(f, f.Default())
		}
	}
}

// threads makes process 7 of the images have these threads, from 7 on.
func threads(t testing.TB, dir string, cores ...*criu_core.CoreEntry) {
	t.Helper()
	e := &pstree.PstreeEntry{Pid: pb.Uint32(7), Ppid: pb.Uint32(0), Pgid: pb.Uint32(7), Sid: pb.Uint32(7)}
	for i, c := range cores {
		e.Threads = append(e.Threads, uint32(7+i))
		put(t, dir, fmt.Sprintf("core-%d.img", 7+i), stream("CORE", c))
	}
	put(t, dir, "pstree.img", stream("PSTREE", e))
}

func put(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, dir string) *image.Set {
	t.Helper()
	s, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCreds(t *testing.T) {
	want := sockpeer.Identity{UID: 1000, GID: 1001, Groups: []uint32{33, 7}, CapEff: 1<<10 | 1<<33}
	for name, c := range map[string]struct {
		change func(second *creds.CredsEntry)
		mixed  bool
	}{
		"alike":             {func(*creds.CredsEntry) {}, false},
		"another real uid":  {func(c *creds.CredsEntry) { c.Uid = pb.Uint32(0) }, false},
		"groups reordered":  {func(c *creds.CredsEntry) { c.Groups = []uint32{7, 33, 7} }, false},
		"another uid":       {func(c *creds.CredsEntry) { c.Euid = pb.Uint32(0) }, true},
		"another gid":       {func(c *creds.CredsEntry) { c.Egid = pb.Uint32(0) }, true},
		"fewer groups":      {func(c *creds.CredsEntry) { c.Groups = []uint32{7} }, true},
		"more capabilities": {func(c *creds.CredsEntry) { c.CapEff = []uint32{1 << 10, 3} }, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := (&images{}).write(t)
			second := core()
			c.change(second.ThreadCore.Creds)
			threads(t, dir, core(), second)
			s := open(t, dir)
			got, err := s.Creds(7)
			if err != nil || !reflect.DeepEqual(got, image.Creds{Identity: want, Mixed: c.mixed}) {
				t.Errorf("%+v, %v", got, err)
			}
			if comm, err := s.Comm(7); comm != "app" || err != nil {
				t.Errorf("comm %q, %v", comm, err)
			}
		})
	}
}

func TestCredsOfUserns(t *testing.T) {
	dir := (&images{}).write(t)
	threads(t, dir, core())
	ids := &criu_core.TaskKobjIdsEntry{VmId: pb.Uint32(1), FilesId: pb.Uint32(2), FsId: pb.Uint32(1), SighandId: pb.Uint32(1), UserNsId: pb.Uint32(3)}
	put(t, dir, "inventory.img", stream("INVENTORY", &inventory.InventoryEntry{ImgVersion: pb.Uint32(2), FdinfoPerId: pb.Bool(true), RootIds: ids}))
	for ns, own := range map[uint32]bool{3: false, 4: true} {
		ids.UserNsId = &ns
		put(t, dir, "ids-7.img", stream("IDS", ids))
		if got, err := open(t, dir).Creds(7); err != nil || got.OwnUserns != own {
			t.Errorf("namespace %d: %+v, %v", ns, got, err)
		}
	}
}

func TestCredsDamaged(t *testing.T) {
	dir := (&images{}).write(t)
	s := open(t, dir)
	fails := func(want string) {
		t.Helper()
		if _, err := s.Creds(7); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v; want %q", err, want)
		}
	}
	fails("core-7.img: there is none")
	if _, err := s.Calls(9); err == nil || !strings.Contains(err.Error(), "no process 9") {
		t.Error(err)
	}
	put(t, dir, "core-7.img", stream("CORE", core(), core()))
	fails("2 records")
	put(t, dir, "core-7.img", []byte("no image at all"))
	fails("magic number")
	c := core()
	c.ThreadCore.Creds.CapEff = []uint32{1, 2, 3}
	put(t, dir, "core-7.img", stream("CORE", c))
	fails("3 words")
	s = open(t, dir)
	c.ThreadCore.Creds = nil
	put(t, dir, "core-7.img", stream("CORE", c))
	fails("does not say")

	s = open(t, dir)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "core-7.img", stream("CORE", core()))
	fails("another directory")
}

func TestThreadsTwice(t *testing.T) {
	dir := (&images{}).write(t)
	for _, listed := range [][]uint32{{7, 8, 8}, {7, 7}, {7, 0}, {7, 1 << 30}} {
		put(t, dir, "pstree.img", stream("PSTREE", &pstree.PstreeEntry{Pid: pb.Uint32(7), Ppid: pb.Uint32(0), Pgid: pb.Uint32(7), Sid: pb.Uint32(7), Threads: listed}))
		if _, err := image.Open(dir); err == nil || !strings.Contains(err.Error(), "the image is damaged") {
			t.Errorf("%v: %v", listed, err)
		}
	}
}

func TestCalls(t *testing.T) {
	at := func(nr int64, ax int64, di uint64) *criu_core.CoreEntry {
		c := core()
		g := c.ThreadInfo.Gpregs
		g.OrigAx, g.Ax, g.Di = pb.Uint64(uint64(nr)), pb.Uint64(uint64(ax)), pb.Uint64(di)
		return c
	}
	compat := at(3, 3, 5) // read of i386
	compat.ThreadInfo.Gpregs.Mode = core_x86.UserX86RegsMode_COMPAT.Enum()
	arm := core()
	arm.Mtype, arm.ThreadInfo = criu_core.CoreEntry_AARCH64.Enum(), nil
	arm.TiAarch64 = &core_aarch64.ThreadInfoAarch64{Gpregs: &core_aarch64.UserAarch64RegsEntry{}, Fpsimd: &core_aarch64.UserAarch64FpsimdContextEntry{}}
	zeros(arm)
	unknown := image.Call{Nr: -1, FD: -1}
	for name, c := range map[string]struct {
		core  *criu_core.CoreEntry
		want  image.Call
		fds   []int // on which it may wait
		other []int // on which it does not
	}{
		"runs":                  {at(-1, 12345, 5), image.Call{Known: true, Nr: -1, FD: -1}, nil, []int{5, 0}},
		"sleeps":                {at(230, -4, 0), image.Call{Known: true, Nr: 230, FD: -1}, nil, []int{0}},
		"reads":                 {at(0, 0, 5), image.Call{Known: true, Nr: 0, Name: "read", FD: 5}, []int{5}, []int{4, 0}},
		"recvmsg with timeout":  {at(47, -4, 5), image.Call{Known: true, Nr: 47, Name: "recvmsg", FD: 5}, []int{5}, []int{6}},
		"write has come back":   {at(1, 17, 5), image.Call{Known: true, Nr: 1, Name: "write", FD: 5}, []int{5}, []int{6}},
		"upper half of the fd":  {at(0, 0, 1<<32|5), image.Call{Known: true, Nr: 0, Name: "read", FD: 5}, []int{5}, []int{6}},
		"polls":                 {at(7, -4, 5), image.Call{Known: true, Nr: 7, Name: "poll", FD: -1}, []int{5, 6}, nil},
		"waits in epoll":        {at(232, -4, 5), image.Call{Known: true, Nr: 232, Name: "epoll_wait", FD: -1}, []int{5, 6}, nil},
		"restarts what it was":  {at(219, -4, 5), image.Call{Known: true, Nr: 219, Name: "restart_syscall", FD: -1}, []int{5, 6}, nil},
		"32-bit program":        {compat, unknown, []int{5, 6}, nil},
		"x32 program":           {at(1<<30|517, -4, 5), unknown, []int{5, 6}, nil},
		"impossible number":     {at(1<<40, -4, 5), unknown, []int{5, 6}, nil},
		"arm64":                 {arm, unknown, []int{5, 6}, nil},
		"no registers (zombie)": {&criu_core.CoreEntry{Mtype: criu_core.CoreEntry_X86_64.Enum()}, unknown, []int{5}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := (&images{}).write(t)
			threads(t, dir, core(), c.core)
			got, err := open(t, dir).Calls(7)
			c.want.TID = 8
			if want := []image.Call{{TID: 7, Known: true, Nr: -1, FD: -1}, c.want}; err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("%+v, %v; want %+v", got, err, want)
			}
			for _, fd := range c.fds {
				if !got[1].MayWait(fd) {
					t.Errorf("does not wait on fd %d", fd)
				}
			}
			for _, fd := range c.other {
				if got[1].MayWait(fd) {
					t.Errorf("waits on fd %d", fd)
				}
			}
		})
	}
}

// CRIU keeps the NUL that the kernel puts after a path (unix(7)).
func TestNamesEndAtNUL(t *testing.T) {
	im := &images{}
	im.sock(1, 100, 1, 1, 200, 0, "")
	im.sock(2, 200, 2, 10, 0, 1, "/run/d\x00")
	im.sock(3, 300, 1, 10, 0, 0, "\x00abstract\x00x")
	s := open(t, im.write(t))
	if x := s.External(); len(x) != 1 || x[0].PeerName != "/run/d" {
		t.Errorf("%+v", x)
	}
	if socks := s.Sockets(); socks[1].Name != "\x00abstract\x00x" {
		t.Errorf("%q", string(socks[1].Name))
	}
}
