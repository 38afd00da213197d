// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

const threads = 4

// hammered starts an application whose threads make requests all the time, on
// a connection each.
func hammered(t testing.TB, u User) (*App, *echo.Server) {
	t.Helper()
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, u, nil)
	for i := range threads {
		a.connect(t, fmt.Sprint("h", i), path)
	}
	a.Do(t, app.Command{Op: "hammer", Conn: "h", Threads: threads})
	return a, srv
}

// unharmed checks that hammering goes on as if nothing had happened.
func (a *App) unharmed(t testing.TB, srv *echo.Server) {
	t.Helper()
	from := a.Do(t, app.Command{Op: "stats"}).Count.Requests
	eventually(t, "more requests", func() bool {
		ans, err := a.Try(app.Command{Op: "stats"})
		if err != nil {
			t.Fatalf("the application, process %d: %v", a.PID, err)
		}
		return ans.Count.Requests > from+threads
	})
	if c := a.Do(t, app.Command{Op: "stats"}).Count; c.Failed != 0 {
		t.Errorf("%d threads failed: %s", c.Failed, c.LastErr)
	}
	wantClients(t, srv, 0, threads)
	nothingLeft(t)
}

// Of the action script only: TestTwoHundredDumps has the other ways.
func TestHundredDumps(t *testing.T) {
	need(t)
	manyDumps(t, 100)
}

func TestTwoHundredDumps(t *testing.T) {
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) { manyDumps(t, 200) })
}

// manyDumps dumps an application whose threads make requests all the time. No
// dump fails, and no request.
func manyDumps(t *testing.T, n int) {
	t.Helper()
	a, srv := hammered(t, alice)
	if testing.Short() {
		n /= 10
	}
	dir := images(t)
	for i := range n {
		a.TryDump(t, dir, "--leave-running").want(t, fmt.Sprintf("dump %d", i), 0)
		wantRecorded(t, dir, threads)
	}
	a.unharmed(t, srv)
	if c := a.Do(t, app.Command{Op: "rest"}).Count; c.Failed != 0 || c.Requests == 0 {
		t.Errorf("%d of %d requests failed: %s", c.Failed, c.Requests, c.LastErr)
	}
	a.Kill(t)
	a.Dumped(t, dir) // the last image
	nothingLeft(t)
}

// An image of a dump that left the application running is as good as others.
func TestLeaveRunning(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		before := a.Details(t, "c")
		a.TryDump(t, images(t), "-R").want(t, "dump with CRIU's short option", 0)
		a.untouched(t, srv, "c", before)
		dir := a.Dump(t, "--leave-running")
		a.untouched(t, srv, "c", before)
		a.Kill(t)
		a.Dumped(t, dir)
		for n := 1; n <= 2; n++ {
			a.Restore(t, dir)
			a.Request(t, "c")
			wantClients(t, srv, n, 1)
			a.Kill(t)
			await(t, srv, "EOF", func(c []echo.Client) bool { return echo.Open(c) == 0 })
		}
		nothingLeft(t)
	})
}

func TestTenCycles(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		details := a.Details(t, "c")
		count := a.Do(t, app.Command{Op: "stats"}).Count
		for range 20 { // the control connection of the last command may still be open
			count.FDs = min(count.FDs, a.Do(t, app.Command{Op: "stats"}).Count.FDs)
		}
		for i := 1; i <= 10; i++ {
			dir := a.Dump(t)
			await(t, srv, "EOF", func(c []echo.Client) bool { return echo.Open(c) == 0 })
			a.Restore(t, dir)
			a.Awake(t)
			a.Request(t, "c")
			a.wantDetails(t, fmt.Sprintf("cycle %d", i), "c", details)
			wantClients(t, srv, i, 1)
			nothingLeft(t)
		}
		var after app.Counters
		eventually(t, fmt.Sprintf("%d fds, as before the ten cycles", count.FDs), func() bool {
			after = a.Do(t, app.Command{Op: "stats"}).Count
			return after.FDs == count.FDs
		})
		// A Go program starts threads when it sees fit.
		if after.Threads < count.Threads || after.Threads > count.Threads+4 {
			t.Errorf("%d threads after ten cycles, %d before", after.Threads, count.Threads)
		}
	})
}

// Container runtimes and configuration files both name scripts: all run. Of the
// action script only.
func TestScriptTwice(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, alice, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	twice := "--action-script=" + criuhook
	dir := a.Dump(t, twice)
	wantRecorded(t, dir, 1)
	a.Restore(t, dir, twice)
	a.Request(t, "c")
	wantClients(t, srv, 1, 1)
	nothingLeft(t)
}

// A user's own script that calls ours. Of the action script only.
func TestScriptOfTheUsers(t *testing.T) {
	need(t)
	for _, u := range []User{root, alice} {
		t.Run(fmt.Sprintf("uid %d", u.UID), func(t *testing.T) {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, u, nil)
			a.connectType(t, "c", path, unix.SOCK_STREAM)
			a.Request(t, "c")
			// -p: a setuid CRIU's script must keep its rights.
			script := wrapper(t, "-p", "echo \"$CRTOOLS_SCRIPT_ACTION\" >>"+filepath.Dir(path)+"/stages\n"+criuhook+"\nexit $?")
			dir := images(t)
			run(t, u, dir, "dump.log", "dump", "-t", fmt.Sprint(a.PID), script).want(t, "dump", 0)
			a.Dumped(t, dir)
			wantRecorded(t, dir, 1)
			run(t, u, dir, "restore.log", "restore", "-d", script).want(t, "restore", 0)
			a.Request(t, "c")
			wantClients(t, srv, 1, 1)
			if b, err := os.ReadFile(filepath.Dir(path) + "/stages"); err != nil || len(b) == 0 {
				t.Errorf("the script was not called: %v", err)
			}
			nothingLeft(t)
		})
	}
}

// wrapper makes a shell script and returns CRIU's option for it.
func wrapper(t testing.TB, flags, text string) string {
	t.Helper()
	file := filepath.Join(images(t), "script")
	if err := os.WriteFile(file, []byte("#!/bin/sh "+flags+"\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return "--action-script=" + file
}
