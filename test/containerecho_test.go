// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/proto"
	"criuhook/test/echo"
)

// echoDaemon is a daemon outside, at a name that the rule reconnect matches, and
// the bind mount by which a container sees it.
func echoDaemon(t testing.TB, name, inside string) (srv *echo.Server, path string, binds map[string]string) {
	t.Helper()
	srv, path = daemon(t, "unix", name)
	return srv, path, map[string]string{path: inside}
}

// TestStockEngineFails: what started it all. Of no way: criuhook takes no part.
func TestStockEngineFails(t *testing.T) {
	need(t)
	for _, engine := range []string{"runc", "crun"} {
		t.Run(engine, func(t *testing.T) {
			t.Run("stock", func(t *testing.T) {
				srv, path, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
				c := startContainer(t, engine, Spec{Binds: binds})
				c.connect(t, "c", "/run/echo.sock")
				c.Request(t, "c")
				for _, x := range []struct {
					args []string
					want string
				}{
					{nil, "External socket is used. Consider using --ext-unix-sk option."},
					{[]string{"--ext-unix-sk"}, "Can't dump half of stream unix connection. name: (null); peer name: " + path},
				} {
					_, r := c.tryCheckpoint(t, x.args...)
					if r.Code == 0 || !strings.Contains(r.Log, x.want) {
						t.Errorf("%s checkpoint %v: %d, expected a failure with %q\n%s\n%s", engine, x.args, r.Code, x.want, r.Output, r.tail())
					}
					c.Request(t, "c")
				}
				wantClients(t, srv, 0, 1)
			})
		})
	}
}

// TestContainer: three times in a row, with a network namespace of its own.
func TestContainer(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, path, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.pair(t)
		c.Request(t, "c")
		before := c.Details(t, "c")
		for n := range 3 {
			images := c.Checkpoint(t)
			await(t, srv, "the old connection's end", func(cs []echo.Client) bool { return echo.Open(cs) == 0 })
			rec := record(t, images)
			if len(rec.Connections) != 1 {
				t.Fatalf("recorded: %v", rec.Connections)
			}
			r := rec.Connections[0]
			if string(r.Peer.Name) != path || string(r.Peer.Path) != "/run/echo.sock" || r.Action != proto.Action_ACTION_RECONNECT || r.Rule != "t-reconnect" {
				t.Errorf("recorded: %v", r)
			}
			c.Restore(t, images)
			c.Request(t, "c")
			c.usePair(t)
			c.wantDetails(t, "in a container", "c", before)
			wantClients(t, srv, 1+n, 1)
			c.wantSeen(t, srv)
		}
	})
}

// wantSeen checks whom the daemon sees at the other end of its newest connection.
func (c *Container) wantSeen(t testing.TB, srv *echo.Server) {
	t.Helper()
	all := srv.Clients()
	if last := all[len(all)-1]; last.UID != c.User.UID || last.GID != c.User.GID {
		t.Errorf("the daemon sees %+v, expected uid %d, gid %d", last, c.User.UID, c.User.GID)
	}
}

func netnsOf(t testing.TB, pid int) string {
	t.Helper()
	s, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// netnsByPath makes a network namespace that lives without a process.
func netnsByPath(t testing.TB) (path string) {
	t.Helper()
	name := "criuhook" + strings.ReplaceAll(t.Name(), "/", "-")
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("ip netns add: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "delete", name).CombinedOutput(); err != nil {
			t.Errorf("ip netns delete: %v: %s", err, out)
		}
	})
	return "/run/netns/" + name
}

// TestContainerNetns: with a network namespace that is there already.
func TestContainerNetns(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds, Netns: netnsByPath(t)})
		ns := netnsOf(t, c.PID)
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		before := c.Details(t, "c")
		for n := range 3 {
			c.Restore(t, c.Checkpoint(t))
			c.Request(t, "c")
			c.wantDetails(t, "in a network namespace by path", "c", before)
			wantClients(t, srv, 1+n, 1)
			if now := netnsOf(t, c.PID); now != ns {
				t.Errorf("the network namespace was %s and is %s", ns, now)
			}
		}
	})
}

// TestContainerUser: the daemon sees the user of the application. As CRIU is
// started as if it were set-user-id (see command.as), it cannot use iptables,
// which it would do in a network namespace that is to be dumped.
func TestContainerUser(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds, User: alice, Netns: netnsByPath(t)})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		c.wantSeen(t, srv)
		for range 3 {
			c.Restore(t, c.Checkpoint(t))
			c.Request(t, "c")
			c.wantSeen(t, srv)
		}
	})
}

