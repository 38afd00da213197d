// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	core_x86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/magic"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/criuhook/inspect"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// sock is a unix stream socket in the images.
func sock(id, ino, state, peer, uflags uint32, name string) *fdinfo.FileEntry {
	z, zz := pb.Uint32(0), pb.Uint64(0)
	u := &sk_unix.UnixSkEntry{Id: &id, Ino: &ino, Type: pb.Uint32(1), State: &state, Flags: pb.Uint32(2), Uflags: &uflags, Backlog: z, Peer: &peer,
		Fown: &fown.FownEntry{Uid: z, Euid: z, Signum: z, PidType: z, Pid: z}, Name: []byte(name), NsId: pb.Uint32(5),
		Opts: &sk_opts.SkOptsEntry{SoSndbuf: z, SoRcvbuf: z, SoSndTmoSec: zz, SoSndTmoUsec: zz, SoRcvTmoSec: zz, SoRcvTmoUsec: zz}}
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: &id, Usk: u}
}

func dead(f *fdinfo.FileEntry) *fdinfo.FileEntry {
	f.Usk.Shutdown = sk_opts.SkShutdown_BOTH.Enum()
	return f
}

// images makes a dump of process 7, which has file N open as fd N+100.
func images(t *testing.T, netns uint32, files ...*fdinfo.FileEntry) string {
	t.Helper()
	dir, magics := t.TempDir(), magic.LoadMagic().ByName
	put := func(name, kind string, msgs ...pb.Message) {
		t.Helper()
		var b []byte
		if kind != "INVENTORY" {
			b = binary.LittleEndian.AppendUint32(b, 0x54564319)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(magics[kind]))
		for _, m := range msgs {
			raw, err := pb.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			b = append(binary.LittleEndian.AppendUint32(b, uint32(len(raw))), raw...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ids := func(netns uint32) *criu_core.TaskKobjIdsEntry {
		one := pb.Uint32(1)
		return &criu_core.TaskKobjIdsEntry{VmId: one, FilesId: pb.Uint32(2), FsId: one, SighandId: one, NetNsId: &netns}
	}
	put("inventory.img", "INVENTORY", &inventory.InventoryEntry{ImgVersion: pb.Uint32(2), FdinfoPerId: pb.Bool(true), RootIds: ids(5)})
	seven := pb.Uint32(7)
	put("pstree.img", "PSTREE", &pstree.PstreeEntry{Pid: seven, Ppid: pb.Uint32(0), Pgid: seven, Sid: seven, Threads: []uint32{7}})
	put("ids-7.img", "IDS", ids(netns))
	put("core-7.img", "CORE", core())
	var entries, fds []pb.Message
	for _, f := range files {
		entries = append(entries, f)
		if f.Usk.GetUflags() == 0 {
			fds = append(fds, &fdinfo.FdinfoEntry{Id: f.Id, Flags: pb.Uint32(0), Type: f.Type, Fd: pb.Uint32(f.GetId() + 100)})
		}
	}
	put("files.img", "FILES", entries...)
	put("fdinfo-2.img", "FDINFO", fds...)
	return dir
}

// core is a thread of uid 1000 that runs in user mode.
func core() *criu_core.CoreEntry {
	c := &criu_core.CoreEntry{
		Mtype:      criu_core.CoreEntry_X86_64.Enum(),
		ThreadInfo: &core_x86.ThreadInfoX86{Gpregs: &core_x86.UserX86RegsEntry{OrigAx: pb.Uint64(1<<64 - 1)}, Fpregs: &core_x86.UserX86FpregsEntry{}},
		Tc:         &criu_core.TaskCoreEntry{Comm: pb.String("app\x1b")},
		ThreadCore: &criu_core.ThreadCoreEntry{Creds: &creds.CredsEntry{Euid: pb.Uint32(1000), Egid: pb.Uint32(1001), CapEff: []uint32{0, 0}}},
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

func reconnect(ino uint32, to string, uid int64, fails bool) *proto.Connection {
	return &proto.Connection{
		Inode: ino, Type: 1, Peer: &proto.Peer{Name: []byte(to), Uid: uid}, Action: proto.Action_ACTION_RECONNECT, Rule: "mine",
		Holders:   []*proto.Holder{{Pid: 7, Fd: int32(ino) + 90, Comm: "app\x1b"}},
		Identity:  &proto.Identity{Uid: 1000},
		Reconnect: &proto.Reconnect{To: []byte(to), Prelude: "none", TimeoutNs: 2e9, ListenerUid: uid, AbsentFails: fails},
	}
}

func hangup(ino uint32) *proto.Connection {
	c := reconnect(ino, "/run/d", 0, false)
	c.Action, c.Reconnect, c.Busy = proto.Action_ACTION_HANGUP, nil, "3 bytes not yet read by us"
	return c
}

func inspectJSON(t *testing.T, dir string, more ...string) inspectOutput {
	t.Helper()
	code, text, stderr := invoke(t, append(more, "inspect", "--images-dir", dir, "-o", "json")...)
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	checkText(t, text)
	var out inspectOutput
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	code, table, stderr := invoke(t, append(more, "inspect", "--images-dir", dir)...)
	if code != exitDone {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	checkText(t, table)
	return out
}

// inside makes the name to connect to the application's alone: the daemon's own
// is another.
func inside(c *proto.Connection, own string) *proto.Connection {
	c.Peer = &proto.Peer{Name: []byte(own), Path: c.Reconnect.To}
	c.Reconnect.OrTo = []byte(own)
	return c
}

func TestInspect(t *testing.T) {
	path := listen(t).Addr().String()
	stale := filepath.Join(t.TempDir(), "stale")
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	me := int64(os.Geteuid())
	const dormant, established = 7, 1
	dormantSock := []*fdinfo.FileEntry{sock(10, 10, dormant, 0, 0, "")}
	deadSock := []*fdinfo.FileEntry{dead(sock(10, 10, established, 0, 0, ""))}
	for _, tt := range []struct {
		name   string
		netns  uint32
		files  []*fdinfo.FileEntry
		conn   *proto.Connection
		form   string
		result string
		why    string
	}{
		{"listener", 5, dormantSock, reconnect(10, path, me, false), "dormant", "reconnect", "listens at"},
		{"any listener", 5, dormantSock, reconnect(10, path, -1, true), "dormant", "reconnect", "listens at"},
		{"another's", 5, dormantSock, reconnect(10, path, me+1, false), "dormant", "hangup", "expected is uid"},
		{"another's, fails", 5, dormantSock, reconnect(10, path, me+1, true), "dormant", "fail", "expected is uid"},
		{"no such name", 5, dormantSock, reconnect(10, "/nowhere/s", 0, false), "dormant", "hangup", "/nowhere/s does not exist here"},
		{"no such name, fails", 5, dormantSock, reconnect(10, "/nowhere/s", 0, true), "dormant", "fail", "gives it 2s to come"},
		{"no listener", 5, dormantSock, reconnect(10, stale, 0, true), "dormant", "fail", "nobody in this network namespace listens"},
		{"no abstract name", 5, dormantSock, reconnect(10, "\x00criuhook-nobody", 0, false), "dormant", "hangup", "@criuhook-nobody does not exist"},
		{"abstract name elsewhere", 9, dormantSock, reconnect(10, "\x00criuhook-nobody", 0, false), "dormant", "unknown", "network namespace that the restore makes"},
		{"path, namespace elsewhere", 9, dormantSock, reconnect(10, path, me, false), "dormant", "reconnect", "listens at"},
		{"under another name", 5, dormantSock, inside(reconnect(10, "/inside/s", me, false), path), "dormant", "reconnect", "(for the application /inside/s)"},
		{"hung up", 5, deadSock, hangup(10), "dead", "hangup", "closed by the peer"},
		{"missing", 5, nil, hangup(10), "missing", "broken", "of another dump"},
		{"dead that should be dormant", 5, deadSock, reconnect(10, path, me, false), "dead", "broken", "they were changed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := images(t, tt.netns, tt.files...)
			rec := &proto.Record{WrittenBy: "criuhook test", DumpId: "d", UnixTime: 1, Connections: []*proto.Connection{tt.conn},
				Caches: []*proto.Cache{{Path: "/var/lib/sss/mc/passwd", Mappings: 2, Fds: 1}}}
			if err := image.Commit(t.Context(), dir, rec); err != nil {
				t.Fatal(err)
			}
			out := inspectJSON(t, dir)
			if len(out.Connections) != 1 || len(out.Sockets) != 0 || len(out.Caches) != 1 || !out.Caches[0].Edited || out.Record == nil ||
				out.Record.Time != "1970-01-01T00:00:01Z" || out.RootPID != 7 || out.OwnNetns != (tt.netns != 5) {
				t.Fatalf("got %+v", out)
			}
			c := out.Connections[0]
			if c.Form != tt.form || c.Restore.Result != tt.result || !strings.Contains(c.Restore.Why, tt.why) {
				t.Errorf("form %s, %+v", c.Form, c.Restore)
			}
			if c.Holders[0] != (inspectHolder{PID: 7, FD: 100, Command: `app\x1b`}) {
				t.Errorf("holder %+v", c.Holders[0])
			}
			if (c.Reconnect != nil) != (c.Action == "reconnect") || c.Reconnect != nil && (c.Reconnect.UID != 1000 || c.Reconnect.Timeout != "2s") {
				t.Errorf("reconnect %+v", c.Reconnect)
			}
		})
	}
}

func TestInspectStockImages(t *testing.T) {
	dir := images(t, 5,
		sock(1, 11, 1, 12, 0, ""), sock(2, 12, 1, 0, 1, "/run/d\x1b"), // half, and CRIU's entry for its peer
		sock(3, 13, 1, 14, 0, ""), sock(4, 14, 1, 13, 0, ""), // a pair
		sock(5, 15, 10, 0, 0, "/run/mine"), sock(6, 16, 7, 0, 0, ""), dead(sock(7, 17, 1, 0, 0, "")))
	out := inspectJSON(t, dir)
	var forms []string
	for _, s := range out.Sockets {
		forms = append(forms, s.Form)
	}
	if got := strings.Join(forms, " "); got != "half inside inside listening dormant dead" || out.Record != nil || len(out.Connections) != 0 {
		t.Errorf("%s, %+v", got, out)
	}
	if s := out.Sockets[0]; s.PeerName != `/run/d\x1b` || s.Peer != 12 || s.Holders[0].FD != 101 {
		t.Errorf("%+v", s)
	}
	_, table, _ := invoke(t, "inspect", "-D", dir)
	checkText(t, table)
	if out.Rebuilt || !strings.Contains(out.Refused, "no rule") {
		t.Errorf("rebuilt: %v, refused: %q", out.Rebuilt, out.Refused)
	}
	for _, want := range []string{"not made with criuhook", "1 socket is half a connection", `/run/d\x1b`, "a restore here with criuhook would fail:\n  "} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in\n%s", want, table)
		}
	}
}

// TestInspectRebuilt: half connections of CRIU's, and what a restore would do.
func TestInspectRebuilt(t *testing.T) {
	path := listen(t).Addr().String()
	dir := images(t, 5,
		sock(1, 11, 1, 12, 0, ""), sock(2, 12, 1, 0, 1, path),
		sock(3, 21, 1, 22, 0, ""), sock(4, 22, 1, 0, 1, "/run/dead"),
		sock(5, 15, 10, 0, 0, "/run/mine"))
	rules := func(uid int) string {
		return write(t, fmt.Sprintf("rules:\n  - {name: mine, path: %s, uid: %d, idle: reconnect}\n  - {name: dead, path: /run/dead, idle: hangup}\n", filepath.Dir(path)+"/*", uid))
	}
	config := rules(os.Geteuid())
	out := inspectJSON(t, dir, "--config", config)
	if !out.Rebuilt || out.Refused != "" || out.Record != nil || len(out.Connections) != 2 || len(out.Sockets) != 1 || len(out.Warnings) != 1 ||
		!strings.Contains(out.Warnings[0], "had read") {
		t.Fatalf("got %+v", out)
	}
	a, b := out.Connections[0], out.Connections[1]
	if a.Form != "half" || a.Action != "reconnect" || a.Rule != "mine" || a.Reconnect == nil || a.Reconnect.UID != 1000 ||
		a.Restore.Result != "reconnect" || !a.Restore.Listens || a.Peer.UID != nil || a.Holders[0] != (inspectHolder{PID: 7, FD: 101, Command: `app\x1b`}) {
		t.Errorf("got %+v", a)
	}
	if b.Form != "half" || b.Action != "hangup" || b.Restore.Result != "hangup" || b.Reconnect != nil {
		t.Errorf("got %+v", b)
	}
	_, table, _ := invoke(t, "--config", config, "inspect", "--images-dir", dir)
	checkText(t, table)
	if !strings.Contains(table, "  "+sockpeer.Name(path).String()+"  ") || strings.Contains(table, "…") {
		t.Errorf("not whole:\n%s", table)
	}
	for _, want := range []string{"not made with criuhook", "half connections, of which CRIU", "by the rules of this host", "listens at", "warning: CRIU's images", "listening"} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in\n%s", want, table)
		}
	}

	if got := inspectJSON(t, dir, "--config", rules(os.Geteuid()+1)).Connections[0].Restore; got.Result != "hangup" || !strings.Contains(got.Why, "expected is uid") {
		t.Errorf("another's listener: %+v", got)
	}
	// Rules that cannot be read stand in the way of a restore, not of a look.
	out = inspectJSON(t, dir, "--config", "/nowhere/rules.yaml")
	if out.Rebuilt || !strings.Contains(out.Refused, "/nowhere/rules.yaml") || len(out.Connections) != 0 || len(out.Sockets) != 3 {
		t.Errorf("got %+v", out)
	}
}

func TestInspectTableFits(t *testing.T) {
	evil := "\x1b]0;\xff\n\u202e"
	long := "/" + strings.Repeat("\x1b[31mé/", 30)
	c := reconnect(1<<32-1, long, 1<<32-2, true)
	c.Type, c.Rule, c.Busy, c.Reason = 5, strings.Repeat("r", 64), "waits in "+evil, evil
	c.Holders = nil
	var holders []image.Holder
	for pid := range 4 {
		for fd := range 20 {
			c.Holders = append(c.Holders, &proto.Holder{Pid: 4194304 - int32(pid), Fd: 1048576 + int32(fd), Comm: evil})
			holders = append(holders, image.Holder{PID: 4194304 - pid, FD: 1048576 + fd})
		}
	}
	half := inspect.Socket{Form: inspect.Half, PeerName: sockpeer.Name(long),
		Socket: image.Socket{Inode: 1<<32 - 1, Type: sockpeer.Seqpacket, Name: sockpeer.Name(long), Holders: holders}}
	inside := half
	inside.Form, inside.Peer = inspect.Inside, 1<<32-1
	for name, rec := range map[string]*proto.Record{
		"criuhook's": {WrittenBy: evil, DumpId: "d", UnixTime: 1, Connections: []*proto.Connection{c},
			Caches: []*proto.Cache{{Path: long, Unlinked: true, Mappings: 1<<32 - 1, Fds: 1<<32 - 1}}},
		"CRIU's": nil,
	} {
		t.Run(name, func(t *testing.T) {
			r := &inspect.Report{RootPID: 4194304, Processes: 4194304, OwnNetns: true, Record: rec, Sockets: []inspect.Socket{half, inside},
				Caches: []image.Cache{{Path: long, Mappings: 1<<32 - 1, Holders: holders}}}
			if rec != nil {
				r.Connections = []inspect.Connection{{Connection: c, Form: inspect.Dormant,
					Restore: inspect.Outcome{Result: inspect.Unknown, Why: "because of many words " + strings.Repeat("and more ", 30)}}}
			}
			if rec == nil {
				r.Refused = "refused:\n  to do:  " + strings.Repeat("a word ", 30) + evil + "\n"
			}
			var b strings.Builder
			if err := printInspect(&b, usualWidth, r); err != nil {
				t.Fatal(err)
			}
			for _, line := range strings.Split(b.String(), "\n") {
				if !strings.HasPrefix(line, "made with ") && !strings.Contains(line, "a word") { // not in a table
					checkWidth(t, line)
				}
			}
			checkText(t, b.String())
			if !strings.Contains(b.String(), "half") || rec != nil && !strings.Contains(b.String(), "+3 ") {
				t.Errorf("holders or sockets are missing:\n%s", b.String())
			}
		})
	}
}

func TestInspectUnusable(t *testing.T) {
	rec := &proto.Record{Connections: []*proto.Connection{hangup(10)}}
	for _, tt := range []struct {
		name string
		do   func(dir string) error
		want string
	}{
		{"unfinished", func(dir string) error { return image.WritePlan(t.Context(), dir, rec) }, "was never finished"},
		{"damaged", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, image.RecordName), []byte("CRIUHOOK"), 0o600)
		}, "damaged"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := images(t, 5)
			if err := tt.do(dir); err != nil {
				t.Fatal(err)
			}
			code, stdout, stderr := invoke(t, "inspect", "--images-dir", dir)
			if code != exitFailed || stdout != "" || !strings.Contains(stderr, tt.want) || !strings.Contains(stderr, dir) {
				t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
			}
		})
	}
}
