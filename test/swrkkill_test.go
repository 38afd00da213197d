// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/test/echo"
)

// relayOf finds the process between a client and its CRIU.
func relayOf(t testing.TB, c *swrkConn) (pid int) {
	t.Helper()
	want := fmt.Sprintf("\x00--criu-pid\x00%d\x00", c.cmd.Process.Pid)
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range lines {
		b, _ := os.ReadFile(name)
		if strings.Contains(string(b), "\x00relay\x00") && strings.Contains(string(b), want) {
			_, _ = fmt.Sscanf(name, "/proc/%d/", &pid)
		}
	}
	if pid == 0 {
		t.Fatalf("CRIU, process %d, has no relay", c.cmd.Process.Pid)
	}
	return pid
}

// TestSwrkKilled: whoever of the three is killed, and when, the application of a
// dump runs on as it was, a restore leaves nothing, and the others end.
func TestSwrkKilled(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := a.Details(t, "c")
	kill := map[string]func(*testing.T, *swrkConn){
		"client": func(_ *testing.T, c *swrkConn) { c.conn.Close() }, // all that CRIU sees of it
		"criu":   func(_ *testing.T, c *swrkConn) { _ = c.cmd.Process.Kill() },
		"relay": func(t *testing.T, c *swrkConn) {
			_ = unix.Kill(relayOf(t, c), unix.SIGKILL)
		},
	}
	for who, do := range kill {
		for _, at := range []string{"pre-dump", "query-ext-files", "post-dump"} {
			t.Run(who+" at "+at, func(t *testing.T) {
				dir := images(t)
				req := a.dumpRequest(t, dir)
				req.Opts.NotifyScripts = proto.Bool(true)
				c := clientOf(t, bySwrk)
				resp, stages := c.ask(req, func(stage string) *rpc.CriuReq {
					if stage == at {
						do(t, c)
						return nil
					}
					return agree(stage)
				})
				if resp != nil || stages[len(stages)-1] != at {
					t.Fatalf("stages %q, then %v", stages, resp)
				}
				if who != "client" {
					for next := c.receive(); next != nil; next = c.receive() {
						if next.GetSuccess() && next.GetType() == rpc.CriuReqType_DUMP {
							t.Error("the dump is said to have succeeded")
						}
					}
				}
				c.end()
				nothingLeft(t)
				noCRIULeft(t)
				a.untouched(t, srv, "c", before)
				if _, err := os.Stat(filepath.Join(dir, "criuhook.img")); err == nil && who != "relay" {
					t.Error("there is a record")
				}
			})
		}
	}
	dir := a.Dump(t)
	for who, do := range kill {
		for _, at := range []string{"pre-restore", "post-restore"} {
			t.Run(who+" at "+at, func(t *testing.T) {
				req := restoreRequest(t, dir)
				req.Opts.NotifyScripts = proto.Bool(true)
				c := clientOf(t, bySwrk)
				if _, stages := c.ask(req, func(stage string) *rpc.CriuReq {
					if stage == at {
						do(t, c)
						return nil
					}
					return agree(stage)
				}); len(stages) == 0 || stages[len(stages)-1] != at {
					t.Fatalf("stages %q", stages)
				}
				c.end()
				if who == "criu" { // half restored tasks wait for CRIU for ever, without us, too
					_ = unix.Kill(a.PID, unix.SIGKILL)
				}
				nothingLeft(t)
				noCRIULeft(t)
				a.Gone(t)
			})
		}
	}
	a.Restore(t, dir)
	a.Request(t, "c")
	// Nobody keeps a connection that was made for nothing.
	if err := srv.Await("one open connection", func(c []echo.Client) bool { return echo.Open(c) == 1 }); err != nil {
		t.Error(err)
	}
	nothingLeft(t)
}

// TestSwrkKilledBetween: who waits to become CRIU is killed like CRIU: its client
// finds the end of the connection, and nothing is left.
func TestSwrkKilledBetween(t *testing.T) {
	need(t)
	c := clientOf(t, bySwrk)
	c.send(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)})
	if resp := c.receive(); !resp.GetSuccess() {
		t.Fatalf("CRIU answered %v", resp)
	}
	_ = c.cmd.Process.Kill()
	if resp := c.receive(); resp != nil {
		t.Errorf("then CRIU said %v", resp)
	}
	c.end()
	nothingLeft(t)
	noCRIULeft(t)
}

// TestSwrkRelayEnds: a relay that ends before it wants a CRIU has that said why, but
// for the one reason that is none: its client has gone.
func TestSwrkRelayEnds(t *testing.T) {
	need(t)
	for _, killed := range []bool{false, true} {
		stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		defer stderr.Close()
		c := clientSaying(t, bySwrk, stderr)
		c.send(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)})
		if resp := c.receive(); !resp.GetSuccess() {
			t.Fatalf("CRIU answered %v", resp)
		}
		if killed {
			_ = unix.Kill(relayOf(t, c), unix.SIGKILL)
			if resp := c.receive(); resp != nil { // the end: who waited to become CRIU has ended, too
				t.Errorf("then CRIU said %v", resp)
			}
		}
		if got := c.end(); got != "exit status 255" { // as of CRIU whose client has gone
			t.Errorf("killed %v: %s", killed, got)
		}
		said, err := os.ReadFile(stderr.Name())
		if err != nil || strings.Contains(string(said), "criuhook: Error: take part in what CRIU's RPC is asked for") != killed || !killed && len(said) > 0 {
			t.Errorf("killed %v, said: %q, %v", killed, said, err)
		}
		nothingLeft(t)
		noCRIULeft(t)
	}
}

// TestSwrkOrphans: the process in between is nobody's child that looks, and has
// nothing open but what it needs.
func TestSwrkOrphans(t *testing.T) {
	need(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	dir := images(t)
	req := a.dumpRequest(t, dir)
	req.Opts.NotifyScripts, req.Opts.LeaveRunning = proto.Bool(true), proto.Bool(true)
	c := clientOf(t, bySwrk)
	resp, _ := c.ask(req, func(stage string) *rpc.CriuReq {
		if stage == "pre-dump" {
			pid := relayOf(t, c)
			if p := ppidOf(pid); p == c.cmd.Process.Pid || p == os.Getpid() {
				t.Errorf("the process in between is a child of %d", p)
			}
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.cmd.Process.Pid)); filepath.Base(exe) != "criu" {
				t.Errorf("the caller's child is %s, expected CRIU", exe)
			}
			for fd := range 3 {
				if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); to != os.DevNull {
					t.Errorf("its fd %d is %s", fd, to)
				}
			}
		}
		return agree(stage)
	})
	succeeded(t, resp, logOf(dir, "dump.log"))
	c.end()
	nothingLeft(t)
}
