// SPDX-License-Identifier: Apache-2.0

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/test/lwmsg"
)

// The daemon and the clients of these tests are fakes: PBIS is in no package
// registry. See package lwmsg for what of them is real. The rules are the
// built-in ones, for the paths of the real daemons, which exist in the sandbox
// only.
const (
	pbisDir     = "/var/lib/pbis/"
	likewiseDir = "/var/lib/likewise/"
	lsassd      = pbisDir + ".lsassd"
)

var kinds = []string{lwmsg.KindAssoc, lwmsg.KindPeer}

// lwmsgDaemon starts a fake daemon. What a client has done wrong, and the test
// has not asked for, fails the test.
func lwmsgDaemon(t testing.TB, path string) *lwmsg.Daemon {
	t.Helper()
	d, err := lwmsg.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Close()
		if v := d.Violations(); len(v) != 0 {
			t.Errorf("%s: clients did wrong: %q", path, v)
		}
	})
	return d
}

// lwClient is a process that is a client of a fake daemon.
type lwClient struct {
	*Process
	kind, path, control string
	fdsBefore           int
	// Of the calls since the last restore.
	failed  int
	longest time.Duration
}

func startLwmsg(t testing.TB, u User, kind, path string) *lwClient {
	t.Helper()
	c := &lwClient{kind: kind, path: path, control: filepath.Join(folder(t), "control")}
	c.Process = start(t, u, nil, "/proc/self/exe", lwmsg.Role, kind, path, c.control)
	c.alive = c.awake
	c.awake(t)
	return c
}

func (c *lwClient) awake(t testing.TB) {
	t.Helper()
	eventually(t, fmt.Sprintf("the %s client, process %d, answers", c.kind, c.PID), func() bool {
		_, err := c.try(lwmsg.Command{Op: "ping"})
		return err == nil
	})
}

func (c *lwClient) try(cmd lwmsg.Command) (lwmsg.Answer, error) {
	var ans lwmsg.Answer
	conn, err := net.Dial("unix", c.control)
	if err != nil {
		return ans, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return ans, err
	}
	if err := json.NewEncoder(conn).Encode(cmd); err != nil {
		return ans, err
	}
	if err := json.NewDecoder(conn).Decode(&ans); err != nil {
		return ans, fmt.Errorf("%s: no answer: %w", cmd.Op, err)
	}
	if ans.Err != "" {
		err = errors.New(ans.Err)
	}
	switch cmd.Op {
	case "lookup", "open", "next", "close":
		c.longest = max(c.longest, ans.Took)
		if err != nil {
			c.failed++
		}
	}
	return ans, err
}

// Restore restores, and counts from there.
func (c *lwClient) Restore(t testing.TB, dir string) Result {
	t.Helper()
	c.failed, c.longest = 0, 0
	return c.Process.Restore(t, dir)
}

// Policies and states of observations.
const (
	lwGreeted   = "reconnect, prelude lwmsg"
	lwUngreeted = "reconnect, no prelude"
	lwHungUp    = "hangup"
	lwWaits     = "idle, a thread in epoll"
	lwHandle    = "idle, holds a handle"
	lwForEver   = 1000 * time.Hour
)

// saw notes what became of the calls since the restore. sessions is how many
// the daemon has to have had for the last one to be the restored client's.
func (c *lwClient) saw(t testing.TB, d *lwmsg.Daemon, policy, state string, sessions int) {
	t.Helper()
	o := Observation{
		Client: map[string]string{lwmsg.KindAssoc: "lwmsg, one thread (fake)", lwmsg.KindPeer: "lwmsg with epoll (fake)"}[c.kind],
		Policy: policy, State: state, Failed: c.failed, Longest: c.longest, FDsLeaked: c.fds(t) - c.fdsBefore,
	}
	switch {
	case strings.Contains(c.path, "likewise"):
		o.Daemon = "older Likewise (fake)"
	case c.handled():
		o.Daemon = "lwsmd: .regsd, .lwiod, … (fake)"
	default:
		o.Daemon = "lwsmd: .lsassd, .netlogond, .eventlog (fake)"
	}
	if s := d.State().Sessions; len(s) >= sessions && policy != lwHungUp {
		o.Identity = seenAs(s[len(s)-1].UID, c.User)
	}
	observe(t, o)
}