// TestContainerUserns: in a user namespace the daemon sees the mapped user.
func TestContainerUserns(t *testing.T) {
	need(t)
	provable(t)
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		spec := Spec{Binds: binds, Maps: 100000}
		if engine == "crun" {
			// It mounts each device for itself, and does not tell CRIU, which
			// then says "doesn't have a proper root mount".
			dev := folder(t)
			null := filepath.Join(dev, "null")
			if err := errors.Join(unix.Mknod(null, unix.S_IFCHR, int(unix.Mkdev(1, 3))), os.Chmod(null, 0o666)); err != nil {
				t.Fatal(err)
			}
			binds[dev] = "/dev"
		}
		c := startContainer(t, engine, spec)
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		c.Restore(t, c.Checkpoint(t))
		c.Request(t, "c")
		for _, cl := range srv.Clients() {
			if cl.UID != 100000 {
				t.Errorf("the daemon sees %+v", cl)
			}
		}
	})
}

// provable uncovers all of /proc until the test ends: the kernel lets a user
// namespace mount a /proc of its own only if nothing of it is hidden here
// (mount_too_revealing, fs/namespace.c), and the sandbox hides one limit.
func provable(t testing.TB) {
	t.Helper()
	const file = "/proc/sys/fs/nr_open"
	aside := filepath.Join(t.TempDir(), "nr_open")
	if err := os.WriteFile(aside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(file, aside, "", unix.MS_MOVE, ""); err != nil {
		if err == unix.EINVAL {
			return // not hidden
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Mount(aside, file, "", unix.MS_MOVE, ""); err != nil {
			t.Error(err)
		}
	})
}

// TestContainerPreDump: memory is dumped first, while the application runs, and
// the rest in a second checkpoint: CRIU is asked twice, for different things.
func TestContainerPreDump(t *testing.T) {
	need(t)
	if out, err := exec.Command("criu", "check", "--feature", "mem_dirty_track").CombinedOutput(); err != nil {
		t.Skipf("this kernel does not tell which memory was written to: %s", out)
	}
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		first, r := c.tryCheckpoint(t, "--pre-dump")
		r.want(t, engine+" checkpoint --pre-dump", 0)
		c.Request(t, "c")
		wantClients(t, srv, 0, 1)
		images := c.Checkpoint(t, "--parent-path", "../"+filepath.Base(first))
		c.Restore(t, images)
		c.Request(t, "c")
		wantClients(t, srv, 1, 1)
	})
}

// TestContainerRunsOn: a checkpoint that leaves the container running leaves its
// connection alone, too.
func TestContainerRunsOn(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		before := c.Details(t, "c")
		images, r := c.tryCheckpoint(t, "--leave-running")
		r.want(t, engine+" checkpoint --leave-running", 0)
		wantRecorded(t, images, 1)
		c.Request(t, "c")
		if after := c.Details(t, "c"); after != before {
			t.Errorf("the connection was %+v and is %+v", before, after)
		}
		wantClients(t, srv, 0, 1)
	})
}

// TestContainerMixed: checkpointed by one way and restored by the other, by both at
// once, and at last without us.
func TestContainerMixed(t *testing.T) {
	need(t)
	srv, _, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
	c := startContainer(t, "runc", Spec{Binds: binds})
	use := func(w way, script bool) {
		t.Helper()
		c.by = byStock
		if script {
			c.by = byScript
		}
		c.configureCRIU(t)
		c.by = w
	}
	c.connect(t, "c", "/run/echo.sock")
	c.Request(t, "c")
	for n, step := range []struct {
		dump          way
		dumpScript    bool
		restore       way
		restoreScript bool
	}{
		{byScript, true, byDropin, false},
		{byDropin, false, byScript, true},
		{byDropin, true, byDropin, true},
	} {
		use(step.dump, step.dumpScript)
		images := c.Checkpoint(t)
		use(step.restore, step.restoreScript)
		c.Restore(t, images)
		c.Request(t, "c")
		await(t, srv, "one connection", func(cs []echo.Client) bool { return len(cs) == 2+n && echo.Open(cs) == 1 })
	}
	images := c.Checkpoint(t)
	use(byStock, false)
	c.Restore(t, images)
	c.Awake(t)
	c.wantDead(t, "c")
	nothingLeft(t)
}
