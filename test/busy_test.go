// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/criuhook/interpose"
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

// TestBlockedForAnswer: a thread that waited for an answer at the dump gets EOF
// when it runs again, and its next try is served.
func TestBlockedForAnswer(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, w := range waysToWait {
			t.Run(w.syscall, func(t *testing.T) {
				a, srv := awaiting(t, w, "reconnect")
				dir := a.Dump(t)
				wantHangup(t, dir, "waits in ")
				a.Restore(t, dir)
				restored := time.Now()
				a.answered(t, "EOF")
				t.Logf("EOF within %v of the end of the restore", time.Since(restored))
				if n := len(srv.Clients()); n != 1 {
					t.Errorf("the daemon saw %d connections, expected none after the first", n-1)
				}
				srv.Release()
				a.connect(t, "again", srv.Path())
				a.Request(t, "again")
				wantClients(t, srv, 1, 1)
				nothingLeft(t)
			})
		}
	})
}

func TestBusyRefuse(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, w := range waysToWait {
			t.Run(w.syscall, func(t *testing.T) {
				a, srv := awaiting(t, w, "busyrefuse")
				before := a.Details(t, "c")
				dir := images(t)
				a.TryDump(t, dir).refused(t, dir, a.who(t, before), "rule t-busy-refuse", "waits in ", "the rule refuses it while it is busy", "busy: hangup")
				srv.Release()
				a.answered(t, "")
				a.untouched(t, srv, "c", before)
			})
		}
	})
}

// TestBusyWait: the daemon answers while the dump waits for it; nothing is lost,
// nor asked for twice.
func TestBusyWait(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, w := range waysToWait {
			t.Run(w.syscall, func(t *testing.T) {
				a, srv := awaiting(t, w, "wait")
				dir := images(t)
				done := make(chan Result, 1)
				go func() { done <- a.TryDump(t, dir) }()
				a.eventuallyWaiting(t)
				time.AfterFunc(300*time.Millisecond, srv.Release)
				(<-done).want(t, "dump", 0)
				a.Dumped(t, dir)
				wantRecorded(t, dir, 1)
				a.Restore(t, dir)
				a.answered(t, "")
				a.Request(t, "c")
				wantClients(t, srv, 1, 1)
				if n := srv.Clients()[0].Requests; n != 2 {
					t.Errorf("the daemon had %d requests before the dump, expected 2", n)
				}
				nothingLeft(t)
			})
		}
	})
}

// eventuallyWaiting waits until somebody of ours is at a dump: of the action
// script the tracer, which is what waits.
func (p *Process) eventuallyWaiting(t testing.TB) {
	t.Helper()
	eventually(t, "somebody of ours waits", func() bool {
		left, _ := ours()
		return len(left) > 0 && (p.dumpBy != byScript || strings.Contains(strings.Join(left, "\n"), " interpose "))
	})
}

func TestBusyWaitExpires(t *testing.T) {
	ways(t, func(t *testing.T) {
		a, srv := awaiting(t, waysToWait[0], "wait")
		before := a.Details(t, "c")
		dir := images(t)
		a.TryDump(t, dir).refused(t, dir, a.who(t, before), "it stayed busy for the 3s the rule gives it", "longer patience")
		srv.Release()
		a.answered(t, "")
		a.untouched(t, srv, "c", before)
	})
}

// What the daemon sent before the dump is not lost.
func TestUnreadBytes(t *testing.T) {
	ways(t, func(t *testing.T) {
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
	})
}

// act is what a daemon does while CRIU dumps its client.
type act struct {
	name, socket string
	do           func(*echo.Server) error
	says         string
	refused      bool
}