// do expects an operation to succeed.
func (c *lwClient) do(t testing.TB, op string) lwmsg.Answer {
	t.Helper()
	ans, err := c.try(lwmsg.Command{Op: op})
	if err != nil {
		t.Fatalf("the %s client, process %d: %s: %v", c.kind, c.PID, op, err)
	}
	return ans
}

// fails expects an operation to fail, cleanly.
func (c *lwClient) fails(t testing.TB, op, want string) {
	t.Helper()
	if _, err := c.try(lwmsg.Command{Op: op}); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("the %s client, process %d: %s: %v, expected %s", c.kind, c.PID, op, err, want)
	}
}

// lookups makes one small lookup and one of several packets.
func (c *lwClient) lookups(t testing.TB) {
	t.Helper()
	c.do(t, "lookup")
	if _, err := c.try(lwmsg.Command{Op: "lookup", Size: 3 * lwmsg.PacketSize}); err != nil {
		t.Errorf("the %s client, process %d: a lookup of several packets: %v", c.kind, c.PID, err)
	}
}

// fds is how many descriptors the client has, once no command is under way.
func (c *lwClient) fds(t testing.TB) int {
	t.Helper()
	n := c.do(t, "state").Client.FDs
	for range 20 {
		n = min(n, c.do(t, "state").Client.FDs)
	}
	return n
}

// handled are the sockets that need a handle for anything.
func (c *lwClient) handled() bool {
	switch filepath.Base(c.path) {
	case ".lsassd", ".netlogond", ".eventlog":
		return false
	}
	return true
}

// use makes a request of the kind that the socket has.
func (c *lwClient) use(t testing.TB) {
	t.Helper()
	if !c.handled() {
		c.do(t, "lookup")
		return
	}
	c.do(t, "open")
	c.do(t, "next")
}

// wantSlots waits until the daemon has as many connections as expected.
func wantSlots(t testing.TB, d *lwmsg.Daemon, slots int) {
	t.Helper()
	eventually(t, fmt.Sprintf("the daemon has %d of its slots in use", slots), func() bool { return d.State().Slots == slots })
}

// wantSessions checks how many sessions there were and that the last is the
// client's: its ids, and its pid where it was connected before it existed.
func (c *lwClient) wantSessions(t testing.TB, d *lwmsg.Daemon, n int) {
	t.Helper()
	s := d.State().Sessions
	if len(s) != n {
		t.Fatalf("the daemon saw %d sessions, expected %d: %+v", len(s), n, s)
	}
	last := s[n-1]
	if last.UID != c.User.UID || last.GID != c.User.GID {
		t.Errorf("the daemon saw uid %d and gid %d, expected %+v", last.UID, last.GID, c.User)
	}
	if (n == 1 || c.restoreBy != byScript) && int(last.PID) != c.PID {
		t.Errorf("the daemon saw process %d, expected %d", last.PID, c.PID)
	}
}

// wantAction checks what the record of a dump says of its only connection.
func wantAction(t testing.TB, dir string, want proto.Action) {
	t.Helper()
	rec, err := image.ReadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(rec.Connections) != 1 || rec.Connections[0].Action != want {
		t.Fatalf("the record says %v, expected one connection and %v", rec.Connections, want)
	}
}

