// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/sockpeer"
	"criuhook/test/lwmsg"
)

// recovers checks that a client that finds its connection hung up has a clean
// error at the most, and that the request after it is served.
func (c *lwClient) recovers(t testing.TB, d *lwmsg.Daemon) {
	t.Helper()
	op := "lookup"
	if c.handled() {
		op = "next"
	}
	if c.kind == lwmsg.KindAssoc {
		c.fails(t, op, "PEER_CLOSE")
	}
	if c.handled() {
		c.fails(t, op, "INVALID_HANDLE")
	}
	c.use(t)
	wantSlots(t, d, 1)
}

// TestLwmsgHangup: the sockets whose clients hold handles, and older Likewise.
func TestLwmsgHangup(t *testing.T) {
	for _, path := range []string{
		pbisDir + ".lwsm", pbisDir + ".regsd", pbisDir + ".lwiod", pbisDir + ".ntlmd", pbisDir + ".lwsc",
		likewiseDir + ".lsassd", "/var/lib/likewise-open/.lsassd",
	} {
		t.Run(strings.ReplaceAll(path[1:], "/", " "), func(t *testing.T) {
			eachClient(t, alice, path, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
				dir := c.Dump(t)
				wantAction(t, dir, proto.Action_ACTION_HANGUP)
				wantSlots(t, d, 0)
				c.Restore(t, dir)
				c.rest(t)
				c.recovers(t, d)
				c.wantLastIdentity(t, d, 2)
				if c.handled() {
					c.saw(t, d, lwHungUp, lwHandle, 2)
				} else {
					c.saw(t, d, lwHungUp, "idle", 2)
				}
			})
		})
	}
}

// wantLastIdentity checks the session that the client has made itself.
func (c *lwClient) wantLastIdentity(t testing.TB, d *lwmsg.Daemon, n int) {
	t.Helper()
	s := d.State().Sessions
	if len(s) != n || s[n-1].UID != c.User.UID || int(s[n-1].PID) != c.PID {
		t.Errorf("the daemon saw %+v, expected %d sessions, the last of uid %d, process %d", s, n, c.User.UID, c.PID)
	}
}

// busyWith waits until a call of the client is under way for good: the daemon
// has it, and the client waits.
func (c *lwClient) busyWith(t testing.TB, d *lwmsg.Daemon, op string) {
	t.Helper()
	d.Hold()
	if _, err := c.try(lwmsg.Command{Op: "background", Text: op}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon holds the answer back", func() bool { return d.State().Holding == 1 })
	c.waits(t)
}

// waits waits until the client waits for an answer on its only connection.
func (c *lwClient) waits(t testing.TB) {
	t.Helper()
	eventually(t, "the client waits for the answer", func() bool {
		snap, err := sockpeer.Scan(c.PID)
		return err == nil && len(snap.Connections) == 1 && len(snap.Connections[0].Waiters) == 1
	})
}

func TestLwmsgMidCall(t *testing.T) {
	for _, path := range []string{lsassd, pbisDir + ".eventlog", pbisDir + ".regsd", likewiseDir + ".lsassd"} {
		t.Run(strings.ReplaceAll(path[1:], "/", " "), func(t *testing.T) {
			eachClient(t, alice, path, false, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
				op := "lookup"
				if c.handled() {
					op = "next"
				}
				c.busyWith(t, d, op)
				dir := c.Dump(t)
				wantHangup(t, dir, "waits in ")
				c.Restore(t, dir)
				restored := time.Now()
				// The daemon still holds the answer to the old connection.
				var ended []string
				eventually(t, "the call has failed", func() bool {
					ended = c.do(t, "state").Client.Ended
					return len(ended) == 1
				})
				t.Logf("the call failed %v after the restore", time.Since(restored))
				if !slices.Equal(ended, []string{"PEER_CLOSE"}) {
					t.Errorf("the call ended with %q, expected PEER_CLOSE", ended)
				}
				took := time.Since(restored)
				d.Release()
				c.use(t)
				wantSlots(t, d, 1)
				c.wantLastIdentity(t, d, 2)
				c.failed, c.longest = c.failed+1, max(c.longest, took)
				c.saw(t, d, lwHungUp, "busy", 2)
			})
		})
	}
}

// TestLwmsgEnumeration: a client of lsassd in the middle of an enumeration holds
// a handle, which nothing outside can know. It is reconnected like any other,
// and the daemon never answers to a handle that the new session does not know:
// that call, and all of an assoc client, waits until the daemon restarts. For
// programs that are dumped while they enumerate, a rule has to say hangup.
func TestLwmsgEnumeration(t *testing.T) {
	eachClient(t, alice, lsassd, false, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		enumerating := func(want proto.Action) {
			t.Helper()
			c.do(t, "open")
			c.do(t, "next")
			if c.kind == lwmsg.KindPeer {
				c.do(t, "work")
			}
			dir := c.Dump(t)
			wantAction(t, dir, want)
			c.Restore(t, dir)
			c.rest(t)
		}
		enumerating(proto.Action_ACTION_RECONNECT)
		if _, err := c.try(lwmsg.Command{Op: "background", Text: "next"}); err != nil {
			t.Fatal(err)
		}
		c.neverAnswered(t, d)
		d.Close()
		eventually(t, "the end of the daemon ends the call", func() bool {
			return slices.Equal(c.do(t, "state").Client.Ended, []string{"PEER_CLOSE"})
		})

		d = lwmsgDaemon(t, lsassd)
		install(t, "rules:\n  - {name: t-enumerates, path: "+lsassd+", type: stream, idle: hangup}\n")
		enumerating(proto.Action_ACTION_HANGUP)
		if c.kind == lwmsg.KindAssoc {
			c.fails(t, "next", "PEER_CLOSE")
		}
		c.fails(t, "next", "INVALID_HANDLE")
		c.do(t, "open")
		c.do(t, "next")
		c.do(t, "close")
		wantSlots(t, d, 1)
	})
}

