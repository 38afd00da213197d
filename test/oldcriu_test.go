// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// oldCRIU is a stand-in for a CRIU before 3.19, or CRaC's fork of 3.17, which do
// not ask for external files and do not run on new kernels: this one asks by a
// name that nobody knows, and gets a yes without options, as from any client.
func oldCRIU(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/usr/sbin/criu")
	if err != nil {
		t.Fatal(err)
	}
	const name, other = "query-ext-files", "query-ext-filez"
	if bytes.Count(b, []byte(name)) != 1 {
		t.Fatalf("%q is not once in CRIU's program", name)
	}
	old := filepath.Join(images(t), "criu-old")
	if err := os.WriteFile(old, bytes.Replace(b, []byte(name), []byte(other), 1), 0o755); err != nil {
		t.Fatal(err)
	}
	return old
}

// wrapped is a script that runs a CRIU: nobody can tell what that can do, short
// of a dump.
func wrapped(t testing.TB, criu string) string {
	t.Helper()
	script := filepath.Join(images(t), "criu-script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec "+criu+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return script
}

// oldWays runs a scenario with an old CRIU, by name or by a script.
func oldWays(t *testing.T, scenario func(*testing.T)) {
	t.Helper()
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) {
		for _, kind := range []string{"program", "wrapped"} {
			t.Run(kind, func(t *testing.T) {
				criu := oldCRIU(t)
				if kind == "wrapped" {
					criu = wrapped(t, criu)
				}
				t.Setenv("CRIUHOOK_CRIU", criu)
				scenario(t)
			})
		}
	})
}

// atPreDump is an option for CRIU: a script that asks the application to do
// something at each pre-dump, first the first and so on. Calls counts them.
func (a *App) atPreDump(t testing.TB, commands ...string) (option string, calls func() int) {
	t.Helper()
	dir := images(t)
	const perl = `#!/usr/bin/perl
use Socket;
exit 0 unless $ENV{CRTOOLS_SCRIPT_ACTION} eq "pre-dump";
my ($dir, $control, @commands) = (%s);
my $n = () = glob("$dir/call*");
open(my $f, ">", "$dir/call$n") or die;
exit 0 unless defined $commands[$n];
socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
connect($s, pack_sockaddr_un($control)) or die "connect: $!";
syswrite($s, $commands[$n] . "\n") or die "write: $!";
1 while sysread($s, my $answer, 4096);
`
	var words []string
	for _, w := range append([]string{dir, a.Control}, commands...) {
		words = append(words, "'"+w+"'")
	}
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, fmt.Appendf(nil, perl, strings.Join(words, ", ")), 0o755); err != nil {
		t.Fatal(err)
	}
	return "--action-script=" + script, func() int {
		made, _ := filepath.Glob(filepath.Join(dir, "call*"))
		return len(made)
	}
}

// isWrapped reports whether the test's CRIU tells nothing until it dumps.
func isWrapped(t testing.TB) bool {
	return strings.Contains(t.Name()+"/", "/wrapped/")
}

// attempts is how many dumps the test's CRIU is asked for, and an action script
// sees begin. By swrk there is only one, whatever that CRIU can do.
func attempts(t testing.TB) int {
	return map[bool]int{false: 1, true: 2}[isWrapped(t) && wayOf(t) != bySwrk]
}

func TestOldCRIU(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		stream, streamPath := daemon(t, "unix", "reconnect")
		packets, packetsPath := daemon(t, "unixpacket", "reconnect-packets")
		_, hangupPath := daemon(t, "unix", "hangup")
		logPath := filepath.Join(folder(t), "reconnect-log")
		log := datagrams(t, logPath)
		a := startApp(t, root, nil)
		a.connect(t, "s1", streamPath)
		a.connect(t, "s2", streamPath)
		a.Do(t, app.Command{Op: "dup", Conn: "s2", As: "s2 again"})
		a.connectType(t, "p", packetsPath, unix.SOCK_SEQPACKET)
		a.connect(t, "h", hangupPath)
		a.connectType(t, "log", logPath, unix.SOCK_DGRAM)
		a.connectClosed(t, "gone", "reconnect-gone")
		a.pair(t)
		child := a.Child(t, "s1")
		for _, c := range []string{"s1", "s2", "p", "h"} {
			a.Request(t, c)
		}
		script, calls := a.atPreDump(t)
		dir := a.Dump(t, script)
		if n := calls(); n != attempts(t) {
			t.Errorf("the action script saw %d dumps, expected %d", n, attempts(t))
		}
		wantRecorded(t, dir, 5)
		a.roundTripOf(t, dir, "s1", "s2", "p", "h", "gone")
		for _, c := range []string{"s1", "s2", "s2 again", "p"} {
			a.Request(t, c)
		}
		child.Request(t, "s1")
		a.wantDatagram(t, "log", log)
		a.wantHungUp(t, "h", "gone")
		a.usePair(t)
		wantClients(t, stream, 2, 2)
		wantClients(t, packets, 1, 1)
		nothingLeft(t)
	})
}

