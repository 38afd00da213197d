// SPDX-License-Identifier: Apache-2.0

package test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"criuhook/proto"
	"criuhook/test/echo"
)

// pathWays are those of a scenario in which the engine does not matter.
func pathWays(t *testing.T, scenario func(t *testing.T)) {
	t.Helper()
	eachWay(t, []way{byScript, byDropin}, func(t *testing.T) {
		scenario(t)
		nothingLeft(t)
	})
}

// wantPaths checks the names in the record of a checkpoint.
func wantPaths(t testing.TB, images, own, inside, rule string) {
	t.Helper()
	rec := record(t, images)
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v", rec.Connections)
	}
	c := rec.Connections[0]
	if string(c.Peer.Name) != own || string(c.Peer.Path) != inside || c.Rule != rule || c.Action != proto.Action_ACTION_RECONNECT {
		t.Errorf("recorded: %v; expected the daemon's own name %s, inside %s, and rule %s", c, own, inside, rule)
	}
}

// TestContainerPaths: by which names a daemon is found again.
func TestContainerPaths(t *testing.T) {
	for _, tt := range []struct {
		name string
		// daemon is its name below a directory outside, from what of that is
		// mounted at to inside, and connect what the application connects to.
		daemon, from, to, connect string
		rule                      string
		again                     bool // the daemon is another at the restore
	}{
		{name: "the socket file, by its own name", daemon: "reconnect", from: "reconnect", to: "/run/echo.sock", connect: "/run/echo.sock", rule: "t-reconnect"},
		{name: "the socket file, the daemon restarted", daemon: "reconnect", from: "reconnect", to: "/run/echo.sock", connect: "/run/echo.sock", rule: "t-reconnect", again: true},
		{name: "its directory, the daemon restarted", daemon: "reconnect", from: ".", to: "/run/outside", connect: "/run/outside/reconnect", rule: "t-reconnect", again: true},
		{name: "a rule for the name inside", daemon: "unknown", from: ".", to: "/run/inside", connect: "/run/inside/unknown", rule: "t-inside"},
		{name: "by way of a link", daemon: "link/unknown", from: "real", to: "/run/inside", connect: "/run/inside/unknown", rule: "t-inside", again: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pathWays(t, func(t *testing.T) {
				dir := folder(t)
				if strings.Contains(tt.daemon, "/") {
					if err := os.Mkdir(filepath.Join(dir, "real"), 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.Symlink("real", filepath.Join(dir, "link")); err != nil {
						t.Fatal(err)
					}
				}
				own := filepath.Join(dir, tt.daemon)
				srv := daemonAt(t, "unix", own)
				c := startContainer(t, "runc", Spec{Binds: map[string]string{filepath.Join(dir, tt.from): tt.to}})
				c.connect(t, "c", tt.connect)
				c.Request(t, "c")
				images := c.Checkpoint(t)
				wantPaths(t, images, own, tt.connect, tt.rule)
				if tt.again {
					srv.Close()
					srv = daemonAt(t, "unix", own)
				}
				c.Restore(t, images)
				c.Request(t, "c")
				await(t, srv, "one connection", func(cs []echo.Client) bool { return echo.Open(cs) == 1 })
				c.wantSeen(t, srv)
			})
		})
	}
}

