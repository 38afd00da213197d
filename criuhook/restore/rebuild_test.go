// SPDX-License-Identifier: Apache-2.0

package restore_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	core_x86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_packet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-packet"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/magic"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/criuhook/restore"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// dump is what plain CRIU writes of processes 7 and 8, a child, which share no
// fd table. Process 7 holds socket 100 on fd 5; its peer is bound to /run/d.
type dump struct {
	sock      *sk_unix.UnixSkEntry
	peer      *sk_unix.UnixSkEntry
	more      []*sk_unix.UnixSkEntry
	fds       map[int][]*fdinfo.FdinfoEntry // by process
	cores     map[int]*criu_core.CoreEntry  // by process
	queued    uint32
	ownUserns bool
}

func newDump() *dump {
	d := &dump{sock: usk(1, 100, 1, 1, 200, ""), peer: usk(2, 200, 2, 10, 0, "/run/d\x00"),
		fds: map[int][]*fdinfo.FdinfoEntry{}, cores: map[int]*criu_core.CoreEntry{7: core(), 8: core()}}
	d.peer.Uflags = pb.Uint32(1)
	d.hold(7, 5, 1)
	return d
}

func usk(id, ino, typ, state, peer uint32, name string) *sk_unix.UnixSkEntry {
	u := &sk_unix.UnixSkEntry{Id: &id, Ino: &ino, Type: &typ, State: &state, Peer: &peer, Name: []byte(name), Flags: pb.Uint32(2), Opts: &sk_opts.SkOptsEntry{}}
	zeros(u)
	return u
}

func (d *dump) hold(pid int, fd, id uint32) {
	d.fds[pid] = append(d.fds[pid], &fdinfo.FdinfoEntry{Id: &id, Flags: pb.Uint32(0), Type: fdinfo.FdTypes_UNIXSK.Enum(), Fd: &fd})
}

// call puts process 7 into a system call of amd64.
func (d *dump) call(nr int, fd uint64) {
	g := d.cores[7].ThreadInfo.Gpregs
	g.OrigAx, g.Di = pb.Uint64(uint64(nr)), &fd
}

func core() *criu_core.CoreEntry {
	c := &criu_core.CoreEntry{
		Mtype:      criu_core.CoreEntry_X86_64.Enum(),
		ThreadInfo: &core_x86.ThreadInfoX86{Gpregs: &core_x86.UserX86RegsEntry{OrigAx: pb.Uint64(1<<64 - 1)}, Fpregs: &core_x86.UserX86FpregsEntry{}},
		Tc:         &criu_core.TaskCoreEntry{Comm: pb.String("app")},
		ThreadCore: &criu_core.ThreadCoreEntry{Creds: &creds.CredsEntry{
			Euid: pb.Uint32(1000), Egid: pb.Uint32(1001), Groups: []uint32{33}, CapEff: []uint32{1 << 10, 0},
		}},
	}
	zeros(c)
	return c
}

// zeros sets the numbers that CRIU always writes.
func zeros(m pb.Message) {
	r := m.ProtoReflect()
	for i := range r.Descriptor().Fields().Len() {
		f := r.Descriptor().Fields().Get(i)
		switch {
		case f.Message() != nil && !f.IsList() && (f.Cardinality().String() == "required" || r.Has(f)):
			zeros(r.Mutable(f).Message().Interface())
		case f.Message() == nil && f.Cardinality().String() == "required" && !r.Has(f):
			r.Set(f, f.Default())
		}
	}
}