// TestOldCRIUWithoutConnections: there is nothing to be told, so one dump does.
func TestOldCRIUWithoutConnections(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		a := startApp(t, root, nil)
		a.pair(t)
		script, calls := a.atPreDump(t)
		dir := a.Dump(t, script)
		if n := calls(); n != 1 {
			t.Errorf("the action script saw %d dumps, expected 1", n)
		}
		wantRecorded(t, dir, 0)
		a.Restore(t, dir)
		a.usePair(t)
		nothingLeft(t)
	})
}

func TestOldCRIUUnlinkedCache(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		d := startDaemons(t)
		d.fallBack(t)
		l := startLookup(t, append(round, "-p")...)
		d.do(t, "restart", "sssd")
		before := l.mappings(t)
		dir := l.Dump(t)
		want := []*proto.Cache{{Path: sssdCache, Unlinked: true, Mappings: 1, Fds: 1}}
		if len(before) > 1 { // a busy nscd is not waited for
			want = append(want, ofNSCD)
		}
		wantCaches(t, dir, want...)
		back := l.keepStats(t)
		l.Restore(t, dir)
		l.wantEmpty(t, before)
		l.rounds(t, nscdRetry)
		l.wantFailed(t, "after the restore", 0)
		l.Kill(t)
		back()
		nothingLeft(t)
	})
}

func open(conn, path string) string {
	return fmt.Sprintf(`{"Op":"open","Conn":"%s","To":"%s","Type":1}`, conn, path)
}

// TestOldCRIUConnectionAppears between our look at the tree and the freeze.
func TestOldCRIUConnectionAppears(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		late, latePath := daemon(t, "unix", "reconnect-late")
		a := startApp(t, root, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		before := a.Details(t, "c")
		script, _ := a.atPreDump(t, slices.Repeat([]string{open("late", latePath)}, attempts(t))...)
		dir := images(t)
		r := a.TryDump(t, dir, script)
		r.failed(t, dir, latePath, "does not ask for external files", "appeared", "dump again", a.who(t, a.Details(t, "late")))
		if n := strings.Count(r.Output, latePath); n != 1 {
			t.Errorf("the connection that appeared is named %d times:\n%s", n, r.Output)
		}
		a.untouched(t, srv, "c", before)
		a.Request(t, "late")
		await(t, late, "all late connections", func(c []echo.Client) bool { return len(c) == attempts(t) && echo.Open(c) == len(c) })
		// Now it is known.
		dir = a.Dump(t)
		wantRecorded(t, dir, 1+attempts(t))
		a.Restore(t, dir)
		a.Request(t, "c")
		a.Request(t, "late")
		nothingLeft(t)
	})
}

// TestOldCRIUConnectionGoes between our look and the freeze: closed by us, or
// by the daemon.
func TestOldCRIUConnectionGoes(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		for _, by := range []string{"us", "the daemon"} {
			t.Run("closed by "+by, func(t *testing.T) {
				srv, path := daemon(t, "unix", "reconnect")
				a, b := startApp(t, root, nil), startApp(t, root, nil)
				own := filepath.Join(folder(t), "reconnect-other")
				b.Do(t, app.Command{Op: "accept", Conn: "goes", To: own})
				a.connect(t, "c", path)
				a.connect(t, "goes", own)
				eventually(t, "it is accepted", func() bool { _, err := b.Try(app.Command{Op: "details", Conn: "goes"}); return err == nil })
				closer := map[string]*App{"us": a, "the daemon": b}[by]
				var commands []string
				if isWrapped(t) {
					commands = append(commands, `{"Op":"ping"}`)
				}
				script, _ := closer.atPreDump(t, append(commands, `{"Op":"close","Conn":"goes"}`)...)
				dir := a.Dump(t, script)
				if rec := record(t, dir); len(rec.Connections) != 1 {
					t.Errorf("recorded: %v", rec.Connections)
				}
				a.Restore(t, dir)
				a.Request(t, "c")
				if by == "the daemon" {
					a.wantHungUp(t, "goes")
				}
				wantClients(t, srv, 1, 1)
				nothingLeft(t)
			})
		}
	})
}

