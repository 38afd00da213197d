// SPDX-License-Identifier: Apache-2.0

package test

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// connect opens a stream connection.
func (a *App) connect(t testing.TB, conn, to string) {
	t.Helper()
	a.connectType(t, conn, to, unix.SOCK_STREAM)
}

// connectType makes a connection. An echo daemon has accepted it then: a connection
// that it has not is busy.
func (a *App) connectType(t testing.TB, conn, to string, typ int) {
	t.Helper()
	s, n := (*echo.Server)(nil), 0
	if v, ok := echoes.Load(to); ok {
		s = v.(*echo.Server)
		n = len(s.Clients())
	}
	a.Do(t, app.Command{Op: "open", Conn: conn, ToBytes: []byte(to), Type: typ})
	if s != nil {
		await(t, s, "the connection", func(c []echo.Client) bool { return len(c) > n })
	}
}

// dead are the errors by which a dead connection tells.
var dead = []string{unix.ENOTCONN.Error(), unix.EPIPE.Error(), "EOF"}

// wantDead checks that connections fail at once, and do not hang: Try has a
// deadline.
func (a *App) wantDead(t testing.TB, conns ...string) {
	t.Helper()
	for _, c := range conns {
		_, err := a.Try(app.Command{Op: "request", Conn: c})
		if err == nil || !slices.Contains(dead, err.Error()) {
			t.Errorf("a request on connection %s, which should be dead: %v", c, err)
		}
	}
}

// wantHungUp checks that reading gives EOF, and writing EPIPE.
func (a *App) wantHungUp(t testing.TB, conns ...string) {
	t.Helper()
	for _, c := range conns {
		if ans, err := a.Try(app.Command{Op: "read", Conn: c}); err != nil || ans.Text != "" {
			t.Errorf("read from connection %s, which should be hung up: %q, %v; expected EOF", c, ans.Text, err)
		}
		if _, err := a.Try(app.Command{Op: "write", Conn: c, Text: "x\n"}); err == nil || err.Error() != unix.EPIPE.Error() {
			t.Errorf("write to connection %s, which should be hung up: %v; expected EPIPE", c, err)
		}
	}
}

// pair makes a connection inside of the application, and usePair uses it: work
// that must go on whatever becomes of the other connections.
func (a *App) pair(t testing.TB) {
	t.Helper()
	a.Do(t, app.Command{Op: "pair", Conn: "one end", As: "other end", Type: unix.SOCK_STREAM})
	a.usePair(t)
}

func (a *App) usePair(t testing.TB) {
	t.Helper()
	for _, ends := range [][2]string{{"one end", "other end"}, {"other end", "one end"}} {
		const text = "inside\n"
		a.Do(t, app.Command{Op: "write", Conn: ends[0], Text: text})
		if got := a.Do(t, app.Command{Op: "read", Conn: ends[1]}).Text; got != text {
			t.Errorf("%q came through a connection inside of the application, expected %q", got, text)
		}
	}
}

// roundTrip dumps the application, restores the images with stock CRIU alone,
// where the connections must be dead and all else go on, kills it and restores
// the same images with the script.
func (a *App) roundTrip(t testing.TB, conns ...string) (dir string) {
	t.Helper()
	return a.roundTripOf(t, a.Dump(t), conns...)
}

// roundTripOf is roundTrip of a dump that has been made.
func (a *App) roundTripOf(t testing.TB, dir string, conns ...string) string {
	t.Helper()
	a.RestoreStock(t, dir)
	a.Awake(t)
	a.wantDead(t, conns...)
	a.Kill(t)
	a.Restore(t, dir)
	a.Awake(t)
	return dir
}

// await waits until ok is true of the daemon's connections.
func await(t testing.TB, s *echo.Server, what string, ok func([]echo.Client) bool) {
	t.Helper()
	if err := s.Await(what, ok); err != nil {
		t.Fatal(err)
	}
}

// wantRecorded checks how many connections the record of a dump holds.
func wantRecorded(t testing.TB, dir string, n int) {
	t.Helper()
	rec, err := image.ReadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(rec.Connections) != n {
		t.Errorf("the record holds %d connections, expected %d: %v", len(rec.Connections), n, rec.Connections)
	}
}

// TestStockRestoresEveryForm: one image, every form a connection can have in it, and
// stock CRIU, which is told nothing.
func TestStockRestoresEveryForm(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			_, dormant := daemon(t, "unix", "reconnect")
			_, hangup := daemon(t, "unix", "hangup")
			_, packets := daemon(t, "unixpacket", "hangup-packets")
			gone, gonePath := daemon(t, "unix", "reconnect-gone")
			waiting := rawListener(t, "reconnect-waiting", 8)
			a := startApp(t, u, nil)
			a.connect(t, "dormant", dormant)
			a.connect(t, "dead", hangup)
			a.connectType(t, "packets", packets, unix.SOCK_SEQPACKET)
			a.connect(t, "gone", gonePath)
			a.connect(t, "waiting", waiting.path)
			a.pair(t)
			for _, c := range []string{"dormant", "dead", "packets", "gone"} {
				a.Request(t, c)
			}
			gone.Close()

			dir := a.Dump(t)
			wantRecorded(t, dir, 4)
			for range 2 {
				a.RestoreStock(t, dir)
				a.Awake(t)
				a.wantHungUp(t, "dead", "packets", "gone", "waiting")
				a.wantDead(t, "dormant", "dead", "packets", "gone", "waiting")
				a.usePair(t)
				a.Kill(t)
			}
			nothingLeft(t)
		}
	})
}

// TestStockLeavesTheRestAlone: a connection that is dead does not keep other
// threads from their work, nor the application from connecting anew.
func TestStockLeavesTheRestAlone(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.Do(t, app.Command{Op: "threads", Threads: 8})
		a.connect(t, "c0", path)
		a.connect(t, "held", path)
		a.Request(t, "c0")
		dir := a.Dump(t)
		a.RestoreStock(t, dir)
		a.Awake(t)
		a.wantDead(t, "c0", "held")
		a.connect(t, "c0", path) // as a client does that finds its connection dead
		a.Do(t, app.Command{Op: "hammer", Conn: "c", Threads: 1})
		a.wantDead(t, "held")
		eventually(t, "a hundred requests", func() bool { return a.Do(t, app.Command{Op: "stats"}).Count.Requests > 100 })
		if n := a.Do(t, app.Command{Op: "rest"}).Count; n.Failed != 0 {
			t.Errorf("%d of %d requests failed: %s", n.Failed, n.Requests, n.LastErr)
		}
		await(t, srv, "no connection but the one that the application made", func(c []echo.Client) bool { return echo.Open(c) == 1 })
		if strings.Contains(a.Details(t, "held").PeerName, "/") {
			t.Errorf("the dead connection has a peer: %+v", a.Details(t, "held"))
		}
		nothingLeft(t)
	})
}
