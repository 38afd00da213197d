// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/sockpeer"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// wayToWait is a way in which a thread waits for an answer.
type wayToWait struct {
	syscall, op string
	prepare     []string
}

var waysToWait = []wayToWait{
	{"read", "request", nil},
	{"poll", "request", []string{"nonblock"}},
	{"epoll_wait", "epoll-wait", []string{"epoll-add"}},
}

// awaiting starts an application with a thread that waits for an answer which
// the daemon holds back.
func awaiting(t testing.TB, w wayToWait, socket string) (*App, *echo.Server) {
	t.Helper()
	srv, path := daemon(t, "unix", socket)
	a := startApp(t, alice, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	for _, op := range w.prepare {
		a.Do(t, app.Command{Op: op, Conn: "c"})
	}
	srv.Hold()
	a.Do(t, app.Command{Op: "background", Text: w.op, Conn: "c"})
	a.eventuallyBusy(t, "a thread waits in "+w.syscall, func(c sockpeer.Connection) bool {
		return len(c.Waiters) == 1 && strings.Contains(c.Waiters[0].Syscall, strings.TrimSuffix(w.syscall, "_wait")) && c.SendQueue == 0
	})
	return a, srv
}

// eventuallyBusy waits until the only connection of the application is so.
func (a *App) eventuallyBusy(t testing.TB, what string, ok func(sockpeer.Connection) bool) {
	t.Helper()
	eventually(t, what, func() bool {
		snap, err := sockpeer.Scan(a.PID)
		return err == nil && len(snap.Connections) == 1 && ok(snap.Connections[0])
	})
}

// answered waits for the end of what awaiting began.
func (a *App) answered(t testing.TB, wantErr string) {
	t.Helper()
	var c app.Counters
	eventually(t, "the thread has its answer", func() bool {
		c = a.Do(t, app.Command{Op: "stats"}).Count
		return c.Requests == 1
	})
	if c.LastErr != wantErr {
		t.Errorf("the thread that waited got %q, expected %q", c.LastErr, wantErr)
	}
}

// wantHangup checks that the only connection of a record is hung up, and why.
func wantHangup(t testing.TB, dir, busy string) {
	t.Helper()
	rec, err := image.ReadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(rec.Connections) != 1 {
		t.Fatalf("the record holds %d connections, expected 1", len(rec.Connections))
	}
	if c := rec.Connections[0]; c.Action != proto.Action_ACTION_HANGUP || !strings.Contains(c.Busy, busy) {
		t.Errorf("the record says %v, because %q; expected a hangup, because %q", c.Action, c.Busy, busy)
	}
}

func TestBusyHangup(t *testing.T) {
	need(t)
	for _, w := range waysToWait {
		t.Run(w.syscall, func(t *testing.T) {
			a, srv := awaiting(t, w, "reconnect")
			dir := a.Dump(t)
			wantHangup(t, dir, "waits in ")
			a.Restore(t, dir)
			a.answered(t, "EOF")
			if n := len(srv.Clients()); n != 1 {
				t.Errorf("the daemon saw %d connections, expected none after the first", n-1)
			}
			nothingLeft(t)
		})
	}
}

func TestBusyRefuse(t *testing.T) {
	need(t)
	for _, w := range waysToWait {
		t.Run(w.syscall, func(t *testing.T) {
			a, srv := awaiting(t, w, "busyrefuse")
			before := a.Details(t, "c")
			dir := images(t)
			a.TryDump(t, dir).failed(t, dir, a.who(t, before), "rule t-busy-refuse", "waits in ", "the rule refuses it while it is busy", "busy: hangup")
			srv.Release()
			a.answered(t, "")
			a.untouched(t, srv, "c", before)
		})
	}
}

func TestBusyWait(t *testing.T) {
	need(t)
	for _, w := range waysToWait {
		t.Run(w.syscall, func(t *testing.T) {
			a, srv := awaiting(t, w, "wait")
			dir := images(t)
			done := make(chan Result, 1)
			go func() { done <- a.TryDump(t, dir) }()
			eventually(t, "somebody of ours waits", func() bool {
				left, _ := ours()
				return strings.Contains(strings.Join(left, "\n"), " interpose ")
			})
			srv.Release()
			(<-done).want(t, "dump", 0)
			a.Dumped(t, dir)
			wantRecorded(t, dir, 1)
			a.Restore(t, dir)
			a.answered(t, "")
			a.Request(t, "c")
			wantClients(t, srv, 1, 1)
			nothingLeft(t)
		})
	}
}

func TestBusyWaitExpires(t *testing.T) {
	need(t)
	a, srv := awaiting(t, waysToWait[0], "wait")
	before := a.Details(t, "c")
	dir := images(t)
	a.TryDump(t, dir).failed(t, dir, a.who(t, before), "it stayed busy for the 3s the rule gives it", "longer patience")
	srv.Release()
	a.answered(t, "")
	a.untouched(t, srv, "c", before)
}

// What the daemon sent before the dump is not lost.
func TestUnreadBytes(t *testing.T) {
	need(t)
	for network, typ := range map[string]int{"unix": unix.SOCK_STREAM, "unixpacket": unix.SOCK_SEQPACKET} {
		t.Run(network, func(t *testing.T) {
			srv, path := daemon(t, network, "reconnect")
			a := startApp(t, alice, nil)
			a.connectType(t, "c", path, typ)
			a.Request(t, "c")
			const text = "unasked\n"
			if err := srv.Send(0, text); err != nil {
				t.Fatal(err)
			}
			a.eventuallyBusy(t, "bytes", func(c sockpeer.Connection) bool { return c.RecvQueue > 0 })
			dir := a.Dump(t)
			wantHangup(t, dir, "not yet read by us")
			a.Restore(t, dir)
			if got := a.Do(t, app.Command{Op: "read", Conn: "c"}).Text; got != text {
				t.Errorf("after the restore the application reads %q, expected %q", got, text)
			}
			a.wantHungUp(t, "c")
			nothingLeft(t)
		})
	}
}

// The daemons are not frozen: what they do while CRIU dumps shows at its end.
func TestDaemonActsDuringDump(t *testing.T) {
	need(t)
	answer := func(srv *echo.Server) error { return srv.Send(0, "late\n") }
	leave := func(srv *echo.Server) error { return srv.Close() }
	for _, c := range []struct {
		name, socket string
		act          func(*echo.Server) error
		says         string
		refused      bool
	}{
		{"answers", "reconnect", answer, "the peer answered while CRIU dumped", false},
		{"closes", "reconnect", leave, "the peer closed it while CRIU dumped", false},
		{"answers, busy refuses", "busyrefuse", answer, "the peer answered while CRIU dumped", true},
		{"closes, busy refuses", "busyrefuse", leave, "the peer closed it while CRIU dumped", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv, path := daemon(t, "unix", c.socket)
			a := startApp(t, alice, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			fifo := filepath.Join(images(t), "fifo")
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			script := wrapper(t, "-p", fmt.Sprintf("[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ] || { echo frozen >%[1]s; cat %[1]s >/dev/null; }\nexec %[2]s", fifo, criuhook))
			acted := make(chan error, 1)
			go func() {
				_, err := os.ReadFile(fifo)
				if err == nil {
					err = c.act(srv)
				}
				acted <- err
				_ = os.WriteFile(fifo, []byte("done\n"), 0) // else the dump hangs
			}()
			dir := images(t)
			r := run(t, a.User, dir, "dump.log", "dump", "-t", fmt.Sprint(a.PID), script)
			if err := <-acted; err != nil {
				t.Fatal(err)
			}
			r.wantMessage(t, c.says, path)
			if c.refused {
				r.failed(t, dir, "refuses busy connections")
				a.Awake(t)
				if c.says == "the peer answered while CRIU dumped" {
					if got := a.Do(t, app.Command{Op: "read", Conn: "c"}).Text; got != "late\n" {
						t.Errorf("the application reads %q", got)
					}
					a.Request(t, "c")
				}
				nothingLeft(t)
				return
			}
			r.want(t, "dump", 0)
			a.Dumped(t, dir)
			wantHangup(t, dir, c.says)
			a.Restore(t, dir)
			a.wantHungUp(t, "c")
			nothingLeft(t)
		})
	}
}

// Threads that work all the time find, after a restore, either a connection
// that works or one that is closed. None hangs, none gets a wrong answer.
func TestRestoreUnderLoad(t *testing.T) {
	need(t)
	for range 5 {
		a, srv := hammered(t, alice)
		eventually(t, "requests", func() bool { return a.Do(t, app.Command{Op: "stats"}).Count.Requests > 100 })
		dir := a.Dump(t)
		rec, err := image.ReadRecord(dir)
		if err != nil {
			t.Fatal(err)
		}
		hungUp := 0
		for _, c := range rec.Connections {
			if c.Action == proto.Action_ACTION_HANGUP {
				hungUp++
			}
		}
		a.Restore(t, dir)
		var c app.Counters
		eventually(t, "the threads of dead connections see it", func() bool {
			c = a.Do(t, app.Command{Op: "stats"}).Count
			return c.Failed >= int64(hungUp)
		})
		c = a.Do(t, app.Command{Op: "rest"}).Count
		if c.Failed != int64(hungUp) || hungUp > 0 && c.LastErr != "EOF" && c.LastErr != unix.EPIPE.Error() {
			t.Errorf("%d threads failed (%s); %d connections were hung up", c.Failed, c.LastErr, hungUp)
		}
		wantClients(t, srv, threads, threads-hungUp)
		nothingLeft(t)
	}
}
