// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

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

// TestUnacceptedElsewhere: in a network namespace of its own, beside connections
// that are reconnected.
func TestUnacceptedElsewhere(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		l := rawListener(t, "reconnect", 8)
		a := startApp(t, alice, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
		a.restoreArgs = emptyNet
		for _, c := range []string{"c1", "c2"} {
			a.connect(t, c, path)
			a.Request(t, c)
		}
		a.connect(t, "waits", l.path)
		a.connect(t, "waits with a request", l.path)
		a.Do(t, app.Command{Op: "write", Conn: "waits with a request", Text: "a request\n"})
		a.pair(t)
		dir := a.Dump(t, append(emptyNet, "--network-lock=skip")...)
		wantRecorded(t, dir, 4)
		a.restoreAnew(t, a.restoreBy, dir, emptyNet...)
		for _, c := range []string{"c1", "c2"} {
			a.Request(t, c)
		}
		a.wantHungUp(t, "waits", "waits with a request")
		a.usePair(t)
		wantClients(t, srv, 2, 2)
		nothingLeft(t)
	})
}

// TestUnacceptedUnderADebugger: CRIU is traced by somebody else, so that nothing
// can be hidden from it.
func TestUnacceptedUnderADebugger(t *testing.T) {
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) {
		l := rawListener(t, "reconnect", 8)
		a := startApp(t, root, nil)
		a.connect(t, "c", l.path)
		before := a.Details(t, "c")
		debugger := startApp(t, root, nil)
		// At pre-dump the parent of the script, CRIU, is traced.
		script := debugger.tracesCRIU(t)
		dir := images(t)
		a.TryDump(t, dir, "--action-script="+script).failed(t, dir, fmt.Sprint("process ", a.PID), l.path, "not accepted", "dump again when the peer has accepted it")
		debugger.Kill(t)
		if after := a.Details(t, "c"); after != before {
			t.Errorf("after the dump %+v, before it %+v", after, before)
		}
		srv := l.serve(t)
		a.Request(t, "c") // the connection it had
		wantClients(t, srv, 0, 1)
		nothingLeft(t)
	})
}

// tracesCRIU is an action script that has a process trace CRIU.
func (a *App) tracesCRIU(t testing.TB) string {
	t.Helper()
	script := filepath.Join(images(t), "script")
	const perl = `#!/usr/bin/perl
use Socket;
exit 0 unless $ENV{CRTOOLS_SCRIPT_ACTION} eq "pre-dump";
socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
connect($s, pack_sockaddr_un("%s")) or die "connect: $!";
syswrite($s, '{"Op":"trace","Value":' . getppid() . "}\n") or die "write: $!";
1 while sysread($s, my $answer, 4096);
`
	if err := os.WriteFile(script, fmt.Appendf(nil, perl, a.Control), 0o755); err != nil {
		t.Fatal(err)
	}
	return script
}