// TestOldCRIUBusy: the tree runs on after we looked at it, and its connection is
// busy when it is frozen.
func TestOldCRIUBusy(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		for _, socket := range []string{"reconnect", "busyrefuse", "wait"} {
			t.Run(socket, func(t *testing.T) {
				srv, path := daemon(t, "unix", socket)
				a := startApp(t, root, nil)
				a.connect(t, "c", path)
				a.Request(t, "c")
				srv.Hold()
				before := a.Details(t, "c")
				var commands []string
				if isWrapped(t) {
					commands = append(commands, `{"Op":"ping"}`)
				}
				script, calls := a.atPreDump(t, append(commands, `{"Op":"background","Text":"request","Conn":"c"}`)...)
				dir := images(t)
				if socket == "wait" {
					go func() { // once the dump has found it busy
						for end := time.Now().Add(patience); time.Now().Before(end) && calls() <= len(commands); time.Sleep(time.Millisecond) {
						}
						time.Sleep(200 * time.Millisecond)
						srv.Release()
					}()
				}
				r := a.TryDump(t, dir, script)
				switch socket {
				case "busyrefuse":
					r.refused(t, dir, a.who(t, before), "t-busy-refuse", "the rule refuses it while it is busy")
					srv.Release()
					a.answered(t, "")
					a.untouched(t, srv, "c", before)
					return
				case "wait":
					r.want(t, "dump", 0)
					a.Dumped(t, dir)
					a.Restore(t, dir)
					a.answered(t, "")
					a.Request(t, "c")
				default:
					r.want(t, "dump", 0)
					a.Dumped(t, dir)
					wantHangup(t, dir, "")
					a.Restore(t, dir)
					a.answered(t, "EOF")
				}
				nothingLeft(t)
			})
		}
	})
}

// TestOldCRIUSparesEarlierImages: a refusal comes before CRIU writes anything,
// unless only a dump could tell that CRIU does not ask. Then no record stays
// beside what is left.
func TestOldCRIUSparesEarlierImages(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		d := dumpClient(t, root, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		refusing, path := daemon(t, "unix", "refuse")
		other := startApp(t, root, nil)
		other.connect(t, "c", path)
		before := other.Details(t, "c")
		r := other.TryDump(t, d.dir)
		if r.Code == 0 || r.By == byRPC && r.Code != 3 {
			t.Fatalf("exit code %d\n%s", r.Code, r.tail())
		}
		if r.By == byRPC && !isWrapped(t) {
			r.Log = "" // it is of the earlier dump: CRIU was not started
		}
		r.wantMessage(t, "t-refuse", path, other.who(t, before))
		other.untouched(t, refusing, "c", before)
		if isWrapped(t) {
			noRecord(t, d.dir)
			if _, err := os.Stat(filepath.Join(d.dir, image.PlanName)); err == nil {
				t.Error("a plan is left")
			}
			return
		}
		d.wantRestored(t, srv)
	})
}

// TestOldCRIUUserScriptFails: an action script of the user's ends the dump, and
// nothing is tried again.
func TestOldCRIUUserScriptFails(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		for _, stage := range []string{"pre-dump", "post-dump"} {
			t.Run(stage, func(t *testing.T) {
				srv, path := daemon(t, "unix", "reconnect")
				a := startApp(t, root, nil)
				a.connect(t, "c", path)
				a.Request(t, "c")
				before := a.Details(t, "c")
				dir, at := images(t), images(t)
				script := filepath.Join(at, "script")
				text := fmt.Sprintf("#!/bin/sh\necho x >> %s/$CRTOOLS_SCRIPT_ACTION\ntest $CRTOOLS_SCRIPT_ACTION != %s\n", at, stage)
				if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
				r := a.TryDump(t, dir, "--action-script", script)
				if r.Code == 0 {
					t.Fatalf("the dump did not fail\n%s", r.tail())
				}
				noRecord(t, dir)
				if b, _ := os.ReadFile(filepath.Join(at, stage)); string(b) != "x\n" {
					t.Errorf("the script has seen %q at %s", b, stage)
				}
				a.untouched(t, srv, "c", before)
			})
		}
	})
}

// TestOldCRIUUnderLoad: a dump succeeds, or says why not and harms nobody.
func TestOldCRIUUnderLoad(t *testing.T) {
	oldWays(t, func(t *testing.T) {
		a, srv := hammered(t, root)
		failed := 0
		for range 25 {
			dir := images(t)
			if r := a.TryDump(t, dir, "--leave-running"); r.Code == 0 {
				wantRecorded(t, dir, threads)
			} else {
				failed++
				t.Logf("exit code %d: %s", r.Code, r.Output)
				if r.Output == "" {
					t.Errorf("no word about a dump that failed\n%s", r.tail())
				}
				noRecord(t, dir)
			}
			a.unharmed(t, srv)
		}
		t.Logf("%d of 25 dumps failed", failed)
	})
}
