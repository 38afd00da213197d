// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// inheritWays runs a scenario by the ways that connect before the process exists.
func inheritWays(t *testing.T, scenario func(*testing.T)) {
	t.Helper()
	eachWay(t, []way{byRPC, byDropin}, scenario)
}

// TestInheritedPID: what the daemon sees is the process, not us, however many
// connections are made at the same time, of however many processes.
func TestInheritedPID(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			srv, path := daemon(t, "unix", "reconnect")
			other, otherPath := daemon(t, "unix", "reconnect-other")
			a := startApp(t, u, nil)
			const n = 100
			var names []string
			for i := range n {
				names = append(names, fmt.Sprint("c", i))
				a.connect(t, names[i], path)
				a.connect(t, names[i]+" other", otherPath)
			}
			child := a.Child(t, "c0")
			child.connect(t, "own", path)
			for _, c := range names { // accepted, then
				a.Request(t, c)
				a.Request(t, c+" other")
			}
			child.Request(t, "own")
			pid := srv.Clients()[n].PID
			dir := a.Dump(t)
			r := a.Restore(t, dir)
			a.Awake(t)
			child.Awake(t)
			for _, c := range names {
				a.Request(t, c)
				a.Request(t, c+" other")
			}
			child.Request(t, "own")
			wantClients(t, srv, n+1, n+1)
			wantClients(t, other, n, n)
			seen := map[int]int{}
			for _, c := range append(srv.Clients()[n+1:], other.Clients()[n:]...) {
				seen[int(c.PID)]++
				if c.UID != u.UID || c.GID != u.GID {
					t.Errorf("the daemon sees %+v, expected %+v", c, u)
				}
			}
			if seen[a.PID] != 2*n || seen[int(pid)] != 1 || len(seen) != 2 {
				t.Errorf("connections by the pid that the daemons see: %v; expected %d of %d, 1 of %d\n%s", seen, 2*n, a.PID, pid, r.Output)
			}
			nothingLeft(t)
		}
	})
}

// TestInheritedPIDTaken: at the time of connecting somebody has the number; the
// daemon sees us then, the log says so, and the restore is up to CRIU.
func TestInheritedPIDTaken(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		d := dumpClient(t, root, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		taker := sleepAs(t, d.PID)
		r := d.TryRestore(t, d.dir)
		if r.Code == 0 {
			t.Fatalf("restored in spite of another process %d\n%s", d.PID, r.tail())
		}
		said := fmt.Sprintf("connected as uid %d, for CRIU to hand to the application; the daemon sees process ", root.UID)
		if all := r.Output + r.Log; strings.Contains(all, "reconnected") || d.restoreBy == byRPC && !strings.Contains(all, said) {
			t.Errorf("it is said to be reconnected, or not what was done:\n%s\n%s", r.Output, r.tail())
		}
		if taker != d.PID || stateOf(taker) == "" {
			t.Errorf("process %d, in whose way nothing was, is in state %q", taker, stateOf(taker))
		}
		await(t, srv, "all connections to end", func(c []echo.Client) bool { return echo.Open(c) == 0 })
		nothingLeft(t)
		(&Process{PID: taker}).Kill(t)
		// Another daemon, for this one may not have accepted all that we made.
		srv.Close()
		srv = daemonAt(t, "unix", d.path)
		d.Restore(t, d.dir)
		d.Awake(t)
		d.Request(t, "c")
		wantClients(t, srv, 0, 1)
		if c := srv.Clients()[0]; int(c.PID) != d.PID {
			t.Errorf("the daemon sees process %d, expected %d", c.PID, d.PID)
		}
	})
}

// sleepAs starts a process with a pid.
func sleepAs(t testing.TB, pid int) int {
	t.Helper()
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	// Afterwards as before: new threads of this test must not take the pids of
	// the application's.
	defer os.WriteFile(lastPID, []byte(strings.TrimSpace(contentsOf(lastPID))), 0)
	for range 1000 {
		if err := os.WriteFile(lastPID, fmt.Append(nil, pid-1), 0); err != nil {
			t.Fatal(err)
		}
		p := start(t, root, nil, "sleep", "1000")
		if p.PID == pid {
			go p.started.Wait() // killed by the test
			p.started = nil
			return pid
		}
		p.Kill(t)
	}
	t.Fatalf("no process with pid %d could be had", pid)
	return 0
}

// TestOwnNetworkNamespaceThrice: a socket made outside of the namespace could not
// be dumped again.
func TestOwnNetworkNamespaceThrice(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
		a.restoreArgs = emptyNet
		a.connect(t, "c", path)
		a.Request(t, "c")
		before := a.Details(t, "c")
		for i := range 3 {
			dir := a.Dump(t, append(emptyNet, "--network-lock=skip")...)
			wantRecorded(t, dir, 1)
			a.restoreAnew(t, a.restoreBy, dir, emptyNet...)
			a.Request(t, "c")
			a.wantDetails(t, "own network namespace", "c", before)
			wantClients(t, srv, i+1, 1)
			if c := srv.Clients()[i+1]; c.UID != alice.UID {
				t.Errorf("the daemon sees %+v", c)
			}
		}
		nothingLeft(t)
	})
}

