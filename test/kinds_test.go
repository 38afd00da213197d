// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// wantClients checks how many connections the daemon has had since first, once it
// has accepted as many, and that all of them are open.
func wantClients(t testing.TB, s *echo.Server, first, n int) {
	t.Helper()
	await(t, s, fmt.Sprintf("%d connections", first+n), func(c []echo.Client) bool { return len(c) >= first+n })
	c := s.Clients()[first:]
	if len(c) != n || echo.Open(c) != n {
		t.Errorf("the daemon saw %d new connections, %d of them open; expected %d: %+v", len(c), echo.Open(c), n, c)
	}
}

func TestOneConnectionUnderTwoFDs(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Do(t, app.Command{Op: "dup", Conn: "c", As: "d"})
		a.roundTrip(t, "c", "d")
		a.Request(t, "c")
		a.Request(t, "d")
		if c, d := a.Details(t, "c"), a.Details(t, "d"); c.Inode != d.Inode {
			t.Errorf("two fds had one description, now they have sockets %d and %d", c.Inode, d.Inode)
		}
		wantClients(t, srv, 1, 1)
		nothingLeft(t)
	})
}

func TestOneConnectionOfTwoProcesses(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, u, nil)
			a.connect(t, "c", path)
			child := a.Child(t, "c")
			dir := a.Dump(t)
			wantRecorded(t, dir, 1)
			a.RestoreStock(t, dir)
			child.Awake(t)
			a.wantDead(t, "c")
			child.wantDead(t, "c")
			a.Kill(t)
			a.Restore(t, dir)
			for range 2 {
				a.Request(t, "c")
				child.Request(t, "c")
			}
			if c, d := a.Details(t, "c"), child.Details(t, "c"); c.Inode != d.Inode {
				t.Errorf("parent and child had one socket, now they have %d and %d", c.Inode, d.Inode)
			}
			wantClients(t, srv, 1, 1)
			nothingLeft(t)
		}
	})
}

func TestManyThreads(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		const threads = 64
		a.Do(t, app.Command{Op: "threads", Threads: threads})
		eventually(t, "the threads are there", func() bool { return a.Do(t, app.Command{Op: "stats"}).Count.Threads >= threads })
		a.connect(t, "c", path)
		a.roundTrip(t, "c")
		a.Request(t, "c")
		if n := a.Do(t, app.Command{Op: "stats"}).Count.Threads; n < threads {
			t.Errorf("%d threads after the restore, %d were made", n, threads)
		}
		wantClients(t, srv, 1, 1)
		nothingLeft(t)
	})
}

func TestManyConnections(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		const n = 200
		var names []string
		for i := range n {
			names = append(names, fmt.Sprint("c", i))
			a.connect(t, names[i], path)
		}
		wantRecorded(t, a.roundTrip(t, names...), n)
		for _, c := range names {
			a.Request(t, c)
		}
		wantClients(t, srv, n, n)
		nothingLeft(t)
	})
}

func TestSeqpacket(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unixpacket", "reconnect")
		a := startApp(t, alice, nil)
		a.connectType(t, "c", path, unix.SOCK_SEQPACKET)
		a.Request(t, "c")
		before := a.Details(t, "c")
		a.roundTrip(t, "c")
		a.Request(t, "c")
		a.wantDetails(t, "seqpacket", "c", before)
		wantClients(t, srv, 1, 1)
		nothingLeft(t)
	})
}

