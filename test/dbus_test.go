// SPDX-License-Identifier: Apache-2.0

package test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/proto"
)

const (
	systemBus = "/run/dbus/system_bus_socket"
	busDaemon = "dbus-daemon"

	// Here the process that began to listen is the parent of a bus that has put
	// itself into the background: see sessionBus.sdbus for the other case.
	sdbusClient = "sd-bus (whose pidfd of the bus is of a process that has ended)"

	busHangup    = `rules: [{name: t-bus, path: /run/dbus/system_bus_socket, idle: hangup}]`
	busReconnect = `rules: [{name: t-bus, path: /run/dbus/system_bus_socket, idle: reconnect, prelude: dbus}]`
)

// bus starts a system bus for a test.
func bus(t *testing.T) {
	t.Helper()
	need(t)
	runDaemons(t, "dbus")
}

// recordedBus is the only connection of a dump.
func recordedBus(t testing.TB, dir string, action proto.Action, rule string) *proto.Connection {
	t.Helper()
	rec := record(t, dir)
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v; expected one connection", rec.Connections)
	}
	c := rec.Connections[0]
	if c.Action != action || c.Rule != rule || string(c.Peer.Name) != systemBus || c.Identity.Uid != alice.UID {
		t.Errorf("recorded: %v; expected %v by rule %s", c, action, rule)
	}
	return c
}

// TestBusRefused: nobody has chosen, so the dump is refused, and the message
// names what there is to choose from. The client does not notice.
func TestBusRefused(t *testing.T) {
	bus(t)
	ways(t, func(t *testing.T) {
		a := startAsker(t, "bus", "bus-unique", "bus-own", "bus-match")
		r := a.TryDump(t, images(t))
		if r.Code == 0 {
			t.Errorf("the dump succeeded\n%s", r.Output)
		}
		r.wantMessage(t, systemBus, "dbus-system", "idle: hangup", "idle: reconnect with prelude: dbus")
		a.rounds(t, 3)
		a.wantFailed(t, "after the refused dump", 0)
		a.Kill(t)
		wantUnconnected(t, systemBus, busDaemon)
		nothingLeft(t)
	})
}

// TestBusHangup: by choice. A client that connects anew loses one call, and has
// its names and matches again; one that is as libdbus makes it ends.
func TestBusHangup(t *testing.T) {
	bus(t)
	install(t, busHangup)
	ways(t, func(t *testing.T) {
		daemon := running(busDaemon)
		for _, c := range []struct {
			client string
			what   []string
		}{
			{"libdbus, connects anew", []string{"bus", "bus-unique", "bus-own", "bus-match"}},
			{sdbusClient + ", connects anew", []string{"sdbus"}},
		} {
			a := startAsker(t, c.what...)
			fds := a.fds(t)
			dir := a.Dump(t)
			recordedBus(t, dir, proto.Action_ACTION_HANGUP, "t-bus")
			a.Restore(t, dir)
			a.rounds(t, 1)
			first := a.answer(t, c.what[0]).last
			a.rounds(t, 2)
			failed := a.failed(t)
			if failed > 1 {
				t.Errorf("%s: %d calls failed, expected the first at most", c.client, failed)
			}
			observeSoon(t, Observation{
				Client: c.client, Daemon: busDaemon, Policy: "hangup (opt-in)", State: "idle",
				Failed: failed, Longest: first, FDsLeaked: a.leaked(t, fds),
			})
			a.Kill(t)
		}
		t.Run("exits", func(t *testing.T) {
			a := startAsker(t, "bus-exits")
			// Restored by stock CRIU it ends just so.
			a.alive = nil
			dir := a.Dump(t)
			recordedBus(t, dir, proto.Action_ACTION_HANGUP, "t-bus")
			a.Restore(t, dir)
			a.ask(t)
			asked := time.Now()
			eventually(t, "libdbus to end the process", func() bool { s := stateOf(a.PID); return s == "" || s == "Z" })
			observeSoon(t, Observation{
				Client: "libdbus, exit_on_disconnect (its default)", Daemon: busDaemon, Policy: "hangup (opt-in)", State: "idle: it ends the process",
				Failed: 1, Longest: time.Since(asked),
			})
			a.Kill(t)
		})
		wantUnconnected(t, systemBus, busDaemon)
		wantStill(t, daemon, busDaemon)
		nothingLeft(t)
	})
}