// eachClient runs a scenario by all ways with both kinds of client. idle: a
// client with epoll is not in it, for one whose thread waits there is busy.
func eachClient(t *testing.T, u User, path string, idle bool, scenario func(*testing.T, *lwmsg.Daemon, *lwClient)) {
	t.Helper()
	ways(t, func(t *testing.T) {
		for _, kind := range kinds {
			t.Run(kind, func(t *testing.T) {
				d := lwmsgDaemon(t, path)
				c := startLwmsg(t, u, kind, path)
				c.use(t)
				c.wantSessions(t, d, 1)
				c.fdsBefore = c.fds(t)
				if idle && kind == lwmsg.KindPeer {
					c.do(t, "work")
				}
				scenario(t, d, c)
				nothingLeft(t)
			})
		}
	})
}

// rest lets a client with epoll go on that eachClient made work.
func (c *lwClient) rest(t testing.TB) {
	t.Helper()
	if c.kind == lwmsg.KindPeer {
		c.do(t, "on")
	}
}

// firstLookup makes the first lookup after a restore, and tells how long it
// took. The bound is for what waits for a timeout; nothing here does.
func (c *lwClient) firstLookup(t testing.TB) {
	t.Helper()
	ans := c.do(t, "lookup")
	t.Logf("first lookup after the restore: %v", ans.Took)
	if ans.Took > time.Second {
		t.Errorf("the first lookup after the restore took %v", ans.Took)
	}
}

func TestLwmsgReconnect(t *testing.T) {
	for _, name := range []string{".lsassd", ".netlogond", ".eventlog"} {
		for _, u := range []User{root, alice} {
			t.Run(fmt.Sprintf("%s, uid %d", name, u.UID), func(t *testing.T) {
				eachClient(t, u, pbisDir+name, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
					before := c.do(t, "state").Client.FD
					dir := c.Dump(t)
					wantAction(t, dir, proto.Action_ACTION_RECONNECT)
					wantSlots(t, d, 0)
					c.Restore(t, dir)
					wantSlots(t, d, 1)
					c.wantSessions(t, d, 2) // before anything was asked for
					c.rest(t)
					c.firstLookup(t)
					c.lookups(t)
					c.wantSessions(t, d, 2)
					if s := c.do(t, "state").Client; s.Sessions != 1 || s.FD != before {
						t.Errorf("the client made %d greetings and has fd %d, expected one and fd %d", s.Sessions, s.FD, before)
					}
					c.saw(t, d, lwGreeted, "idle", 2)
				})
			})
		}
	}
}

// TestLwmsgWaitingPeer: a thread that waits in epoll may wait for an answer, so
// the connection is hung up; the client makes another and loses no call.
func TestLwmsgWaitingPeer(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := lwmsgDaemon(t, lsassd)
		c := startLwmsg(t, alice, lwmsg.KindPeer, lsassd)
		c.do(t, "lookup")
		c.fdsBefore = c.fds(t)
		c.waits(t)
		dir := c.Dump(t)
		wantHangup(t, dir, "waits in epoll_")
		c.Restore(t, dir)
		c.firstLookup(t)
		c.lookups(t)
		if n := len(d.State().Sessions); n != 2 {
			t.Errorf("the daemon saw %d sessions, expected 2", n)
		}
		wantSlots(t, d, 1)
		c.saw(t, d, lwHungUp, lwWaits, 2)
		nothingLeft(t)
	})
}

func TestLwmsgTwentyCycles(t *testing.T) {
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		c.rest(t)
		fds := c.fds(t)
		for i := range 20 {
			if c.kind == lwmsg.KindPeer {
				c.do(t, "work")
			}
			dir := c.Dump(t)
			wantAction(t, dir, proto.Action_ACTION_RECONNECT)
			wantSlots(t, d, 0)
			c.Restore(t, dir)
			c.rest(t)
			c.do(t, "lookup")
			c.wantSessions(t, d, 2+i)
			wantSlots(t, d, 1)
			os.RemoveAll(dir)
		}
		eventually(t, fmt.Sprintf("the client has %d fds, as before", fds), func() bool { return c.fds(t) == fds })
	})
}
