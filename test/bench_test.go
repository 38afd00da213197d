// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// BenchmarkDump compares dumps with --leave-running: of stock CRIU without and
// with an action script that does nothing, and with criuhook. The machine is
// noisy: compare the lines of one run.
func BenchmarkDump(b *testing.B) {
	if whyNot != "" {
		b.Skip(whyNot)
	}
	noop := filepath.Join(folder(b), "noop")
	if err := os.WriteFile(noop, []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		b.Fatal(err)
	}
	for _, bench := range []struct {
		name, script string
		connections  int
	}{
		{"stock", "", 0},
		{"noop-script", noop, 0},
		{"criuhook-0", criuhook, 0},
		{"criuhook-1", criuhook, 1},
		{"criuhook-100", criuhook, 100},
	} {
		b.Run(bench.name, func(b *testing.B) {
			_, path := daemon(b, "unix", "reconnect")
			a := startApp(b, root, nil)
			for i := range bench.connections {
				a.Do(b, app.Command{Op: "open", Conn: strconv.Itoa(i), To: path, Type: unix.SOCK_STREAM})
			}
			args := []string{"dump", "-t", strconv.Itoa(a.PID), "--leave-running"}
			if bench.script != "" {
				args = append(args, "--action-script="+bench.script)
			}
			dir := images(b)
			for b.Loop() {
				run(b, root, dir, "dump.log", args...).want(b, "dump", 0)
			}
		})
	}
}
