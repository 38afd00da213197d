// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"criuhook/proto"
	"criuhook/sockpeer"
	"criuhook/test/app"
)

// The ways into sssd, as a container is given them.
const (
	sssdPipes  = "/var/lib/sss/pipes"
	sssdCaches = "/var/lib/sss/mc"
)

// lookupContainer starts lookup as alice in a container that asks the sssd
// outside and nobody else.
func lookupContainer(t testing.TB, engine string) (*Container, *Lookup) {
	t.Helper()
	bin, err := lookupBinary()
	if err != nil {
		t.Fatal(err)
	}
	sources := filepath.Join(folder(t), "nsswitch.conf")
	if err := os.WriteFile(sources, []byte("passwd: sss\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := startContainer(t, engine, Spec{
		User: alice, Netns: netnsByPath(t), // see TestContainerUser
		Binds: map[string]string{bin: "/lookup", sources: "/etc/nsswitch.conf", sssdPipes: sssdPipes, sssdCaches: sssdCaches},
		Args:  []string{"/lookup", "-o", "/ctl/stats", "-p", "-u", "alice", "-u", "bob", "-n", "nobody-there"},
	})
	l := &Lookup{Process: c.Process, stats: c.path("ctl/stats"), perRound: 3}
	eventually(t, "a round of lookups", func() bool { n, _, all := l.count(t); return n > 0 && all })
	return c, l
}

// TestContainerSSSD: glibc's name service in a container, on the pipes and caches
// of the sssd outside, three times in a row.
func TestContainerSSSD(t *testing.T) {
	need(t)
	startDaemons(t)
	containerWays(t, func(t *testing.T, engine string) {
		c, l := lookupContainer(t, engine)
		l.rounds(t, 1)
		for range 3 {
			seen := len(clients(t))
			images := c.Checkpoint(t)
			rec := record(t, images)
			for _, r := range rec.Connections {
				if string(r.Peer.Name) != nssPipe || len(r.Peer.Path) != 0 || r.Rule != "sssd" || r.Action != proto.Action_ACTION_RECONNECT || r.Identity.Uid != alice.UID {
					t.Errorf("recorded: %v", r)
				}
			}
			if len(rec.Connections) == 0 || !slices.ContainsFunc(rec.Caches, func(c *proto.Cache) bool { return c.Path == sssdCache }) {
				t.Errorf("recorded: %v; expected a connection and the cache of users", rec)
			}
			c.Restore(t, images)
			var made []client
			eventually(t, "sssd's log to tell of the connection, greeted", func() bool {
				made = clients(t)[seen:]
				return len(made) > 0 && greeted(t, made[0])
			})
			if made[0].uid != "1000" {
				t.Errorf("sssd saw %+v", made)
			}
			l.rounds(t, 3)
			l.wantFailed(t, "after the restore", 0)
			if !l.live(t, sssdCache) {
				t.Errorf("the cache is not mapped any more: %v", l.mappings(t))
			}
		}
	})
}

// TestContainerSSSDName: a single pipe, under a name that does not tell what
// service it is. The prelude goes by the daemon's own.
func TestContainerSSSDName(t *testing.T) {
	need(t)
	startDaemons(t)
	pathWays(t, func(t *testing.T) {
		c := startContainer(t, "runc", Spec{Binds: map[string]string{nssPipe: "/run/names.sock"}})
		c.connect(t, "c", "/run/names.sock")
		ask := func() {
			t.Helper()
			var b []byte
			for _, v := range []uint32{20, 1, 0, 0, 1} { // GET_VERSION, see sockpeer/prelude
				b = binary.NativeEndian.AppendUint32(b, v)
			}
			c.Do(t, app.Command{Op: "write", Conn: "c", Text: string(b)})
			if ans := c.Do(t, app.Command{Op: "read", Conn: "c"}); ans.Text != string(b) {
				t.Errorf("asked %q, sssd answered %q", b, ans.Text)
			}
		}
		ask()
		seen := len(clients(t))
		images := c.Checkpoint(t)
		wantPaths(t, images, nssPipe, "/run/names.sock", "sssd")
		c.Restore(t, images)
		eventually(t, "sssd to be greeted", func() bool {
			made := clients(t)[seen:]
			return len(made) == 1 && greeted(t, made[0])
		})
		ask()
	})
}

// TestContainerParent: the engine stays the parent of init and passes its exit
// code on.
func TestContainerParent(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		images := c.Checkpoint(t)
		work := filepath.Join(folder(t), "work")
		if err := os.Mkdir(work, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = os.Remove(c.path("pid"))
		cmd, log := c.command(t.Context(), t, c.restoreArgs(images, work)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		c.foreground = ended
		eventually(t, "the engine to tell init's pid", func() bool {
			b, _ := os.ReadFile(c.path("pid"))
			return len(b) > 0
		})
		c.PID = c.pid(t)
		c.Awake(t)
		c.Request(t, "c")
		c.wantSeen(t, srv)
		if parent := parentOf(t, c.PID); parent != cmd.Process.Pid {
			said, _ := os.ReadFile(log)
			t.Errorf("init, process %d, is a child of %d; %s is process %d: %s", c.PID, parent, engine, cmd.Process.Pid, said)
		}
		_, _ = c.Try(app.Command{Op: "exit", Value: 7}) // no answer
		<-ended
		if code := cmd.ProcessState.ExitCode(); code != 7 {
			t.Errorf("init ended with code 7, %s with %d", engine, code)
		}
	})
}

// parentOf is the parent of a container's init.
func parentOf(t testing.TB, pid int) (parent int) {
	t.Helper()
	p, err := sockpeer.ReadProcess(pid)
	if err != nil || len(p.NSPID) != 2 || p.NSPID[1] != 1 {
		t.Errorf("process %d is not the init of a container: %+v, %v", pid, p, err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil {
		_, err = fmt.Sscanf(string(b[bytes.LastIndexByte(b, ')')+1:]), " %s %d", new(string), &parent)
	}
	if err != nil {
		t.Fatal(err)
	}
	return parent
}