// TestInheritedBySomebodyElse: the user gives CRIU a socket of his own for one of
// the connections. The others are ours to make.
func TestInheritedBySomebodyElse(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		own, ownPath := daemon(t, "unix", "reconnect-own")
		a := startApp(t, root, nil)
		a.connect(t, "c", path)
		a.connect(t, "d", path)
		a.Request(t, "c")
		a.Request(t, "d")
		inode := a.Details(t, "c").Inode
		dir := a.Dump(t)

		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		given := os.NewFile(uintptr(fd), "given")
		defer given.Close()
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: ownPath}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), criuTime)
		defer cancel()
		c := a.restoreBy.restore(dir, true, "--inherit-fd", fmt.Sprintf("fd[3]:socket:[%d]", inode), "-v4", "-o", "restore.log")
		cmd := c.as(ctx, root)
		cmd.ExtraFiles = []*os.File{given}
		if out, err := cmd.CombinedOutput(); err != nil {
			log, _ := os.ReadFile(filepath.Join(dir, "restore.log"))
			t.Fatalf("%v\n%s\n%s", err, out, Result{Log: string(log)}.tail())
		}
		a.Awake(t)
		a.Request(t, "c")
		a.Request(t, "d")
		wantClients(t, srv, 2, 1)
		wantClients(t, own, 0, 1)
		nothingLeft(t)
	})
}

// TestInheritedFewFiles: as many sockets as there is room for descriptors, or
// more: then the restore fails, loudly, and again with more room it works.
func TestInheritedFewFiles(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, root, nil)
		const n = 40
		for i := range n {
			a.connect(t, fmt.Sprint("c", i), path)
			a.Request(t, fmt.Sprint("c", i))
		}
		dir := a.Dump(t)
		for _, limit := range []uint64{32, 64, 256} {
			first := len(srv.Clients())
			c := a.restoreBy.restore(dir, true, "-v4", "-o", "restore.log")
			c.args = append([]string{"prlimit", fmt.Sprintf("--nofile=%d:", limit), c.file}, c.args[1:]...)
			c.file = "prlimit"
			r := c.run(t, root, filepath.Join(dir, "restore.log"))
			if r.Code != 0 {
				if strings.TrimSpace(r.Output) == "" && !strings.Contains(r.Log, "Error") {
					t.Errorf("limit %d: failed without a word", limit)
				}
				t.Logf("limit %d: %s", limit, r.Output)
				if limit == 256 {
					t.Errorf("limit %d: %s\n%s", limit, r.Output, r.tail())
				}
				if !isFree(a.PID) {
					t.Errorf("limit %d: process %d is in state %s", limit, a.PID, stateOf(a.PID))
				}
				await(t, srv, "no connection to be open", func(c []echo.Client) bool { return echo.Open(c[first:]) == 0 })
				nothingLeft(t)
				continue
			}
			a.Awake(t)
			for i := range n {
				a.Request(t, fmt.Sprint("c", i))
			}
			await(t, srv, "all connections", func(c []echo.Client) bool { return echo.Open(c[first:]) == n })
			nothingLeft(t)
			a.Kill(t)
		}
	})
}

// TestInheritedJoinsNamespace: where a process comes into namespaces that only
// CRIU knows, its sockets are connected there.
func TestInheritedJoinsNamespace(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		d := dumpClient(t, root, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		d.Restore(t, d.dir, "--join-ns", "uts:/proc/self/ns/uts")
		d.Awake(t)
		d.Request(t, "c")
		d.usePair(t)
		wantClients(t, srv, 0, 1)
		nothingLeft(t)
	})
}

// TestOwnPIDNamespaceLog: the number that the daemon sees is not the
// application's, and the log says whose it is.
func TestOwnPIDNamespaceLog(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, root, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
		a.connect(t, "c", path)
		a.Request(t, "c")
		dir := a.Dump(t)
		a.restoreAnew(t, a.restoreBy, dir)
		a.Request(t, "c")
		wantClients(t, srv, 1, 1)
		log, _ := os.ReadFile(filepath.Join(dir, "restore.log"))
		pid := int(srv.Clients()[1].PID)
		if want := fmt.Sprintf("the daemon sees process %d, of criuhook", pid); pid == a.PID || a.restoreBy == byRPC && !strings.Contains(string(log), want) {
			t.Errorf("the daemon sees process %d, the application is %d; the log does not say %q\n%s", pid, a.PID, want, Result{Log: string(log)}.tail())
		}
		nothingLeft(t)
	})
}

// TestInheritedMountNamespace: the daemon's name is bind-mounted where only the
// application sees it.
func TestInheritedMountNamespace(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "moved")
		newRoot := folder(t)
		inside := filepath.Join(newRoot, "tmp", "criuhook-test-moved")
		if err := os.Mkdir(filepath.Dir(inside), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(inside, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(path, inside, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(inside, unix.MNT_DETACH) })
		a := startApp(t, root, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		a.Do(t, app.Command{Op: "chroot", To: newRoot})
		dir := a.Dump(t)
		a.Restore(t, dir)
		a.Awake(t)
		a.Request(t, "c")
		wantClients(t, srv, 1, 1)
		nothingLeft(t)
	})
}
