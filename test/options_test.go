// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// options are what an application may have set on a connection; each row gets
// a connection of its own.
var options = []struct {
	name string
	cmds []app.Command
	// changed: the field of Details that the commands change.
	changed string
}{
	{name: "none"},
	{"O_NONBLOCK", []app.Command{{Op: "nonblock"}}, "Flags"},
	{"SO_RCVTIMEO", []app.Command{{Op: "timeout", Option: unix.SO_RCVTIMEO, Value: 12_340}}, "RcvTimeo"},
	{"SO_SNDTIMEO", []app.Command{{Op: "timeout", Option: unix.SO_SNDTIMEO, Value: 5_678}}, "SndTimeo"},
	{"SO_SNDBUF", []app.Command{{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_SNDBUF, Value: 40_000}}, "SndBuf"},
	{"SO_RCVBUF", []app.Command{{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_RCVBUF, Value: 50_000}}, "RcvBuf"},
	{"SO_PASSCRED", []app.Command{{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_PASSCRED, Value: 1}}, "PassCred"},
	{"O_ASYNC and owner", []app.Command{{Op: "owner"}}, "OwnerPID"},
	{"O_ASYNC and signal", []app.Command{{Op: "owner", Value: int(unix.SIGURG)}}, "Signal"},
	{"close-on-exec unset", []app.Command{{Op: "move", Value: 71}}, "Cloexec"},
	{"fd number", []app.Command{{Op: "move", Value: 703, Option: unix.O_CLOEXEC}}, "FD"},
	{"epoll", []app.Command{{Op: "epoll-add"}}, ""},
	{"all at once", []app.Command{
		{Op: "nonblock"},
		{Op: "timeout", Option: unix.SO_RCVTIMEO, Value: 1_250},
		{Op: "timeout", Option: unix.SO_SNDTIMEO, Value: 2_500},
		{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_SNDBUF, Value: 30_000},
		{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_RCVBUF, Value: 20_000},
		{Op: "setopt", Level: unix.SOL_SOCKET, Option: unix.SO_PASSCRED, Value: 1},
		{Op: "owner", Value: int(unix.SIGURG)},
		{Op: "move", Value: 155},
		{Op: "epoll-add"},
	}, "Flags"},
}

// TestOptions: a client of another user than the daemon, and everything that
// can be set on its connections, is as before, field by field.
func TestOptions(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "untouched", path)
		plain := a.Details(t, "untouched")
		names := []string{"untouched"}
		before := map[string]app.Details{"untouched": plain}
		for _, o := range options {
			a.connect(t, o.name, path)
			for _, cmd := range o.cmds {
				cmd.Conn = o.name
				a.Do(t, cmd)
			}
			a.request(t, o.name)
			d := a.Details(t, o.name)
			if o.changed != "" && reflect.ValueOf(d).FieldByName(o.changed).Equal(reflect.ValueOf(plain).FieldByName(o.changed)) {
				t.Errorf("%s: the test does not change %s: %+v", o.name, o.changed, d)
			}
			names, before[o.name] = append(names, o.name), d
		}

		dir := a.Dump(t)
		a.RestoreStock(t, dir)
		a.Awake(t)
		for _, n := range names {
			want := before[n]
			want.PeerName = "" // there is none
			a.wantDetails(t, "stock CRIU, "+n, n, want)
		}
		a.wantDead(t, names...)
		a.Kill(t)
		old := len(srv.Clients())

		a.Restore(t, dir)
		a.Awake(t)
		for _, n := range names {
			a.wantDetails(t, n, n, before[n])
			a.request(t, n)
		}
		clients := srv.Clients()[old:]
		if len(clients) != len(names) {
			t.Errorf("the daemon saw %d new connections, expected %d", len(clients), len(names))
		}
		for _, c := range clients {
			if c.UID != alice.UID || c.GID != alice.GID || !slices.Equal(c.Groups, alice.Groups) {
				t.Errorf("the daemon saw uid %d, gid %d, groups %v, expected %+v", c.UID, c.GID, c.Groups, alice)
			}
		}
		nothingLeft(t)
	})
}

// request makes a request, with epoll where the connection is registered.
func (a *App) request(t testing.TB, conn string) {
	t.Helper()
	for _, o := range options {
		if o.name == conn && slices.ContainsFunc(o.cmds, func(c app.Command) bool { return c.Op == "epoll-add" }) {
			a.Do(t, app.Command{Op: "epoll-wait", Conn: conn})
			return
		}
	}
	a.Request(t, conn)
}

// wantDetails compares all but the inode, which no restore can keep.
func (a *App) wantDetails(t testing.TB, what, conn string, want app.Details) {
	t.Helper()
	got := a.Details(t, conn)
	got.Inode = want.Inode
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		if !g.Field(i).Equal(w.Field(i)) {
			t.Errorf("%s: %s is %v, was %v before the dump", what, g.Type().Field(i).Name, g.Field(i), w.Field(i))
		}
	}
}

// TestPeerCredentials: the daemon sees the same user, group and groups as before.
func TestPeerCredentials(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		for _, u := range []User{root, {UID: 1000, GID: 1000, Groups: []uint32{}}, {UID: 1234, GID: 2345, Groups: []uint32{7, 8, 2345}}} {
			t.Run(fmt.Sprint(u.UID), func(t *testing.T) {
				first := len(srv.Clients())
				a := startApp(t, u, nil)
				a.connect(t, "c", path)
				a.Request(t, "c")
				a.roundTrip(t, "c")
				a.Request(t, "c")
				c := srv.Clients()[first:]
				if len(c) != 2 {
					t.Fatalf("the daemon saw %d connections, expected 2: %+v", len(c), c)
				}
				if c[0].UID != c[1].UID || c[0].GID != c[1].GID || !slices.Equal(c[0].Groups, c[1].Groups) || c[1].UID != u.UID {
					t.Errorf("the daemon sees %+v, before the dump %+v", c[1], c[0])
				}
			})
		}
		nothingLeft(t)
	})
}
