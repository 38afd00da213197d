// SPDX-License-Identifier: Apache-2.0

package test

import (
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// daemon starts an echo daemon at a name in a folder of its own.
func daemon(t testing.TB, network, name string) (*echo.Server, string) {
	t.Helper()
	path := filepath.Join(folder(t), name)
	return daemonAt(t, network, path), path
}

func daemonAt(t testing.TB, network, path string) *echo.Server {
	t.Helper()
	s, err := echo.Listen(network, path)
	if err != nil {
		t.Fatal(err)
	}
	echoes.Store(path, s)
	t.Cleanup(func() {
		echoes.CompareAndDelete(path, s)
		s.Close()
	})
	return s
}

// echoes are the daemons of daemonAt by their names.
var echoes sync.Map // of *echo.Server

func TestRoundTrip(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.Do(t, app.Command{Op: "open", Conn: "c", To: path, Type: unix.SOCK_STREAM})
		a.Request(t, "c")
		before := a.Details(t, "c")

		dir := a.Dump(t)
		if err := srv.Await("EOF of the old connection", func(c []echo.Client) bool { return echo.Open(c) == 0 }); err != nil {
			t.Fatal(err)
		}
		a.Restore(t, dir)
		a.Request(t, "c")

		after := a.Details(t, "c")
		after.Inode = before.Inode
		if after != before {
			t.Errorf("after the restore %+v, before the dump %+v", after, before)
		}
		c := srv.Clients()
		if len(c) != 2 {
			t.Fatalf("the daemon saw %d connections, expected 2: %+v", len(c), c)
		}
		if c[1].UID != alice.UID || c[1].GID != alice.GID || !slices.Equal(c[1].Groups, alice.Groups) {
			t.Errorf("the daemon saw uid %d, gid %d, groups %v, expected %+v", c[1].UID, c[1].GID, c[1].Groups, alice)
		}
		nothingLeft(t)
	})
}
