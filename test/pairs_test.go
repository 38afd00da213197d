// SPDX-License-Identifier: Apache-2.0

package test

import (
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// TestPairs: any way restores what any way has dumped, and so does stock CRIU
// (Dumped). The names say: dumped by, restored by.
func TestPairs(t *testing.T) {
	ways(t, func(t *testing.T) {
		stream, streamPath := daemon(t, "unix", "reconnect")
		packets, packetsPath := daemon(t, "unixpacket", "reconnect-packets")
		hangup, hangupPath := daemon(t, "unix", "hangup")
		logPath := filepath.Join(folder(t), "reconnect-log")
		log := datagrams(t, logPath)

		a := startApp(t, alice, nil)
		a.connect(t, "s", streamPath)
		a.Do(t, app.Command{Op: "nonblock", Conn: "s"})
		a.Do(t, app.Command{Op: "dup", Conn: "s", As: "s again"})
		a.connectType(t, "p", packetsPath, unix.SOCK_SEQPACKET)
		a.connect(t, "h", hangupPath)
		a.connectType(t, "d", logPath, unix.SOCK_DGRAM)
		a.pair(t)
		works := []string{"s", "s again", "p"}
		before := map[string]app.Details{"d": a.Details(t, "d")}
		for _, c := range append(works, "h") {
			a.Request(t, c)
			before[c] = a.Details(t, c)
		}
		a.wantDatagram(t, "d", log)
		dir := a.Dump(t)
		wantRecorded(t, dir, 4)

		for _, w := range []way{byScript, byRPC, byDropin, bySwrk} {
			t.Run(w.String(), func(t *testing.T) {
				a.restoreBy = w
				streams, seqpackets := len(stream.Clients()), len(packets.Clients())
				a.Restore(t, dir)
				a.Awake(t)
				for _, c := range slices.Concat(works, []string{"d"}) {
					a.wantDetails(t, c, c, before[c])
				}
				for _, c := range works {
					a.Request(t, c)
				}
				a.wantDatagram(t, "d", log)
				a.wantHungUp(t, "h")
				a.usePair(t)
				wantClients(t, stream, streams, 1)
				wantClients(t, packets, seqpackets, 1)
				wantClients(t, hangup, 1, 0)
				nothingLeft(t)
				a.Kill(t)
				for _, srv := range []*echo.Server{stream, packets} {
					await(t, srv, "EOF", func(c []echo.Client) bool { return echo.Open(c) == 0 })
				}
			})
		}
	})
}

// TestPeerPID: the daemon sees the same client as before, its pid too. Of the
// ways that make the connection before the application is there; the action
// script cannot choose who it is seen as.
func TestPeerPID(t *testing.T) {
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) {
		for _, u := range []User{root, alice} {
			for _, network := range []string{"unix", "unixpacket"} {
				typ := map[string]int{"unix": unix.SOCK_STREAM, "unixpacket": unix.SOCK_SEQPACKET}[network]
				srv, path := daemon(t, network, "reconnect")
				a := startApp(t, u, nil)
				a.connectType(t, "own", path, typ)
				a.connectType(t, "shared", path, typ)
				child := a.Child(t, "shared")
				child.connectType(t, "child's", path, typ)
				// seen are the clients behind the connections, in this order, by
				// the requests of each.
				seen := func(first int) (out []echo.Client) {
					t.Helper()
					await(t, srv, "three clients", func(now []echo.Client) bool { return len(now) == first+3 })
					for _, c := range []struct {
						app  *App
						conn string
					}{{a, "own"}, {a, "shared"}, {child, "child's"}} {
						used := srv.Clients()[first:]
						c.app.Request(t, c.conn)
						await(t, srv, "the request", func(now []echo.Client) bool {
							return requests(now[first:]) == requests(used)+1
						})
						for i, n := range srv.Clients()[first:] {
							if n.Requests != used[i].Requests {
								n.Requests = 0
								out = append(out, n)
							}
						}
					}
					return out
				}
				before := seen(0)
				if int(before[0].PID) != a.PID {
					t.Fatalf("the daemon saw %+v before the dump, expected process %d", before, a.PID)
				}
				dir := a.Dump(t)
				first := len(srv.Clients())
				a.Restore(t, dir)
				a.Awake(t)
				child.Awake(t)
				after := seen(first)
				for i := range before {
					if b, c := before[i], after[i]; c.PID != b.PID || c.UID != b.UID || c.GID != b.GID || !slices.Equal(c.Groups, b.Groups) {
						t.Errorf("uid %d, %s, connection %d: the daemon sees %+v, before the dump %+v", u.UID, network, i, c, b)
					}
				}
				nothingLeft(t)
			}
		}
	})
}

// requests counts those of all clients.
func requests(cs []echo.Client) (n int) {
	for _, c := range cs {
		n += c.Requests
	}
	return n
}
