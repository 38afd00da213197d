// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"testing"

	"criuhook/test/app"
)

// TestUnaccepted: the daemon has not accepted the connection, with or without
// a request in it. Nobody can tell what it knows of it.
func TestUnaccepted(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, text := range []string{"", "a request\n"} {
			l := rawListener(t, "reconnect", 8)
			a := startApp(t, alice, nil)
			a.connect(t, "c", l.path)
			if text != "" {
				a.Do(t, app.Command{Op: "write", Conn: "c", Text: text})
			}
			a.pair(t)
			dir := a.roundTrip(t, "c")
			wantRecorded(t, dir, 1)
			a.wantHungUp(t, "c")
			a.usePair(t)
			nothingLeft(t)
		}
	})
}

func TestUnacceptedIsRefused(t *testing.T) {
	ways(t, func(t *testing.T) {
		l := rawListener(t, "busyrefuse", 8)
		a := startApp(t, alice, nil)
		a.connect(t, "c", l.path)
		fd := a.Details(t, "c").FD
		dir := images(t)
		a.TryDump(t, dir).refused(t, dir, fmt.Sprint("process ", a.PID), fmt.Sprint("fd ", fd), l.path, "t-busy-refuse", "not accepted")
		srv := l.serve(t)
		a.Request(t, "c") // the connection it had
		wantClients(t, srv, 0, 1)
		nothingLeft(t)
	})
}