func (d *dump) open(t *testing.T) *image.Set {
	t.Helper()
	dir := t.TempDir()
	put := func(name, kind string, msgs ...pb.Message) {
		t.Helper()
		var b []byte
		if kind != "INVENTORY" {
			b = binary.LittleEndian.AppendUint32(b, 0x54564319)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(magic.LoadMagic().ByName[kind]))
		for _, m := range msgs {
			raw, err := pb.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			b = append(binary.LittleEndian.AppendUint32(b, uint32(len(raw))), raw...)
		}
		if kind == "SK_QUEUES" {
			b = append(b, make([]byte, d.queued)...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ids := &criu_core.TaskKobjIdsEntry{UserNsId: pb.Uint32(1)}
	zeros(ids)
	put("inventory.img", "INVENTORY", &inventory.InventoryEntry{ImgVersion: pb.Uint32(2), FdinfoPerId: pb.Bool(true), RootIds: ids})
	var tree []pb.Message
	for pid := 7; pid <= 8; pid++ {
		own := pb.Clone(ids).(*criu_core.TaskKobjIdsEntry)
		own.FilesId = pb.Uint32(uint32(pid))
		if d.ownUserns {
			own.UserNsId = pb.Uint32(2)
		}
		put(fmt.Sprintf("ids-%d.img", pid), "IDS", own)
		put(fmt.Sprintf("core-%d.img", pid), "CORE", d.cores[pid])
		var fds []pb.Message
		for _, e := range d.fds[pid] {
			fds = append(fds, e)
		}
		put(fmt.Sprintf("fdinfo-%d.img", pid), "FDINFO", fds...)
		ppid := uint32(0)
		if pid == 8 {
			ppid = 7
		}
		tree = append(tree, &pstree.PstreeEntry{Pid: pb.Uint32(uint32(pid)), Ppid: &ppid, Pgid: pb.Uint32(7), Sid: pb.Uint32(7), Threads: []uint32{uint32(pid)}})
	}
	put("pstree.img", "PSTREE", tree...)
	var files []pb.Message
	for _, u := range append([]*sk_unix.UnixSkEntry{d.sock, d.peer}, d.more...) {
		files = append(files, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: u.Id, Usk: u})
	}
	put("files.img", "FILES", files...)
	if d.queued > 0 {
		put("sk-queues.img", "SK_QUEUES", &sk_packet.SkPacketEntry{IdFor: d.sock.Id, Length: &d.queued})
	}
	set, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// rules has one that reconnects to /run/d, changed by the caller.
func rules(change ...func(*rule.Rule)) *rule.Set {
	r := rule.Rule{Name: "d", Path: "/run/d", Idle: rule.Reconnect, Busy: rule.Hangup, Prelude: "none", Timeout: time.Second, Source: "/etc/r.yaml:3"}
	for _, c := range change {
		c(&r)
	}
	return &rule.Set{Rules: []rule.Rule{r}}
}

func TestRebuildReconnects(t *testing.T) {
	rec, warnings, err := restore.Rebuild(newDump().open(t), rules())
	if err != nil || len(rec.GetConnections()) != 1 {
		t.Fatalf("%v, %v", rec, err)
	}
	c := rec.Connections[0]
	want := &proto.Connection{
		Inode: 100, Type: 1, Rule: "d", Action: proto.Action_ACTION_RECONNECT,
		Peer:      &proto.Peer{Inode: 200, Name: []byte("/run/d"), Uid: -1},
		Holders:   []*proto.Holder{{Pid: 7, Fd: 5, Comm: "app"}},
		Identity:  &proto.Identity{Uid: 1000, Gid: 1001, Groups: []uint32{33}, CapEff: 1 << 10},
		Reconnect: &proto.Reconnect{To: []byte("/run/d"), Prelude: "none", TimeoutNs: int64(time.Second), ListenerUid: 0},
		Reason:    c.Reason,
	}
	if !pb.Equal(c, want) {
		t.Errorf("%v\nwant %v", c, want)
	}
	if !strings.Contains(c.Reason, "uid:") {
		t.Errorf("the reason %q does not say what allows another listener", c.Reason)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "do not tell whether the daemons had read") {
		t.Errorf("%q", warnings)
	}
}

func TestRebuildUID(t *testing.T) {
	rec, _, err := restore.Rebuild(newDump().open(t), rules(func(r *rule.Rule) { r.UID = new(uint32(77)) }))
	if err != nil || rec.Connections[0].Reconnect.GetListenerUid() != 77 || rec.Connections[0].Reason != "" || rec.Connections[0].Peer.Uid != -1 {
		t.Errorf("%v, %v", rec, err)
	}
}

// What is not certain to be idle and the application's is hung up.
func TestRebuildHangsUp(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*dump)
		busy   string
		reason string
	}{
		"queued bytes":         {func(d *dump) { d.queued = 3 }, "3 bytes not yet read by us", ""},
		"waits on it":          {func(d *dump) { d.call(45, 5) }, "thread 7 was in recvfrom on fd 5", ""},
		"polls something":      {func(d *dump) { d.call(7, 0) }, "thread 7 was in poll, perhaps on fd 5: CRIU's images do not tell", ""},
		"unknown architecture": {func(d *dump) { d.cores[7].ThreadInfo = nil }, "thread 7 may have waited on it: CRIU's images do not tell in which system call it was", ""},
		"half closed":          {func(d *dump) { d.sock.Shutdown = sk_opts.SkShutdown_READ.Enum() }, "", "it is half closed, which a new connection would not be"},
		"mixed holders": {func(d *dump) { d.hold(8, 6, 1); d.cores[8].ThreadCore.Creds.Euid = pb.Uint32(0) }, "",
			"not reconnected: processes 7 and 8 share it and have different rights, so that nobody can tell as whom to connect"},
		"the other holder waits": {func(d *dump) {
			d.hold(8, 6, 1)
			d.cores[8].ThreadInfo.Gpregs.OrigAx, d.cores[8].ThreadInfo.Gpregs.Di = pb.Uint64(0), pb.Uint64(6)
		}, "thread 8 was in read on fd 6", ""},
		"user namespace": {func(d *dump) { d.ownUserns = true }, "",
			"not reconnected: process 7 is in a user namespace of its own, so that CRIU's images do not tell its rights as they are outside of it"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDump()
			c.change(d)
			rec, warnings, err := restore.Rebuild(d.open(t), rules())
			if err != nil {
				t.Fatal(err)
			}
			got := rec.Connections[0]
			if got.Action != proto.Action_ACTION_HANGUP || got.Reconnect != nil || got.Busy != c.busy || got.Reason != c.reason {
				t.Errorf("%v", got)
			}
			if len(warnings) > 0 {
				t.Errorf("%q", warnings)
			}
		})
	}
}

