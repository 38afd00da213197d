// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// restoreAnew restores a process whose pid may be another afterwards.
func (a *App) restoreAnew(t testing.TB, w way, dir string, more ...string) {
	t.Helper()
	pidfile := filepath.Join(dir, "pid")
	if err := os.RemoveAll(pidfile); err != nil {
		t.Fatal(err)
	}
	r := a.tryRestoreBy(t, w, dir, append(more, "--pidfile", pidfile)...)
	r.want(t, "restore", 0)
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	if a.PID, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		t.Fatal(err)
	}
	r.wantPID(t, a.PID)
	a.Awake(t)
}

// CRIU saves and locks the firewall of a network namespace, with tools and
// kernel features that this machine may lack; it needs them for a process
// without connections too. An empty namespace has none.
var emptyNet = []string{"--empty-ns", "net"}

// TestOwnNetworkNamespace: the daemon is outside of it. A path leads there.
func TestOwnNetworkNamespace(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, u, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
			a.restoreArgs = emptyNet
			a.connect(t, "c", path)
			a.Request(t, "c")
			ns, err := os.Readlink("/proc/" + strconv.Itoa(a.PID) + "/ns/net")
			if err != nil {
				t.Fatal(err)
			}
			if own, err := os.Readlink("/proc/self/ns/net"); err != nil || own == ns {
				t.Fatalf("the application has no network namespace of its own: %s, %v", ns, err)
			}
			a.pair(t)
			before := a.Details(t, "c")
			for range 2 { // the second time shows whose namespace the new socket is in
				dir := a.Dump(t, append(emptyNet, "--network-lock=skip")...)
				a.restoreAnew(t, byStock, dir, emptyNet...)
				a.wantDead(t, "c")
				a.Kill(t)
				a.restoreAnew(t, a.restoreBy, dir, emptyNet...)
				a.Request(t, "c")
				a.wantDetails(t, "own network namespace", "c", before)
				a.usePair(t)
			}
			await(t, srv, "three connections, one open", func(c []echo.Client) bool { return len(c) == 3 && echo.Open(c) == 1 })
			nothingLeft(t)
		}
	})
}

// TestOwnPIDNamespace: the record tells pids as the application knows them;
// outside they are others at every restore.
func TestOwnPIDNamespace(t *testing.T) {
	ways(t, func(t *testing.T) {
		// Only root: the /proc it sees is not of its namespace, and CRIU makes an
		// application mount its own then.
		for _, u := range []User{root} {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, u, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
			a.connect(t, "c", path)
			child := a.Child(t, "c")
			child.connect(t, "own", path)
			a.Request(t, "c")
			child.Request(t, "own")
			dir := a.Dump(t)
			a.restoreAnew(t, byStock, dir)
			child.Awake(t)
			a.wantDead(t, "c")
			child.wantDead(t, "c", "own")
			a.Kill(t)
			for range 2 {
				a.restoreAnew(t, a.restoreBy, dir)
				a.Request(t, "c")
				child.Request(t, "c")
				child.Request(t, "own")
				await(t, srv, "two open connections", func(c []echo.Client) bool { return echo.Open(c) == 2 })
				a.Kill(t)
			}
			nothingLeft(t)
		}
	})
}

// TestChroot: the application's root is another since it connected. Names are
// looked up from there, and never from outside of it.
func TestChroot(t *testing.T) {
	ways(t, func(t *testing.T) {
		t.Run("to", func(t *testing.T) {
			_, path := daemon(t, "unix", "moved")
			newRoot := folder(t)
			inside := filepath.Join(newRoot, "tmp", "criuhook-test-moved")
			if err := os.Mkdir(filepath.Dir(inside), 0o755); err != nil {
				t.Fatal(err)
			}
			srv := daemonAt(t, "unix", inside)
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Do(t, app.Command{Op: "chroot", To: newRoot})
			a.roundTrip(t, "c")
			a.Request(t, "c")
			wantClients(t, srv, 0, 1)
			nothingLeft(t)
		})
		t.Run("not visible", func(t *testing.T) {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Do(t, app.Command{Op: "chroot", To: folder(t)})
			dir := a.Dump(t)
			a.Restore(t, dir).wantMessage(t, path, "t-reconnect", "no such file")
			a.Awake(t)
			a.wantHungUp(t, "c")
			wantClients(t, srv, 1, 0)
			nothingLeft(t)
		})
		t.Run("a link leads out", func(t *testing.T) {
			srv, path := daemon(t, "unix", "moved")
			newRoot := folder(t)
			if err := os.Mkdir(filepath.Join(newRoot, "tmp"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path, filepath.Join(newRoot, "tmp", "criuhook-test-moved")); err != nil {
				t.Fatal(err)
			}
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Do(t, app.Command{Op: "chroot", To: newRoot})
			dir := a.Dump(t)
			a.Restore(t, dir).wantMessage(t, "criuhook-test-moved")
			a.Awake(t)
			a.wantHungUp(t, "c")
			wantClients(t, srv, 1, 0)
			nothingLeft(t)
		})
	})
}
