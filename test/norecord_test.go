// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/sockpeer"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// noRecordWays runs a scenario in which plain CRIU dumps, told of each external
// connection, and we restore.
func noRecordWays(t *testing.T, scenario func(*testing.T)) {
	t.Helper()
	eachWay(t, []way{byRPC, byDropin}, scenario)
}

// quietApp is an application of whose threads CRIU's images tell what they wait
// for.
func quietApp(t testing.TB, u User, attr *syscall.SysProcAttr) *App {
	t.Helper()
	return startAppAs(t, app.QuietRole, u, attr)
}

// dumpPlain dumps with plain CRIU, which is told of the connections.
func (a *App) dumpPlain(t testing.TB, conns []string, args ...string) (dir string) {
	t.Helper()
	for _, c := range conns {
		args = append(args, "--external", fmt.Sprintf("unix[%d]", a.Details(t, c).Inode))
	}
	dir = images(t)
	args = append(args, "-v4", "-o", "dump.log")
	byStock.dump(a.PID, dir, args...).run(t, a.User, filepath.Join(dir, "dump.log")).want(t, "dump with plain CRIU", 0)
	a.Gone(t)
	awaitFree(t, a.dumpedThreads(dir))
	if set, err := image.Open(dir); err != nil || len(set.External()) != len(conns) {
		t.Fatalf("%d half connections are in the images, expected %d; %v", len(set.External()), len(conns), err)
	}
	return dir
}

// notRestored checks that a restore failed, with one of the exit codes, and
// nothing was restored nor written.
func (a *App) notRestored(t testing.TB, dir string, r Result, code int, says ...string) {
	t.Helper()
	if r.Code == 0 || r.By == byRPC && r.Code != code || r.By == byDropin && r.Code != 1 {
		t.Errorf("exit code %d; expected %d by the verb, 1 by the drop-in\n%s\n%s", r.Code, code, r.Output, r.tail())
	}
	for _, s := range says {
		if !strings.Contains(r.Output, s) {
			t.Errorf("stderr does not say %q:\n%s\n%s", s, r.Output, r.tail())
		}
	}
	if !isFree(a.PID) {
		t.Errorf("there is a process %d, in state %s", a.PID, stateOf(a.PID))
	}
	nothingLeft(t)
}

func TestNoRecord(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			stream, streamPath := daemon(t, "unix", "reconnect")
			packets, packetsPath := daemon(t, "unixpacket", "reconnect-packets")
			a := quietApp(t, u, nil)
			a.connect(t, "s1", streamPath)
			a.connect(t, "s2", streamPath)
			a.Do(t, app.Command{Op: "nonblock", Conn: "s2"})
			a.Do(t, app.Command{Op: "dup", Conn: "s2", As: "s2 again"})
			a.connectType(t, "p", packetsPath, unix.SOCK_SEQPACKET)
			a.pair(t)
			child := a.Child(t, "s1")
			works := []string{"s1", "s2", "s2 again", "p"}
			before := map[string]app.Details{}
			for _, c := range works {
				a.Request(t, c)
			}
			for _, c := range works {
				before[c] = a.Details(t, c)
			}
			dir := a.dumpPlain(t, []string{"s1", "s2", "p"})
			images := contents(t, dir)
			for _, options := range [][]string{nil, {"--ext-unix-sk"}} {
				n, m := len(stream.Clients()), len(packets.Clients())
				r := a.Restore(t, dir, options...)
				if !strings.Contains(r.Output, "do not tell whether the daemons had read all") {
					t.Errorf("stderr does not warn of what nobody knows:\n%s", r.Output)
				}
				a.Awake(t)
				child.Awake(t)
				for _, c := range works {
					a.wantDetails(t, c, c, before[c])
				}
				for _, c := range works {
					a.Request(t, c)
				}
				child.Request(t, "s1")
				a.usePair(t)
				if c, d := a.Details(t, "s1"), child.Details(t, "s1"); c.Inode != d.Inode {
					t.Errorf("parent and child had one socket, now they have %d and %d", c.Inode, d.Inode)
				}
				wantClients(t, stream, n, 2)
				wantClients(t, packets, m, 1)
				for _, c := range slices.Concat(stream.Clients()[n:], packets.Clients()[m:]) {
					if c.UID != u.UID || c.GID != u.GID || len(c.Groups) != len(u.Groups) || int(c.PID) != a.PID {
						t.Errorf("the daemon sees %+v, expected %+v, process %d", c, u, a.PID)
					}
				}
				nothingLeft(t)
				a.Kill(t)
			}
			after := contents(t, dir)
			delete(after, "restore.log")
			delete(after, "stats-restore") // CRIU puts it into its work directory
			if !maps.Equal(images, after) {
				t.Errorf("the restore wrote to the images: %v, before %v", after, images)
			}
		}
	})
}

