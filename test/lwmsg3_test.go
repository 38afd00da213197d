// SPDX-License-Identifier: Apache-2.0

package test

import (
	"strings"
	"testing"

	"criuhook/proto"
	"criuhook/test/lwmsg"
)

// The policies that the built-in rules do not take, and what they cost. This
// shows at the same time that the fakes fail as PBIS does, or else the tests of
// the right policies would show nothing.

// lwRule puts a rule for one path before the built-in ones.
func lwRule(t testing.TB, path, rest string) {
	t.Helper()
	install(t, "rules:\n  - {name: t-wrong, path: "+path+", type: stream, "+rest+"}\n")
}

// oneViolation takes the only thing that a client has done wrong.
func oneViolation(t testing.TB, d *lwmsg.Daemon, want string) {
	t.Helper()
	var v []string
	eventually(t, "the daemon found something wrong", func() bool { v = append(v, d.Violations()...); return len(v) > 0 })
	if len(v) != 1 || !strings.Contains(v[0], want) {
		t.Errorf("the daemon found wrong: %q, expected %q", v, want)
	}
}

const notGreeted = "a packet of type 1 instead of a greeting"

// An assoc client without the prelude is busy for ever, one with epoll loses
// one call. Until the client speaks, the daemon keeps a slot for nobody.
func TestLwmsgWithoutPrelude(t *testing.T) {
	lwRule(t, lsassd, "idle: reconnect, prelude: none")
	eachClient(t, alice, lsassd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
		dir := c.Dump(t)
		wantAction(t, dir, proto.Action_ACTION_RECONNECT)
		c.Restore(t, dir)
		wantSlots(t, d, 1)
		c.wantSessions(t, d, 1) // not greeted
		c.rest(t)
		c.fails(t, "lookup", "PEER_CLOSE")
		oneViolation(t, d, notGreeted)
		if c.kind == lwmsg.KindPeer {
			c.lookups(t)
			wantSlots(t, d, 1)
			c.wantLastIdentity(t, d, 2)
			c.saw(t, d, lwUngreeted, "idle", 3)
			return
		}
		for range 5 {
			c.fails(t, "lookup", "BUSY")
		}
		wantSlots(t, d, 0)
		c.longest = lwForEver // none will be served any more
		c.saw(t, d, lwUngreeted, "idle", 2)
	})
}

// A handle does not survive a reconnection, with or without the prelude.
func TestLwmsgHandleReconnected(t *testing.T) {
	const regsd = pbisDir + ".regsd"
	t.Run("with prelude", func(t *testing.T) {
		lwRule(t, regsd, "idle: reconnect, prelude: lwmsg")
		eachClient(t, alice, regsd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
			dir := c.Dump(t)
			wantAction(t, dir, proto.Action_ACTION_RECONNECT)
			c.Restore(t, dir)
			c.rest(t)
			if _, err := c.try(lwmsg.Command{Op: "background", Text: "next"}); err != nil {
				t.Fatal(err)
			}
			c.neverAnswered(t, d)
		})
	})
	t.Run("without", func(t *testing.T) {
		lwRule(t, regsd, "idle: reconnect, prelude: none")
		eachClient(t, alice, regsd, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
			dir := c.Dump(t)
			c.Restore(t, dir)
			c.rest(t)
			c.fails(t, "next", "PEER_CLOSE")
			oneViolation(t, d, notGreeted)
			if c.kind == lwmsg.KindAssoc {
				c.fails(t, "open", "BUSY")
				c.fails(t, "next", "BUSY")
				return
			}
			c.use(t)
		})
	})
}

// The newer greeting is none for an old daemon: the restore finds out and hangs
// up. Without any, the daemon's own greeting is in the client's way.
func TestLwmsgLikewiseReconnected(t *testing.T) {
	const path = likewiseDir + ".lsassd"
	t.Run("with prelude", func(t *testing.T) {
		lwRule(t, path, "idle: reconnect, prelude: lwmsg")
		eachClient(t, alice, path, true, func(t *testing.T, d *lwmsg.Daemon, c *lwClient) {
			dir := c.Dump(t)
			wantAction(t, dir, proto.Action_ACTION_RECONNECT)
			c.Restore(t, dir).wantMessage(t, "unexpected answer 000000130403", "hung up, as its rule says")
			oneViolation(t, d, "a packet of type 2 instead of a greeting")
			wantSlots(t, d, 0)
			c.rest(t)
			c.recovers(t, d)
		})
	})
	t.Run("without", func(t *testing.T) {
		lwRule(t, path, "idle: reconnect, prelude: none")
		ways(t, func(t *testing.T) {
			d := lwmsgDaemon(t, path)
			c := startLwmsg(t, alice, lwmsg.KindAssoc, path)
			c.do(t, "lookup")
			c.Restore(t, c.Dump(t))
			c.fails(t, "lookup", "MALFORMED")
			oneViolation(t, d, notGreeted)
			for range 3 {
				c.fails(t, "lookup", "BUSY")
			}
			nothingLeft(t)
		})
	})
}