// TestOddNames: what a name may hold, by the kernel's leave. Abstract names
// are written with @.
func TestOddNames(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, c := range []struct{ name, file string }{
			{"spaces", "reconnect with spaces "},
			{"newline", "reconnect\nnewline"},
			{"quotes", "reconnect\"double\" 'single' `back`"},
			{"not UTF-8", "reconnect\xff\xfe\x80"},
			{"control bytes", "reconnect\x01\x1b[31m\x7f"},
			{"glob", "reconnect*?[a-z]\\"},
			{"UTF-8", "reconnect-é-世界"},
			{"longest", "reconnect" + strings.Repeat("x", 107)},
			{"abstract", "@criuhook-test-plain"},
			{"abstract with spaces", "@criuhook-test- a b "},
			{"abstract with NULs", "@criuhook-test-\x00a\x00\x00b"},
			{"abstract ending in NUL", "@criuhook-test-end\x00"},
			{"abstract, not UTF-8", "@criuhook-test-\xff\n\""},
			{"abstract, longest", "@criuhook-test-" + strings.Repeat("y", 107-15)},
		} {
			t.Run(c.name, func(t *testing.T) {
				name := c.file
				if name[0] != '@' {
					const most = 107 // sun_path with its NUL
					name = filepath.Join(folder(t), name)
					name = name[:min(len(name), most)]
				}
				srv := daemonAt(t, "unix", name)
				a := startApp(t, alice, nil)
				a.connect(t, "c", name)
				a.roundTrip(t, "c")
				a.Request(t, "c")
				wantClients(t, srv, 1, 1)
			})
		}
		nothingLeft(t)
	})
}

// datagrams is a daemon that receives.
func datagrams(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	return l
}

// wantDatagram sends a datagram and expects it at the daemon.
func (a *App) wantDatagram(t testing.TB, conn string, l *net.UnixConn) {
	t.Helper()
	const text = "a message"
	a.Do(t, app.Command{Op: "send", Conn: conn, Text: text})
	b := make([]byte, 100)
	if err := l.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, err := l.Read(b)
	if err != nil || string(b[:n]) != text {
		t.Errorf("the daemon got %q, %v; expected %q", b[:n], err, text)
	}
}

func TestDatagram(t *testing.T) {
	ways(t, func(t *testing.T) {
		path := filepath.Join(folder(t), "reconnect")
		l := datagrams(t, path)
		a := startApp(t, alice, nil)
		a.connectType(t, "c", path, unix.SOCK_DGRAM)
		a.wantDatagram(t, "c", l)
		before := a.Details(t, "c")

		dir := a.Dump(t)
		a.RestoreStock(t, dir)
		a.Awake(t)
		if _, err := a.Try(app.Command{Op: "send", Conn: "c", Text: "x"}); err == nil || err.Error() != unix.ENOTCONN.Error() {
			t.Errorf("send after a restore with stock CRIU: %v, expected ENOTCONN", err)
		}
		a.Kill(t)
		a.Restore(t, dir)
		a.Awake(t)
		a.wantDetails(t, "datagram", "c", before)
		a.wantDatagram(t, "c", l)
		a.Kill(t)

		// A new daemon, as after a restart of syslog.
		l.Close()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		l = datagrams(t, path)
		a.Restore(t, dir)
		a.Awake(t)
		a.wantDatagram(t, "c", l)
		nothingLeft(t)
	})
}

// TestInside: connections within the tree are CRIU's.
func TestInside(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			a := startApp(t, u, nil)
			a.pair(t)
			child := a.Child(t, "one end")
			a.connect(t, "to the child", child.Control)
			both := func() {
				t.Helper()
				const text = "from the child\n"
				child.Do(t, app.Command{Op: "write", Conn: "one end", Text: text})
				if got := a.Do(t, app.Command{Op: "read", Conn: "other end"}).Text; got != text {
					t.Errorf("the parent read %q from its child, expected %q", got, text)
				}
				a.usePair(t)
			}
			both()
			dir := a.Dump(t)
			wantRecorded(t, dir, 0)
			a.RestoreStock(t, dir)
			child.Awake(t)
			both()
			a.Kill(t)
			a.Restore(t, dir)
			child.Awake(t)
			both()
			// A listener of the child's, accepted there, asked by the parent.
			a.Do(t, app.Command{Op: "write", Conn: "to the child", Text: `{"Op":"ping"}` + "\n"})
			if got := a.Do(t, app.Command{Op: "read", Conn: "to the child"}).Text; !strings.HasPrefix(got, "{") {
				t.Errorf("the child answered %q", got)
			}
			nothingLeft(t)
		}
	})
}