// TestNoRecordDatagram: CRIU can be given none, and connects it itself if it is
// told to.
func TestNoRecordDatagram(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		logPath := filepath.Join(folder(t), "reconnect-log")
		log := datagrams(t, logPath)
		a := quietApp(t, root, nil)
		a.connect(t, "c", path)
		a.connectType(t, "log", logPath, unix.SOCK_DGRAM)
		fd := a.Details(t, "log").FD
		dir := a.dumpPlain(t, []string{"c", "log"})
		a.notRestored(t, dir, a.TryRestore(t, dir), 1, "datagram", "made without criuhook", "dump with criuhook",
			fmt.Sprint("process ", a.PID), fmt.Sprint("fd ", fd))
		a.Restore(t, dir, "--ext-unix-sk")
		a.Awake(t)
		a.Request(t, "c")
		a.wantDatagram(t, "log", log)
		await(t, srv, "one open connection", func(c []echo.Client) bool { return echo.Open(c) == 1 })
		nothingLeft(t)
	})
}

// TestNoRecordBusy: what was under way is not asked for again, nor lost without
// a word.
func TestNoRecordBusy(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		for _, c := range []struct {
			name, says string
			prepare    func(a *App, srv *echo.Server)
		}{
			{"unread bytes", "not yet read by us", func(a *App, srv *echo.Server) {
				if err := srv.Send(0, "unasked\n"); err != nil {
					t.Fatal(err)
				}
				a.eventuallyBusy(t, "bytes", func(c sockpeer.Connection) bool { return c.RecvQueue > 0 })
			}},
			{"in read", "was in read", func(a *App, srv *echo.Server) { a.blocked(t, srv, "read") }},
			{"in poll", "poll, perhaps on fd", func(a *App, srv *echo.Server) {
				a.Do(t, app.Command{Op: "nonblock", Conn: "c"})
				a.blocked(t, srv, "poll")
			}},
		} {
			for _, socket := range []string{"reconnect", "busyrefuse"} {
				t.Run(c.name+" "+socket, func(t *testing.T) {
					srv, path := daemon(t, "unix", socket)
					a := quietApp(t, alice, nil)
					a.connect(t, "c", path)
					a.Request(t, "c")
					who := []string{fmt.Sprint("process ", a.PID), fmt.Sprint("fd ", a.Details(t, "c").FD), path, "t-", c.says}
					c.prepare(a, srv)
					dir := a.dumpPlain(t, []string{"c"})
					r := a.TryRestore(t, dir)
					if socket == "busyrefuse" {
						a.notRestored(t, dir, r, 3, append(who, "busy: hangup")...)
						return
					}
					r.want(t, "restore", 0)
					for _, s := range who {
						if !strings.Contains(r.Output, s) {
							t.Errorf("stderr does not say %q:\n%s", s, r.Output)
						}
					}
					a.Awake(t)
					a.wantHungUp(t, "c")
					wantClients(t, srv, 1, 0)
					nothingLeft(t)
				})
			}
		}
	})
}

// blocked makes a thread wait for an answer that does not come.
func (a *App) blocked(t testing.TB, srv *echo.Server, call string) {
	t.Helper()
	srv.Hold()
	a.Do(t, app.Command{Op: "background", Text: "request", Conn: "c"})
	a.eventuallyBusy(t, "a thread waits in "+call, func(c sockpeer.Connection) bool {
		return len(c.Waiters) == 1 && strings.Contains(c.Waiters[0].Syscall, call) && c.SendQueue == 0
	})
}