// TestContainerMoved: the same name inside, mounted from somewhere else outside
// at the restore.
func TestContainerMoved(t *testing.T) {
	pathWays(t, func(t *testing.T) {
		srv, path, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		c := startContainer(t, "runc", Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		images := c.Checkpoint(t)
		srv.Close()
		moved, newPath := daemon(t, "unix", "other")
		c.edit(t, path, newPath)
		c.Restore(t, images)
		c.Request(t, "c")
		wantClients(t, moved, 0, 1)
	})
}

// TestContainerOwnName: by the time of the restore, the daemon is to be found
// inside under its own name, and no longer under the other.
func TestContainerOwnName(t *testing.T) {
	pathWays(t, func(t *testing.T) {
		srv, own := daemon(t, "unix", "reconnect")
		there, empty, other := filepath.Dir(own), folder(t), folder(t)
		c := startContainer(t, "runc", Spec{Binds: map[string]string{there: "/run/outside", empty: there}})
		c.connect(t, "c", "/run/outside/reconnect")
		c.Request(t, "c")
		images := c.Checkpoint(t)
		wantPaths(t, images, own, "/run/outside/reconnect", "t-reconnect")
		c.edit(t, there, other)
		c.edit(t, empty, there)
		c.Restore(t, images)
		c.Request(t, "c")
		wantClients(t, srv, 1, 1)
	})
}

// TestContainerImpostor: inside, the daemon's own name leads to another daemon of
// the same user. That one never gets the connection, not even when nobody is left
// at the right one.
func TestContainerImpostor(t *testing.T) {
	pathWays(t, func(t *testing.T) {
		srv, own, binds := echoDaemon(t, "reconnect", "/run/echo.sock")
		impostor, other := daemon(t, "unix", "other")
		binds[other] = own
		c := startContainer(t, "runc", Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		images := c.Checkpoint(t)
		wantPaths(t, images, own, "/run/echo.sock", "t-reconnect")
		c.Restore(t, images)
		c.Request(t, "c")
		wantClients(t, srv, 1, 1)
		images = c.Checkpoint(t)
		srv.Close()
		srv, path := daemon(t, "unix", "gone")
		srv.Close() // nobody listens there
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		c.edit(t, own, path)
		_ = c.tryRestore(t, images)
		c.PID = c.pid(t)
		c.Awake(t)
		c.wantHungUp(t, "c")
		wantClients(t, impostor, 0, 0)
	})
}

// TestContainerRefused: a checkpoint that a rule refuses, or for which there is
// none, leaves the container as it was, and the log says why.
func TestContainerRefused(t *testing.T) {
	containerWays(t, func(t *testing.T, engine string) {
		srv, path, binds := echoDaemon(t, "refuse", "/run/echo.sock")
		c := startContainer(t, engine, Spec{Binds: binds})
		c.connect(t, "c", "/run/echo.sock")
		c.Request(t, "c")
		_, r := c.tryCheckpoint(t)
		if r.Code == 0 {
			t.Fatalf("%s checkpoint went well\n%s", engine, r.tail())
		}
		for _, want := range []string{path, "/run/echo.sock", "t-refuse"} {
			if !strings.Contains(r.Log, want) {
				t.Errorf("CRIU's log does not say %q\n%s", want, r.tail())
			}
		}
		c.Request(t, "c")
		wantClients(t, srv, 0, 1)
	})
}

// echoRole makes the test binary an echo daemon at the path that follows.
const echoRole = "criuhook-test-echo"

func init() {
	if len(os.Args) == 3 && os.Args[1] == echoRole {
		if _, err := echo.Listen("unix", os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		select {}
	}
}

// TestDaemonInContainer: it is the daemon that is in a container, with its socket
// in a volume, and the application outside, or in another container.
func TestDaemonInContainer(t *testing.T) {
	const own = "/data/reconnect"
	start := func(t *testing.T) (volume, path string) {
		t.Helper()
		volume = folder(t)
		path = filepath.Join(volume, "reconnect")
		startContainer(t, "runc", Spec{Binds: map[string]string{volume: "/data"}, Args: []string{"/app", echoRole, own}})
		eventually(t, "the daemon to listen", func() bool {
			c, err := net.Dial("unix", path)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		return volume, path
	}
	t.Run("outside", func(t *testing.T) {
		ways(t, func(t *testing.T) {
			_, path := start(t)
			a := startApp(t, alice, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			dir := a.Dump(t)
			wantPaths(t, dir, own, path, "t-reconnect")
			a.Restore(t, dir)
			a.Request(t, "c")
			nothingLeft(t)
		})
	})
	t.Run("another", func(t *testing.T) {
		pathWays(t, func(t *testing.T) {
			volume, _ := start(t)
			c := startContainer(t, "runc", Spec{Binds: map[string]string{volume: "/run/inside"}})
			c.connect(t, "c", "/run/inside/reconnect")
			c.Request(t, "c")
			for range 2 {
				images := c.Checkpoint(t)
				wantPaths(t, images, own, "/run/inside/reconnect", "t-inside")
				c.Restore(t, images)
				c.Request(t, "c")
			}
		})
	})
}

// edit changes the source of a mount.
func (c *Container) edit(t testing.TB, old, new string) {
	t.Helper()
	b, err := os.ReadFile(c.path("config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Mounts []map[string]any `json:"mounts"`
	}
	var all map[string]any
	if err := json.Unmarshal(b, &config); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, m := range config.Mounts {
		if m["source"] == old {
			m["source"], found = new, true
		}
	}
	if !found {
		t.Fatalf("no mount is of %s", old)
	}
	all["mounts"] = config.Mounts
	if b, err = json.Marshal(all); err == nil {
		err = os.WriteFile(c.path("config.json"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