// TestPeerClosed: what was dead before the dump comes back as it was, with
// what had come before the end.
func TestPeerClosed(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "refuse") // no rule has a say
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		const text = "an answer nobody has read yet\n"
		a.Do(t, app.Command{Op: "write", Conn: "c", Text: text})
		await(t, srv, "the request", func(c []echo.Client) bool { return len(c) == 1 && c[0].Requests == 1 })
		srv.Close()
		a.connectClosed(t, "empty", "reconnect")
		dir := a.Dump(t)
		wantRecorded(t, dir, 0)
		for _, restore := range []func(){
			func() { a.RestoreStock(t, dir) },
			func() { a.Restore(t, dir) },
		} {
			restore()
			a.Awake(t)
			if got := a.Do(t, app.Command{Op: "read", Conn: "c"}).Text; got != text {
				t.Errorf("read %q, expected %q", got, text)
			}
			a.wantHungUp(t, "c", "empty")
			a.Kill(t)
		}
		nothingLeft(t)
	})
}

// connectClosed makes a connection whose peer has gone.
func (a *App) connectClosed(t testing.TB, conn, name string) {
	t.Helper()
	srv, path := daemon(t, "unix", name)
	a.connect(t, conn, path)
	a.Request(t, conn)
	srv.Close()
}

func TestNoConnections(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			a := startApp(t, u, nil)
			dir := a.Dump(t)
			wantRecorded(t, dir, 0)
			a.RestoreStock(t, dir)
			a.Awake(t)
			a.Kill(t)
			a.Restore(t, dir)
			a.Awake(t)
			nothingLeft(t)
		}
	})
}

// TestMixed: every kind at once in one process and its child.
func TestMixed(t *testing.T) {
	ways(t, func(t *testing.T) {
		stream, streamPath := daemon(t, "unix", "reconnect")
		packets, packetsPath := daemon(t, "unixpacket", "reconnect-packets")
		_, hangupPath := daemon(t, "unix", "hangup")
		const abstractName = "@criuhook-test-mixed"
		abstract := daemonAt(t, "unix", abstractName)
		logPath := filepath.Join(folder(t), "reconnect-log")
		log := datagrams(t, logPath)
		waiting := rawListener(t, "reconnect-waiting", 8)

		a := startApp(t, alice, nil)
		for _, c := range []string{"s1", "s2", "s3"} {
			a.connect(t, c, streamPath)
		}
		a.Do(t, app.Command{Op: "dup", Conn: "s3", As: "s3 again"})
		a.connectType(t, "p", packetsPath, unix.SOCK_SEQPACKET)
		a.connect(t, "h", hangupPath)
		a.connect(t, "a", abstractName)
		a.connectType(t, "log", logPath, unix.SOCK_DGRAM)
		a.connect(t, "w", waiting.path)
		a.connectClosed(t, "gone", "reconnect-gone")
		a.pair(t)
		child := a.Child(t, "s1")
		for _, c := range []string{"s1", "s2", "s3", "p", "h", "a"} {
			a.Request(t, c)
		}
		a.wantDatagram(t, "log", log)

		dir := a.roundTrip(t, "s1", "s2", "s3", "s3 again", "p", "h", "a", "w", "gone")
		wantRecorded(t, dir, 8)
		for _, c := range []string{"s1", "s2", "s3", "s3 again", "p", "a"} {
			a.Request(t, c)
		}
		child.Request(t, "s1")
		a.wantDatagram(t, "log", log)
		a.wantHungUp(t, "h", "w", "gone")
		a.usePair(t)
		wantClients(t, stream, 3, 3)
		wantClients(t, packets, 1, 1)
		wantClients(t, abstract, 1, 1)
		nothingLeft(t)
	})
}
