// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// A dump that fails before CRIU has written anything leaves the images of an
// earlier one, and what belongs to them, as they are.
func TestFailedDumpSparesEarlierImages(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := dumpClient(t, alice, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		_, path := daemon(t, "unix", "reconnect")
		other := startApp(t, alice, nil)
		other.connect(t, "c", path)

		const file = "/etc/criuhook/rules.d/50-bad.yaml"
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(filepath.Dir(file)) })
		if err := os.WriteFile(file, []byte("rules:\n  - {name: x, path: [\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		before := contents(t, d.dir)
		delete(before, "dump.log")
		if err := os.Remove(filepath.Join(d.dir, "dump.log")); err != nil {
			t.Fatal(err)
		}
		r := other.TryDump(t, d.dir)
		if r.Code == 0 {
			t.Fatalf("the dump did not fail\n%s", r.tail())
		}
		r.wantMessage(t, file)
		other.Request(t, "c")
		after := contents(t, d.dir)
		for name, sum := range before {
			if after[name] != sum {
				t.Errorf("the dump that failed changed %s", name)
			}
		}
		d.wantRestored(t, srv)
	})
}

// fullPipe is the writing end of a pipe that is full and that nobody reads.
func fullPipe(t testing.TB) *os.File {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]) })
	w := os.NewFile(uintptr(fds[1]), "full pipe")
	t.Cleanup(func() { w.Close() })
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	for size := 4096; size > 0; {
		if _, err := unix.Write(fds[1], make([]byte, size)); err == unix.EAGAIN {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	return w
}

// CRIU's stderr may be a pipe whose reader waits for CRIU first: the tree must
// not stay frozen for a warning that nobody takes. Of the action script only,
// which writes to another's stderr.
func TestNobodyReadsStderr(t *testing.T) {
	need(t)
	for _, u := range []User{root, alice} {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, u, nil)
		a.connect(t, "c", path)
		a.connect(t, "half", path)
		a.Request(t, "c")
		// It will be hung up, though its rule says reconnect: a warning.
		a.Do(t, app.Command{Op: "shutdown", Conn: "half", Value: unix.SHUT_RD})
		before, half := a.Details(t, "c"), a.Details(t, "half")
		dir := images(t)
		ctx, cancel := context.WithTimeout(context.Background(), criuTime)
		cmd := byScript.dump(a.PID, dir, "--leave-running", "-v4", "-o", "dump.log").as(ctx, u)
		cmd.Stderr = fullPipe(t)
		err := cmd.Run()
		late := ctx.Err()
		cancel()
		log, _ := os.ReadFile(filepath.Join(dir, "dump.log"))
		r := Result{Code: cmd.ProcessState.ExitCode(), Log: string(log)}
		if err != nil || late != nil {
			t.Fatalf("the dump: %v, %v\n%s", err, late, r.tail())
		}
		if !strings.Contains(r.Log, "criuhook: Warn: ") {
			t.Errorf("the dump should warn:\n%s", r.tail())
		}
		wantRecorded(t, dir, 2)
		if c, h := a.Details(t, "c"), a.Details(t, "half"); c != before || h != half {
			t.Errorf("after the dump %+v, %+v, before it %+v, %+v", c, h, before, half)
		}
		a.Request(t, "c")
		wantClients(t, srv, 0, 2)
		nothingLeft(t)
		a.Kill(t)
		a.Dumped(t, dir)
		nothingLeft(t)
	}
}

// CRIU starts its script in a directory that nobody has chosen: a relative path
// would name another file, or none, without a word. The other ways are started
// by who has written the path.
func TestRelativePathInEnvironment(t *testing.T) {
	need(t)
	for _, name := range []string{"CRIUHOOK_CONFIG", "CRIUHOOK_LOG_FILE"} {
		t.Run(name, func(t *testing.T) {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			before := a.Details(t, "c")
			t.Setenv(name, "etc/some.file")
			dir := images(t)
			a.TryDump(t, dir).failed(t, dir, name+"=etc/some.file", "must be an absolute path")
			a.untouched(t, srv, "c", before)
		})
	}
}