func TestRebuildWaitsElsewhere(t *testing.T) {
	for name, change := range map[string]func(*dump){
		"reads another fd": func(d *dump) { d.call(0, 4) },
		"sleeps":           func(d *dump) { d.call(230, 5) },
		"the same number in a process that does not hold it": func(d *dump) {
			d.cores[8].ThreadInfo.Gpregs.OrigAx, d.cores[8].ThreadInfo.Gpregs.Di = pb.Uint64(0), pb.Uint64(5)
		},
	} {
		d := newDump()
		change(d)
		rec, _, err := restore.Rebuild(d.open(t), rules())
		if err != nil || rec.Connections[0].Action != proto.Action_ACTION_RECONNECT {
			t.Errorf("%s: %v, %v", name, rec, err)
		}
	}
}

func TestRebuildRefuses(t *testing.T) {
	busy := func(d *dump) { d.call(45, 5) }
	for name, c := range map[string]struct {
		change func(*dump)
		rules  *rule.Set
		want   []string
	}{
		"no rule": {func(d *dump) {
			d.more = append(d.more, usk(3, 101, 5, 1, 201, ""), usk(4, 201, 2, 10, 0, "\x00abs"))
			d.more[1].Uflags = pb.Uint32(1)
			d.hold(8, 9, 3)
		}, &rule.Set{}, []string{"process 7 (app) fd 5: outbound unix stream connection, inode 100", "/run/d (uid not known)", `path: /run/d`,
			"process 8 (app) fd 9: outbound unix seqpacket connection, inode 101", `path: "@abs"`, "idle: reconnect"}},
		"inbound": {func(d *dump) { d.sock.Name, d.peer.Name = []byte("/run/mine\x00"), []byte{} }, rules(),
			[]string{"inbound unix stream connection", "a socket without a name", `path: /run/mine`, "direction: inbound"}},
		"both named, we listen": {func(d *dump) {
			d.sock.Name, d.more = []byte("/run/mine\x00"), append(d.more, usk(3, 101, 1, 10, 0, "/run/mine\x00"))
		}, rules(), []string{"inbound unix stream connection"}},
		"rule refuses": {func(*dump) {}, rules(func(r *rule.Rule) {
			r.Idle, r.Busy, r.Prelude, r.Timeout = rule.Refuse, rule.Refuse, "", 0
			r.Why = "so it is"
		}),
			[]string{"why:    so it is", "change rule d, /etc/r.yaml:3"}},
		"busy: wait":   {busy, rules(func(r *rule.Rule) { r.Busy = rule.Wait }), []string{"process 7 (app) fd 5", "/run/d", "rule d, /etc/r.yaml:3", "thread 7 was in recvfrom on fd 5", "busy: hangup"}},
		"busy: refuse": {busy, rules(func(r *rule.Rule) { r.Busy = rule.Refuse }), []string{"thread 7 was in recvfrom on fd 5", "busy: hangup"}},
		"peer without a name": {func(d *dump) { d.peer.Name = []byte{} }, rules(func(r *rule.Rule) { r.Path = "" }),
			[]string{"its peer has no name to connect to"}},
		"in a queue only": {func(d *dump) { d.fds = map[int][]*fdinfo.FdinfoEntry{} }, rules(), []string{"socket 100 to /run/d: no process holds it"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDump()
			c.change(d)
			rec, _, err := restore.Rebuild(d.open(t), c.rules)
			var refused *restore.RefusedError
			if rec != nil || !errors.As(err, &refused) {
				t.Fatalf("%v, %v", rec, err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("no %q in:\n%v", w, err)
				}
			}
			if note := strings.Contains(err.Error(), "note:"); note != (name == "no rule") {
				t.Errorf("note %v in:\n%v", note, err)
			}
		})
	}
}