// TestBusReconnect: by choice. Calls work, of the first on; but the bus knows
// neither the unique name the client thinks it has, nor the name it owned, nor
// its match rules. libdbus's default way does as well.
func TestBusReconnect(t *testing.T) {
	bus(t)
	install(t, busReconnect)
	ways(t, func(t *testing.T) {
		daemon := running(busDaemon)
		for _, restart := range []bool{false, true} {
			t.Run(map[bool]string{false: "idle", true: "restarted"}[restart], func(t *testing.T) {
				a := startAsker(t, "bus", "bus-unique", "bus-own", "bus-match")
				fds := a.fds(t)
				dir := a.Dump(t)
				recordedBus(t, dir, proto.Action_ACTION_RECONNECT, "t-bus")
				state := "idle"
				wantStill(t, daemon, busDaemon)
				if restart {
					doDaemons(t, "restart", "dbus")
					daemon = running(busDaemon)
					state = "idle, daemon restarted"
				}
				a.Restore(t, dir)
				identity := a.seenBy(t, systemBus, busDaemon)
				a.rounds(t, 1)
				first := a.answer(t, "bus").last
				a.rounds(t, 2)
				calls := a.answer(t, "bus")
				if calls.failed > 0 {
					t.Errorf("%d calls failed, the last with %v", calls.failed, calls.errno)
				}
				// The new unique name is another one unless the numbering began anew.
				names := []string{"bus-own", "bus-match"}
				if !restart {
					names = append(names, "bus-unique")
				}
				for _, what := range names {
					if n := a.answer(t, what); n.failed != 3 || n.errno != unix.ENOENT {
						t.Errorf("%s: %+v; expected that the bus has forgotten it", what, n)
					}
				}
				if !restart {
					lost := 0
					for _, what := range names {
						lost += a.answer(t, what).failed
					}
					observe(t, Observation{
						Client: "libdbus, asking for its unique name, its own name, its match rule", Daemon: busDaemon,
						Policy: "reconnect, prelude dbus (opt-in)", State: state, Failed: lost,
					})
				}
				observeSoon(t, Observation{
					Client: "libdbus", Daemon: busDaemon, Policy: "reconnect, prelude dbus (opt-in)", State: state,
					Failed: calls.failed, Longest: first, FDsLeaked: a.leaked(t, fds), Identity: identity,
				})
				a.Kill(t)
				wantUnconnected(t, systemBus, busDaemon)
			})
		}
		for _, c := range []struct{ what, client string }{
			{"bus-exits", "libdbus, exit_on_disconnect (its default)"},
			{"sdbus", sdbusClient},
		} {
			t.Run(c.what, func(t *testing.T) {
				a := startAsker(t, c.what)
				fds := a.fds(t)
				a.alive = nil // restored by stock CRIU the one ends
				// sd-bus binds its end to an abstract name.
				a.inPlace = c.what == "sdbus"
				dir := a.Dump(t)
				recordedBus(t, dir, proto.Action_ACTION_RECONNECT, "t-bus")
				a.Restore(t, dir)
				identity := a.seenBy(t, systemBus, busDaemon)
				a.rounds(t, 1)
				first := a.answer(t, c.what).last
				a.rounds(t, 2)
				observeSoon(t, Observation{
					Client: c.client, Daemon: busDaemon, Policy: "reconnect, prelude dbus (opt-in)", State: "idle",
					Failed: a.failed(t), Longest: first, FDsLeaked: a.leaked(t, fds), Identity: identity,
				})
				a.wantFailed(t, "after the restore", 0)
				a.Kill(t)
				wantUnconnected(t, systemBus, busDaemon)
			})
		}
		wantStill(t, daemon, busDaemon)
		nothingLeft(t)
	})
}

// TestBusBusy: the answer to a call under way will never come. It fails at once.
func TestBusBusy(t *testing.T) {
	bus(t)
	install(t, busReconnect)
	ways(t, func(t *testing.T) {
		daemon := running(busDaemon)
		a := startAsker(t, "bus")
		fds := a.fds(t)
		thaw := freezeAll(t, busDaemon)
		a.ask(t)
		a.awaitBusy(t, systemBus)
		a.alive = nil // as long as the bus is frozen
		dir := a.Dump(t)
		recordedBus(t, dir, proto.Action_ACTION_HANGUP, "t-bus")
		thaw()
		a.Restore(t, dir)
		restored := time.Now()
		eventually(t, "the call that was under way", func() bool { return a.answer(t, "bus").asked == 2 })
		longest := time.Since(restored)
		failed := a.failed(t)
		if failed > 1 {
			t.Errorf("%d calls failed, one was under way", failed)
		}
		a.rounds(t, 3)
		a.wantFailed(t, "later", failed)
		wantStill(t, daemon, busDaemon)
		a.seenBy(t, systemBus, busDaemon)
		observeSoon(t, Observation{
			Client: "libdbus, connects anew", Daemon: busDaemon, Policy: "hangup", State: "busy",
			Failed: failed, Longest: longest, FDsLeaked: a.leaked(t, fds),
		})
		a.Kill(t)
		wantUnconnected(t, systemBus, busDaemon)
		nothingLeft(t)
	})
}