// neverAnswered checks that the client waits for an answer that the daemon will
// never give. A client with epoll has other calls served meanwhile.
func (c *lwClient) neverAnswered(t testing.TB, d *lwmsg.Daemon) {
	t.Helper()
	eventually(t, "the daemon got a call with a handle it does not know", func() bool { return d.State().Unanswered == 1 })
	c.waits(t)
	switch {
	case c.kind == lwmsg.KindAssoc:
		c.fails(t, "lookup", "the only thread is in a call")
	case c.handled():
		c.do(t, "open")
	default:
		c.do(t, "lookup")
	}
	if s := c.do(t, "state").Client; s.Pending != 1 {
		t.Errorf("%d calls wait, expected 1: %+v", s.Pending, s)
	}
	c.failed, c.longest = 1, lwForEver
	c.saw(t, d, lwGreeted, lwHandle, 2)
}

func TestLwmsgDaemonRestarted(t *testing.T) {
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		dir := c.Dump(t)
		d.Close()
		d = lwmsgDaemon(t, lsassd)
		c.Restore(t, dir)
		c.rest(t)
		c.firstLookup(t)
		c.lookups(t)
		wantSlots(t, d, 1)
		if s := d.State().Sessions; len(s) != 1 || s[0].UID != alice.UID {
			t.Errorf("the new daemon saw %+v, expected one session of uid %d", s, alice.UID)
		}
	})
}

// impatient is the built-in rule for lsassd, but for the time it takes to give up.
const impatient = `
rules:
  - {name: impatient, path: ` + lsassd + `, idle: reconnect, prelude: lwmsg, timeout: 500ms}
`

func TestLwmsgDaemonAbsent(t *testing.T) {
	need(t)
	install(t, impatient)
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		dir := c.Dump(t)
		d.Close()
		c.Restore(t, dir).wantMessage(t, lsassd, "hung up, as its rule says")
		c.rest(t)
		if c.kind == lwmsg.KindAssoc {
			c.fails(t, "lookup", "PEER_CLOSE")
		}
		c.fails(t, "lookup", "FILE_NOT_FOUND")
		d = lwmsgDaemon(t, lsassd)
		c.lookups(t)
		wantSlots(t, d, 1)
	})
}

// TestLwmsgSilent: no greeting by the daemon, or no slot for us at all. Nothing
// of ours stays behind in one.
func TestLwmsgSilent(t *testing.T) {
	need(t)
	install(t, impatient)
	for _, full := range []bool{false, true} {
		t.Run(fmt.Sprintf("full %v", full), func(t *testing.T) {
			eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
				dir := c.Dump(t)
				wantSlots(t, d, 0)
				var others []net.Conn
				if full {
					for range lwmsg.Slots {
						conn, err := net.Dial("unix", lsassd)
						if err != nil {
							t.Fatal(err)
						}
						defer conn.Close()
						others = append(others, conn)
					}
					wantSlots(t, d, lwmsg.Slots)
				}
				d.Be(lwmsg.Manners{Silent: !full})
				c.Restore(t, dir).wantMessage(t, lsassd, "read the greeting", "hung up, as its rule says")
				wantSlots(t, d, len(others))
				for _, conn := range others {
					conn.Close()
				}
				wantSlots(t, d, 0)
				d.Be(lwmsg.Manners{})
				c.rest(t)
				c.recovers(t, d)
			})
		})
	}
}

func TestLwmsgBadAccept(t *testing.T) {
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		dir := c.Dump(t)
		for name, b := range lwmsg.BadAccepts() {
			t.Run(name, func(t *testing.T) {
				d.Be(lwmsg.Manners{Accept: b, Hangup: name == "half of one"})
				r := c.Restore(t, dir)
				defer c.Kill(t)
				r.wantMessage(t, "greet the daemon at "+lsassd, "hung up, as its rule says")
				wantSlots(t, d, 0)
				d.Be(lwmsg.Manners{})
				c.rest(t)
				c.recovers(t, d)
			})
		}
	})
}

// TestLwmsgReadsNoMore: the prelude takes its own accept packet and leaves what
// follows, here a second one, which shows that an accept packet left unread
// would break the client.
func TestLwmsgReadsNoMore(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := lwmsgDaemon(t, lsassd)
		c := startLwmsg(t, alice, lwmsg.KindAssoc, lsassd)
		c.do(t, "lookup")
		dir := c.Dump(t)
		d.Be(lwmsg.Manners{Accept: append(lwmsg.Accept(), lwmsg.Accept()...)})
		c.Restore(t, dir)
		c.fails(t, "lookup", "MALFORMED")
		for range 3 {
			c.fails(t, "lookup", "BUSY")
		}
		nothingLeft(t)
	})
}

// TestLwmsgRestoredTwice: the same images again, after the first one has gone.
func TestLwmsgRestoredTwice(t *testing.T) {
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		dir := c.Dump(t, "--leave-running")
		rec, err := image.ReadRecord(dir)
		if err != nil || len(rec.Connections) != 1 {
			t.Fatalf("the record: %v, %v", rec, err)
		}
		wantSlots(t, d, 1)
		c.rest(t)
		c.lookups(t)
		c.wantLastIdentity(t, d, 1)
		for n := 2; n <= 3; n++ {
			c.Kill(t)
			wantSlots(t, d, 0)
			c.Restore(t, dir)
			c.rest(t)
			c.lookups(t)
			c.wantSessions(t, d, n)
			wantSlots(t, d, 1)
		}
	})
}