// The daemons are not frozen: what they do while CRIU dumps shows at its end.
func TestDaemonActsDuringDump(t *testing.T) {
	ways(t, func(t *testing.T) {
		answer := func(srv *echo.Server) error { return srv.Send(0, "late\n") }
		leave := func(srv *echo.Server) error { return srv.Close() }
		for _, c := range []act{
			{"answers", "reconnect", answer, "the peer answered while CRIU dumped", false},
			{"closes", "reconnect", leave, "the peer closed it while CRIU dumped", false},
			{"answers, busy refuses", "busyrefuse", answer, "the peer answered while CRIU dumped", true},
			{"closes, busy refuses", "busyrefuse", leave, "the peer closed it while CRIU dumped", true},
		} {
			t.Run(c.name, func(t *testing.T) {
				acted := false
				for n := 1; n <= 20 && !acted && !t.Failed(); n++ {
					t.Run(fmt.Sprint("dump ", n), func(t *testing.T) { acted = c.duringDump(t) })
				}
				if !acted {
					t.Error("the daemon has not acted while CRIU dumped")
				}
			})
		}
	})
}

// duringDump reports whether the daemon has acted. The dump may be over before.
func (c *act) duringDump(t *testing.T) bool {
	srv, path := daemon(t, "unix", c.socket)
	a := startApp(t, alice, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir := images(t)
	acted := make(chan error, 1)
	r := during(func() Result { return a.TryDump(t, dir) }, func(done <-chan struct{}) {
		acted <- whileDumping(dir, done, func() error { return c.do(srv) })
	})
	err := <-acted
	if errors.Is(err, errDumped) && r.Code == 0 {
		a.Dumped(t, dir)
		return false
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, r.tail())
	}
	r.wantMessage(t, c.says, path)
	if c.refused {
		r.refused(t, dir, "refuses busy connections")
		a.Awake(t)
		if c.says == "the peer answered while CRIU dumped" {
			if got := a.Do(t, app.Command{Op: "read", Conn: "c"}).Text; got != "late\n" {
				t.Errorf("the application reads %q", got)
			}
			a.Request(t, "c")
		}
		nothingLeft(t)
		return true
	}
	r.want(t, "dump", 0)
	a.Dumped(t, dir)
	wantHangup(t, dir, c.says)
	a.Restore(t, dir)
	// CRIU may have dumped the queue before or after the answer came.
	if got := a.Do(t, app.Command{Op: "read", Conn: "c"}).Text; got != "" && (got != "late\n" || strings.Contains(c.name, "closes")) {
		t.Errorf("the application reads %q", got)
	}
	a.wantHungUp(t, "c")
	nothingLeft(t)
	return true
}

// errDumped: there was no time to do something while CRIU dumped.
var errDumped = errors.New("the dump is over")

// whileDumping holds CRIU once the plan of its dump is made, and does something.
func whileDumping(dir string, done <-chan struct{}, act func() error) error {
	plan := filepath.Join(dir, image.PlanName)
	// A tracer of ours has plans written before it lets go of CRIU, and would not
	// let CRIU stop.
	traced := func(pid int) bool { return interpose.TracerOf(pid) != 0 }
	for {
		if _, err := os.Stat(plan); err == nil && !slices.ContainsFunc(running("criu"), traced) {
			break
		}
		select {
		case <-done:
			return fmt.Errorf("%w: there is no %s", errDumped, plan)
		default:
		}
	}
	for _, pid := range running("criu") {
		_ = unix.Kill(pid, unix.SIGSTOP) // one may have ended
		defer func() { _ = unix.Kill(pid, unix.SIGCONT) }()
		awaitStopped(pid)
	}
	if log := contentsOf(filepath.Join(dir, "dump.log")); strings.Contains(log, "Running post-dump scripts") {
		return fmt.Errorf("%w: CRIU has come to post-dump", errDumped)
	}
	return act()
}

// Threads that work all the time find, after a restore, either a connection
// that works or one that is closed. None hangs, none gets a wrong answer.
func TestRestoreUnderLoad(t *testing.T) {
	ways(t, func(t *testing.T) {
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
	})
}
