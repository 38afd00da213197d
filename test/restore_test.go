// SPDX-License-Identifier: Apache-2.0

package test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/echo"
)

// dumped is an application that was dumped with one connection, idle, to a
// daemon that has gone since, and all that a warning must name.
type dumped struct {
	*App
	dir, path string
	names     []string
}

// dumpClient dumps a client of a daemon whose socket has the given name: that
// is, under the rule of that name.
func dumpClient(t testing.TB, u User, name, rule string) *dumped {
	t.Helper()
	srv, path := daemon(t, "unix", name)
	a := startApp(t, u, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	a.pair(t)
	d := &dumped{App: a, path: path}
	d.names = []string{fmt.Sprint("process ", a.PID), fmt.Sprint("fd ", a.Details(t, "c").FD), path, rule}
	d.dir = a.Dump(t)
	srv.Close()
	return d
}

// wantRestoreHungUp restores and expects a dead connection, a warning that
// says so, and that all else works.
func (d *dumped) wantRestoreHungUp(t testing.TB, says ...string) {
	t.Helper()
	d.Restore(t, d.dir).wantMessage(t, append(says, d.names...)...)
	d.Awake(t)
	d.wantHungUp(t, "c")
	d.usePair(t)
	nothingLeft(t)
}

// wantRestoreFailed expects that the restore fails, with a message, and that
// nothing of the application is left.
func (d *dumped) wantRestoreFailed(t testing.TB, says ...string) {
	t.Helper()
	r := d.TryRestore(t, d.dir)
	if r.Code == 0 {
		t.Error("the restore did not fail")
		d.Kill(t)
	}
	r.wantMessage(t, append(says, d.names...)...)
	d.Gone(t)
	nothingLeft(t)
}

// wantRestored restores and expects a working connection at the daemon.
func (d *dumped) wantRestored(t testing.TB, srv *echo.Server) {
	t.Helper()
	first := len(srv.Clients())
	d.Restore(t, d.dir)
	d.Awake(t)
	d.Request(t, "c")
	d.usePair(t)
	wantClients(t, srv, first, 1)
	nothingLeft(t)
}

// TestRestoreWithoutDaemon: hung up or failed, as the rule says; either way
// the same images restore when the daemon is back.
func TestRestoreWithoutDaemon(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			d := dumpClient(t, u, "brief", "t-brief")
			d.wantRestoreHungUp(t, "hung up", unix.ENOENT.Error())
			d.Kill(t)
			d.wantRestored(t, daemonAt(t, "unix", d.path))

			d = dumpClient(t, u, "fail", "t-fail")
			d.wantRestoreFailed(t, unix.ENOENT.Error(), "restore again")
			d.wantRestored(t, daemonAt(t, "unix", d.path))
		}
	})
}

// TestRestoreOneDaemonOfTwo: who is there is used, whoever else is not.
func TestRestoreOneDaemonOfTwo(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect-here")
		away, awayPath := daemon(t, "unix", "brief-away")
		a := startApp(t, alice, nil)
		a.connect(t, "here", path)
		a.connect(t, "away", awayPath)
		dir := a.Dump(t)
		away.Close()
		a.Restore(t, dir).wantMessage(t, awayPath)
		a.Awake(t)
		a.Request(t, "here")
		a.wantHungUp(t, "away")
		wantClients(t, srv, 1, 1)
		nothingLeft(t)
	})
}

// TestRestoreDaemonComesLate: a second late, and with the rights of its socket
// file set only after it listens, as many daemons do.
func TestRestoreDaemonComesLate(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, mode := range []os.FileMode{0o777, 0} {
			d := dumpClient(t, alice, "slow", "t-slow")
			started := later(t, time.Second, func() (*echo.Server, error) {
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.path + ".new", Net: "unix"})
				if err != nil {
					return nil, err
				}
				l.SetUnlinkOnClose(false)
				err = errors.Join(os.Chmod(d.path+".new", mode), os.Rename(d.path+".new", d.path))
				if mode == 0 {
					time.Sleep(100 * time.Millisecond) // a while in which connecting is not allowed
					err = errors.Join(err, os.Chmod(d.path, 0o666))
				}
				return echo.Serve(l), err
			})
			d.Restore(t, d.dir)
			d.Awake(t)
			d.Request(t, "c")
			srv := <-started
			if srv == nil {
				return
			}
			wantClients(t, srv, 0, 1)
			srv.Close()
			nothingLeft(t)
		}
	})
}

// TestRestoreRefused: a socket file that a crashed daemon left.
func TestRestoreRefused(t *testing.T) {
	ways(t, func(t *testing.T) {
		for name, rule := range map[string]string{"brief": "t-brief", "fail": "t-fail"} {
			d := dumpClient(t, alice, name, rule)
			rawListenerAt(t, d.path, 1).close()
			if rule == "t-fail" {
				d.wantRestoreFailed(t, unix.ECONNREFUSED.Error())
			} else {
				d.wantRestoreHungUp(t, unix.ECONNREFUSED.Error())
			}
		}
	})
}