func TestRebuildUnknownHangup(t *testing.T) {
	rec, _, err := restore.Rebuild(newDump().open(t), &rule.Set{Unknown: rule.Hangup})
	if err != nil || rec.Connections[0].Action != proto.Action_ACTION_HANGUP || rec.Connections[0].Rule != "" || rec.Connections[0].Reason != "" {
		t.Errorf("%v, %v", rec, err)
	}
}

func TestRebuildExe(t *testing.T) {
	s := rules(func(r *rule.Rule) { r.Name, r.Exe = "by-exe", "*" })
	s.Rules = append(s.Rules, rules(func(r *rule.Rule) { r.Idle, r.Prelude, r.Timeout = rule.Hangup, "", 0 }).Rules...)
	rec, warnings, err := restore.Rebuild(newDump().open(t), s)
	if err != nil || rec.Connections[0].Rule != "d" || rec.Connections[0].Action != proto.Action_ACTION_HANGUP {
		t.Errorf("%v, %v", rec, err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "rule by-exe, /etc/r.yaml:3") || !strings.Contains(warnings[0], "/run/d") {
		t.Errorf("%q", warnings)
	}
}

func TestNeedsRebuild(t *testing.T) {
	d := newDump()
	half := d.open(t)
	d.sock.Peer, d.sock.State = pb.Uint32(0), pb.Uint32(uint32(sockpeer.Closed))
	whole := d.open(t)
	for _, c := range []struct {
		set  *image.Set
		err  error
		want bool
	}{
		{half, fmt.Errorf("x: %w", image.ErrNoRecord), true},
		{half, nil, false},
		{half, image.ErrUnfinished, false},
		{whole, image.ErrNoRecord, false},
	} {
		if got := restore.NeedsRebuild(c.set, c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
	if rec, warnings, err := restore.Rebuild(whole, rules()); err != nil || !reflect.DeepEqual(rec, &proto.Record{}) || warnings != nil {
		t.Errorf("%v, %q, %v", rec, warnings, err)
	}
}
