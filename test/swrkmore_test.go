// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/test/echo"
)

// TestSwrkConfigFile: what a configuration file of the request changes (runc has
// one) does not lead us astray.
func TestSwrkConfigFile(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "refuse")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := a.Details(t, "c")
	for _, c := range []struct{ name, line, why string }{
		{"log", "log-file LOG", "rule t-refuse"},
		{"images", "log-file LOG\nimages-dir OTHER", "take images-dir out of"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, other := images(t), images(t)
			log := filepath.Join(other, "other.log")
			file := filepath.Join(other, "criu.conf")
			link := filepath.Join(other, "link") // 4.1.1 takes no directory by its name
			if err := os.Symlink(other, link); err != nil {
				t.Fatal(err)
			}
			text := strings.NewReplacer("LOG", log, "OTHER", link).Replace(c.line)
			if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			req := a.dumpRequest(t, dir)
			req.Opts.ConfigFile = &file
			resp, _ := clientOf(t, bySwrk).ask(req, agree)
			if resp == nil || resp.GetSuccess() {
				t.Errorf("CRIU answered %v", resp)
			}
			if said := logOf(other, "other.log"); !strings.Contains(said, c.why) {
				t.Errorf("CRIU's log does not say %q:\n%s", c.why, Result{Log: said}.tail())
			}
			a.untouched(t, srv, "c", before)
		})
	}
}

// TestSwrkExecCmd: a CRIU that becomes another program does not keep the sockets
// that it was given.
func TestSwrkExecCmd(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir := a.Dump(t)
	c := clientOf(t, bySwrk)
	req := restoreRequest(t, dir)
	req.Opts.ExecCmd = []string{"sleep", "1000"}
	resp, _ := c.ask(req, agree)
	succeeded(t, resp, logOf(dir, "restore.log"))
	if next := c.receive(); next != nil {
		t.Errorf("then CRIU said %v", next)
	}
	a.Request(t, "c")
	if !strings.Contains(logOf(dir, "restore.log"), "inherit") {
		t.Error("the socket was not inherited")
	}
	_ = unix.Kill(a.PID, unix.SIGKILL)
	if err := srv.Await("EOF", func(c []echo.Client) bool { return echo.Open(c) == 0 }); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(c.cmd.Process.Pid, 0); err != nil {
		t.Errorf("the command that CRIU became: %v", err)
	}
	nothingLeft(t)
	_ = c.cmd.Process.Kill()
	c.end()
	a.Gone(t)
}

// TestSwrkSelf: without a pid CRIU is to dump who asks: the client, and not the
// process in between.
func TestSwrkSelf(t *testing.T) {
	need(t)
	dir := images(t)
	a := startApp(t, root, nil)
	req := a.dumpRequest(t, dir)
	req.Opts.Pid, req.Opts.NotifyScripts = nil, proto.Bool(true)
	c := clientOf(t, bySwrk)
	// This very process: refused here, before it is frozen.
	_, stages := c.ask(req, func(string) *rpc.CriuReq { return nil })
	if len(stages) != 1 || stages[0] != "pre-dump" {
		t.Errorf("stages %q", stages)
	}
	c.end()
	log := logOf(dir, "dump.log")
	if want := "Dumping processes (pid: " + strconv.Itoa(os.Getpid()); !strings.Contains(log, want) {
		t.Errorf("CRIU's log does not say %q:\n%s", want, Result{Log: log}.tail())
	}
	nothingLeft(t)
}

// TestSwrkManySockets: more than one message can carry (SCM_MAX_FD).
func TestSwrkManySockets(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	const n = 300
	for i := range n {
		a.connect(t, strconv.Itoa(i), path)
	}
	dir := a.Dump(t)
	resp, _ := clientOf(t, bySwrk).ask(restoreRequest(t, dir), agree)
	succeeded(t, resp, logOf(dir, "restore.log"))
	for i := range n {
		a.Request(t, strconv.Itoa(i))
	}
	for _, c := range srv.Clients()[n:] {
		if int(c.PID) != a.PID {
			t.Fatalf("the daemon sees process %d, expected %d: the socket was not inherited", c.PID, a.PID)
		}
	}
	nothingLeft(t)
}

// TestSwrkAndScript: who has set up both, in place of CRIU and as an action script
// of runc's configuration file, has each connection once.
func TestSwrkAndScript(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir := images(t)
	file := filepath.Join(images(t), "criu.conf")
	if err := os.WriteFile(file, []byte("action-script "+criuhook+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	req := a.dumpRequest(t, dir)
	req.Opts.ConfigFile = &file
	resp, _ := clientOf(t, bySwrk).ask(req, agree)
	succeeded(t, resp, logOf(dir, "dump.log"))
	a.Dumped(t, dir)
	wantRecorded(t, dir, 1)
	req = restoreRequest(t, dir)
	req.Opts.ConfigFile = &file
	resp, _ = clientOf(t, bySwrk).ask(req, agree)
	succeeded(t, resp, logOf(dir, "restore.log"))
	a.Request(t, "c")
	wantClients(t, srv, 1, 1)
	nothingLeft(t)
}

// TestSwrkTerminal: the master of a terminal that the restore makes comes to the
// client, with the notification that carries it.
func TestSwrkTerminal(t *testing.T) {
	need(t)
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	// It opens the terminal itself: as the leader of a session it is its own.
	p := start(t, root, nil, "perl", "-e", `open(STDIN, "+<", shift) or die; open(STDOUT, ">&", STDIN); $| = 1; while (<STDIN>) { print "got $_" }`, fmt.Sprintf("/dev/pts/%d", n))
	talk := func(f *os.File) {
		t.Helper()
		if _, err := f.WriteString("word\n"); err != nil {
			t.Fatal(err)
		}
		var heard string
		for b := make([]byte, 100); !strings.Contains(heard, "got word"); {
			fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
			if ready, err := unix.Poll(fds, int(patience.Milliseconds())); err == unix.EINTR {
				continue
			} else if ready == 0 {
				t.Fatalf("the terminal says only %q", heard)
			}
			n, err := unix.Read(int(f.Fd()), b)
			if err != nil {
				t.Fatal(err)
			}
			heard += string(b[:n])
		}
	}
	talk(master)
	dir := images(t)
	req := p.dumpRequest(t, dir)
	req.Opts.OrphanPtsMaster = proto.Bool(true)
	resp, _ := clientOf(t, bySwrk).ask(req, agree)
	succeeded(t, resp, logOf(dir, "dump.log"))
	p.Gone(t)
	master.Close() // its number is free
	req = restoreRequest(t, dir)
	req.Opts.OrphanPtsMaster, req.Opts.NotifyScripts = proto.Bool(true), proto.Bool(true)
	c := clientOf(t, bySwrk)
	resp, stages := c.ask(req, agree)
	succeeded(t, resp, logOf(dir, "restore.log"))
	if len(c.files) != 1 || !slices.Contains(stages, "orphan-pts-master") {
		t.Fatalf("%d files came, notifications were %q", len(c.files), stages)
	}
	talk(c.files[0])
	c.files[0].Close()
	nothingLeft(t)
}