func TestNoRecordRefused(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		for _, socket := range []string{"other", "refuse"} {
			srv, path := daemon(t, "unix", socket)
			_, known := daemon(t, "unix", "reconnect")
			a := quietApp(t, alice, nil)
			a.connect(t, "c", path)
			a.connect(t, "known", known)
			fd := a.Details(t, "c").FD
			dir := a.dumpPlain(t, []string{"c", "known"})
			for _, options := range [][]string{nil, {"--ext-unix-sk"}} {
				r := a.TryRestore(t, dir, options...)
				a.notRestored(t, dir, r, 3, "made without criuhook", fmt.Sprint("process ", a.PID), fmt.Sprint("fd ", fd), path, "rule")
			}
			wantClients(t, srv, 1, 0)
		}
	})
}

// TestNoRecordDaemon: it is away, or another's.
func TestNoRecordDaemon(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		dumped := func(t *testing.T, socket string) (*App, string, string) {
			srv, path := daemon(t, "unix", socket)
			a := quietApp(t, alice, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			a.pair(t)
			dir := a.dumpPlain(t, []string{"c"})
			srv.Close()
			return a, path, dir
		}
		hungUp := func(t *testing.T, a *App, dir string, says ...string) {
			a.Restore(t, dir).wantMessage(t, append(says, fmt.Sprint("process ", a.PID), "hung up")...)
			a.Awake(t)
			a.wantHungUp(t, "c")
			a.usePair(t)
			nothingLeft(t)
		}
		t.Run("absent", func(t *testing.T) {
			a, path, dir := dumped(t, "reconnect")
			hungUp(t, a, dir, path, "t-reconnect", "no such file")
		})
		t.Run("absent and fail", func(t *testing.T) {
			a, path, dir := dumped(t, "fail")
			a.notRestored(t, dir, a.TryRestore(t, dir), 1, path, "t-fail", "start the daemon and restore again")
			srv := daemonAt(t, "unix", path)
			a.Restore(t, dir)
			a.Awake(t)
			a.Request(t, "c")
			wantClients(t, srv, 0, 1)
		})
		t.Run("of another user", func(t *testing.T) {
			a, path, dir := dumped(t, "reconnect")
			srv, err := echo.ListenAs(1001, "unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { srv.Close() })
			hungUp(t, a, dir, path, "uid 1001 listens there", "a rule with uid: allows another user")
			await(t, srv, "no request", func(c []echo.Client) bool { return len(c) == 1 && c[0].EOF && c[0].Requests == 0 })
		})
		t.Run("of the user of the rule", func(t *testing.T) {
			a, path, dir := dumped(t, "other")
			srv, err := echo.ListenAs(1001, "unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { srv.Close() })
			install(t, fmt.Sprintf("rules:\n  - {name: t-1001, path: %q, uid: 1001, idle: reconnect}\n", path))
			a.Restore(t, dir)
			a.Awake(t)
			a.Request(t, "c")
			wantClients(t, srv, 0, 1)
			nothingLeft(t)
		})
	})
}

// TestNoRecordOwnNamespace: what would have to exist first.
func TestNoRecordOwnNamespace(t *testing.T) {
	noRecordWays(t, func(t *testing.T) {
		t.Run("network", func(t *testing.T) {
			_, path := daemon(t, "unix", "reconnect")
			a := quietApp(t, root, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
			a.connect(t, "c", path)
			a.Request(t, "c")
			dir := a.dumpPlain(t, []string{"c"}, append(emptyNet, "--network-lock=skip")...)
			a.notRestored(t, dir, a.TryRestore(t, dir, emptyNet...), 1,
				"network namespace", "made without criuhook", "dump with criuhook", fmt.Sprint("process ", a.PID))
		})
		t.Run("root directory", func(t *testing.T) {
			_, path := daemon(t, "unix", "reconnect")
			a := quietApp(t, root, nil)
			a.connect(t, "c", path)
			newRoot := folder(t)
			a.Do(t, app.Command{Op: "chroot", To: newRoot})
			if err := os.MkdirAll(filepath.Join(newRoot, filepath.Dir(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			dir := a.dumpPlain(t, []string{"c"})
			a.notRestored(t, dir, a.TryRestore(t, dir), 1,
				"root directory", "made without criuhook", "dump with criuhook", fmt.Sprint("process ", a.PID))
		})
	})
}