func TestRestoreBacklogFull(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := dumpClient(t, alice, "reconnect", "t-reconnect")
		l := rawListenerAt(t, d.path, 1)
		l.fill(t)
		d.wantRestoreHungUp(t, unix.EAGAIN.Error())
		d.Kill(t)

		ready := l.listener(t)
		accepting := later(t, 500*time.Millisecond, func() (*echo.Server, error) { return echo.Serve(ready), nil })
		d.Restore(t, d.dir)
		d.Awake(t)
		d.Request(t, "c")
		srv := <-accepting
		await(t, srv, "a client that makes a request", func(c []echo.Client) bool { return c[len(c)-1].Requests == 1 })
		srv.Close()
		nothingLeft(t)
	})
}

// TestRestoreImpostor: somebody else listens at the name. It is never used,
// nor can it say anything to the application.
func TestRestoreImpostor(t *testing.T) {
	ways(t, func(t *testing.T) {
		for name, rule := range map[string]string{"reconnect": "t-reconnect", "fail": "t-fail"} {
			d := dumpClient(t, alice, name, rule)
			srv, err := echo.ListenAs(1001, "unix", d.path)
			if err != nil {
				t.Fatal(err)
			}
			if rule == "t-fail" {
				d.wantRestoreFailed(t, "uid 1001")
			} else {
				d.wantRestoreHungUp(t, "uid 1001")
			}
			for _, c := range srv.Clients() {
				if c.Requests != 0 {
					t.Errorf("the impostor got a request: %+v", c)
				}
			}
			srv.Close()
			if rule == "t-fail" {
				d.wantRestored(t, daemonAt(t, "unix", d.path))
			}
		}
	})
}

// TestRestoreImpostorSpeaks: what an impostor says the moment it is connected
// to does not reach the application. Many connections, for it is a race.
func TestRestoreImpostorSpeaks(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		var names []string
		for i := range 200 {
			names = append(names, fmt.Sprint("c", i))
			a.connect(t, names[i], path)
		}
		dir := a.Dump(t)
		srv.Close()
		impostor, err := echo.ListenAs(1001, "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { impostor.Close() })
		impostor.Greet("I am your daemon\n")
		a.Restore(t, dir)
		a.Awake(t)
		a.wantHungUp(t, names...)
		await(t, impostor, "all connections to end", func(c []echo.Client) bool { return len(c) > 0 && echo.Open(c) == 0 })
		nothingLeft(t)
	})
}

// TestRestoreMayNotConnect: only the application's own rights count, not those
// of root, who restores.
func TestRestoreMayNotConnect(t *testing.T) {
	ways(t, func(t *testing.T) {
		for name, close := range map[string]func(path string) error{
			"directory": func(path string) error { return os.Chmod(filepath.Dir(path), 0o700) },
			"socket":    func(path string) error { return os.Chmod(path, 0o600) },
		} {
			t.Run(name, func(t *testing.T) {
				d := dumpClient(t, alice, "brief", "t-brief")
				srv := daemonAt(t, "unix", d.path)
				if err := close(d.path); err != nil {
					t.Fatal(err)
				}
				d.wantRestoreHungUp(t, unix.EACCES.Error(), "uid 1000")
				wantClients(t, srv, 0, 0)
			})
		}
	})
}

func TestRestoreElsewhere(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv := daemonAt(t, "unix", "/tmp/criuhook-test-moved")
		d := dumpClient(t, alice, "moved", "t-moved")
		old := daemonAt(t, "unix", d.path)
		d.wantRestored(t, srv)
		wantClients(t, old, 0, 0)
	})
}

func TestRestoreDaemonRestarted(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := dumpClient(t, alice, "reconnect", "t-reconnect")
		d.wantRestored(t, daemonAt(t, "unix", d.path))
	})
}

// TestRestoreReadsOnly: the images are not written to, and restore again and
// again.
func TestRestoreReadsOnly(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := dumpClient(t, alice, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		before := contents(t, d.dir)
		if err := unix.Mount(d.dir, d.dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(d.dir, unix.MNT_DETACH) })
		if err := unix.Mount("", d.dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			d.restoreBy.restoreIn(t, d.User, d.dir, images(t)).want(t, "restore from a read-only directory", 0)
			d.Awake(t)
			d.Request(t, "c")
			d.Kill(t)
			if after := contents(t, d.dir); !maps.Equal(before, after) {
				t.Errorf("the restore changed the images: %v, before %v", after, before)
			}
		}
		await(t, srv, "three connections that ended", func(c []echo.Client) bool { return len(c) == 3 && echo.Open(c) == 0 })
		nothingLeft(t)
	})
}

// restoreIn restores images of one directory, with log and the rest in another.
func (w way) restoreIn(t testing.TB, u User, dir, work string, args ...string) Result {
	t.Helper()
	return w.restore(dir, true, append(args, "-W", work, "-v4", "-o", "log")...).run(t, u, filepath.Join(work, "log"))
}

// contents are the names and checksums of all files.
func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[f.Name()] = fmt.Sprintf("%s %x", f.Type(), sha256.Sum256(b))
	}
	return out
}
