// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"path/filepath"
	"testing"

	"criuhook/test/app"
)

// TestElsewhere: below the application's root the daemon's name leads to
// another listener, of the same user. It must not get the connection.
func TestElsewhere(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, same := range []bool{false, true} {
			name := map[bool]string{false: "another listener", true: "the same listener"}[same]
			t.Run(name, func(t *testing.T) {
				srv, path := daemon(t, "unix", "reconnect")
				newRoot := folder(t)
				inside := filepath.Join(newRoot, path)
				if err := os.MkdirAll(filepath.Dir(inside), 0o755); err != nil {
					t.Fatal(err)
				}
				a := startApp(t, root, nil)
				a.connect(t, "c", path)
				a.Request(t, "c")
				a.Do(t, app.Command{Op: "chroot", To: newRoot})
				if same {
					if err := os.Link(path, inside); err != nil {
						t.Fatal(err)
					}
					a.roundTrip(t, "c")
					a.Request(t, "c")
					wantClients(t, srv, 1, 1)
					nothingLeft(t)
					return
				}
				impostor := daemonAt(t, "unix", inside)
				dir := a.Dump(t)
				a.Restore(t, dir)
				a.Awake(t)
				a.wantHungUp(t, "c")
				wantClients(t, srv, 1, 0)
				wantClients(t, impostor, 0, 0)
				nothingLeft(t)
			})
		}
	})
}
