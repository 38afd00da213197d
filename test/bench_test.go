// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// BenchmarkDump compares dumps with --leave-running: of stock CRIU without and
// with an action script that does nothing, and with criuhook by each way, of 0,
// 1 and 100 connections. The machine is noisy: compare the lines of one run.
func BenchmarkDump(b *testing.B) {
	if whyNot != "" {
		b.Skip(whyNot)
	}
	noop := filepath.Join(folder(b), "noop")
	if err := os.WriteFile(noop, []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		b.Fatal(err)
	}
	bench := func(name string, w way, connections int, options ...string) {
		b.Run(name, func(b *testing.B) {
			_, path := daemon(b, "unix", "reconnect")
			a := startApp(b, root, nil)
			a.dumpBy = w
			for i := range connections {
				a.Do(b, app.Command{Op: "open", Conn: strconv.Itoa(i), To: path, Type: unix.SOCK_STREAM})
			}
			dir := images(b)
			for b.Loop() {
				a.TryDump(b, dir, append(options, "--leave-running")...).want(b, "dump", 0)
			}
		})
	}
	bench("stock", byStock, 0)
	bench("noop-script", byStock, 0, "--action-script="+noop)
	for _, w := range []way{byScript, byRPC, byDropin} {
		for _, n := range []int{0, 1, 100} {
			bench(fmt.Sprint(w, "-", n), w, n)
		}
	}
}

// BenchmarkRestore compares restores in the same way, each followed by the end
// of what was restored.
func BenchmarkRestore(b *testing.B) {
	if whyNot != "" {
		b.Skip(whyNot)
	}
	for _, n := range []int{0, 1, 100} {
		_, path := daemon(b, "unix", "reconnect")
		a := startApp(b, root, nil)
		for i := range n {
			a.Do(b, app.Command{Op: "open", Conn: strconv.Itoa(i), To: path, Type: unix.SOCK_STREAM})
		}
		dir := a.Dump(b)
		for _, w := range []way{byStock, byScript, byRPC, byDropin} {
			b.Run(fmt.Sprint(w, "-", n), func(b *testing.B) {
				a.restoreBy = w
				for b.Loop() {
					a.Restore(b, dir)
					b.StopTimer()
					a.Awake(b)
					a.Kill(b)
					b.StartTimer()
				}
			})
		}
	}
}
