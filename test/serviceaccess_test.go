// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/test/app"
)

// mallory is a user whom no configuration names.
var mallory = User{UID: 1001, GID: 1001, Groups: []uint32{1001}}

// withAccess is a configuration with the tests' rules that lets somebody in.
func withAccess(t testing.TB, section string) string {
	t.Helper()
	dir := images(t) // root's alone
	name := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(name, []byte(rules+"service: "+section+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// libcriuBy runs the C client as a user, in a session of its own.
func libcriuBy(t testing.TB, u User, args ...string) string {
	t.Helper()
	bin, err := libcriuBinary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}}
	out, _ := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Errorf("the client does not end: %q", args)
	}
	return string(out)
}

// imagesOf is a directory for images that belongs to a user.
func imagesOf(t testing.TB, u User) string {
	t.Helper()
	dir := images(t)
	if err := os.Chown(dir, int(u.UID), int(u.GID)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startVisible starts an application whose program its user can see: as that user
// CRIU looks at it.
func startVisible(t testing.TB, u User) *App {
	t.Helper()
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	file, control := filepath.Join(dir, "app"), filepath.Join(dir, "control")
	if err := os.WriteFile(file, program, 0o755); err != nil {
		t.Fatal(err)
	}
	a := &App{Process: start(t, u, nil, file, app.Role, control), Control: control}
	a.alive = a.Awake
	a.Awake(t)
	return a
}

// TestAccess: a user dumps a process of hers, and root restores it.
func TestAccess(t *testing.T) {
	need(t)
	for _, section := range []string{"{uids: [1000]}", "{gids: [2001]}"} {
		t.Run(section, func(t *testing.T) {
			s := startService(t, "--config", withAccess(t, section))
			srv, path := daemon(t, "unix", "reconnect")
			a := startVisible(t, alice)
			a.connect(t, "c", path)
			a.Request(t, "c")
			dir := imagesOf(t, alice)
			got := libcriuBy(t, alice, "unix:"+s.Path, "dump", dir, strconv.Itoa(a.PID), "notify")
			if !strings.HasSuffix(got, "result 0\n") || !strings.Contains(got, "notify post-dump\n") {
				t.Fatalf("%q\n%s", got, tailOf(filepath.Join(dir, "criu.log")))
			}
			a.Gone(t)
			// All that was written is hers: nobody wrote with more rights.
			files, _ := filepath.Glob(filepath.Join(dir, "*"))
			ours := false
			for _, f := range files {
				var st unix.Stat_t
				if err := unix.Lstat(f, &st); err != nil || st.Uid != alice.UID || st.Gid != alice.GID {
					t.Errorf("%s belongs to uid %d, gid %d: %v", f, st.Uid, st.Gid, err)
				}
				ours = ours || filepath.Base(f) == "criuhook.img"
			}
			if !ours {
				t.Errorf("there is no criuhook.img among %q", files)
			}
			// Her own restore is refused, root's is not.
			if got := libcriuBy(t, alice, "unix:"+s.Path, "restore", dir); !strings.HasPrefix(got, "result -") {
				t.Errorf("restore: %q", got)
			}
			if !isFree(a.PID) {
				t.Fatal("something was restored")
			}
			p := &Process{PID: a.PID, User: alice, restoreBy: byRPC}
			t.Cleanup(func() { p.Kill(t) })
			p.Restore(t, dir)
			a.Request(t, "c")
			if c := srv.Clients(); len(c) != 2 || c[1].UID != alice.UID {
				t.Errorf("the daemon saw %+v", c)
			}
			p.Kill(t)
			s.stop(t)
		})
	}
	nothingLeft(t)
	noCRIULeft(t)
}

// TestAccessRefused: nothing happens but a refusal and a line in the log: no CRIU
// is started, nothing is written.
func TestAccessRefused(t *testing.T) {
	need(t)
	s := startService(t, "--criu", fakeCRIU(t), "--config", withAccess(t, "{uids: [1000]}"))
	hers, roots, setuid := startApp(t, alice, nil), startApp(t, root, nil), startSetuid(t)
	child := startApp(t, alice, nil)
	inHers := withRootsChild(t)
	for _, tt := range []struct {
		name string
		by   User
		args []string
		want string // in the log
	}{
		{"a stranger's version", mallory, []string{"version"}, "may not use this service"},
		{"a stranger's own process", mallory, []string{"dump", "DIR", strconv.Itoa(startApp(t, mallory, nil).PID)}, "may not use this service"},
		{"hers, by a stranger", mallory, []string{"dump", "DIR", strconv.Itoa(hers.PID)}, "may not use this service"},
		{"root's", alice, []string{"dump", "DIR", strconv.Itoa(roots.PID)}, "may not have process"},
		{"pid 1", alice, []string{"dump", "DIR", "1"}, "may not have process 1"},
		{"the service", alice, []string{"dump", "DIR", strconv.Itoa(s.cmd.Process.Pid)}, "may not have process"},
		{"a set-user-id program", alice, []string{"dump", "DIR", strconv.Itoa(setuid)}, "may not have process"},
		{"hers with a child of root's", alice, []string{"dump", "DIR", strconv.Itoa(inHers)}, "may not have process"},
		{"a pre-dump of root's", alice, []string{"predump", "DIR", strconv.Itoa(roots.PID)}, "may not have process"},
		{"pre-dumps of root's", alice, []string{"iters", "DIR", strconv.Itoa(roots.PID)}, "may not have process"},
		{"a restore", alice, []string{"restore", "DIR"}, "may not restore"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := imagesOf(t, tt.by)
			args := append([]string{"unix:" + s.Path}, tt.args...)
			for i := range args {
				if args[i] == "DIR" {
					args[i] = dir
				}
			}
			before := strings.Count(s.Log.String(), "refused: ")
			got := libcriuBy(t, tt.by, args...)
			if !strings.Contains(got, "result -") && !strings.Contains(got, "version -") {
				t.Errorf("%q", got)
			}
			eventually(t, "a line in the log", func() bool { return strings.Count(s.Log.String(), "refused: ") > before })
			log := s.Log.String()
			if strings.Count(log, "refused: ") != before+1 || !strings.Contains(log[strings.LastIndex(log, "refused: "):], tt.want) {
				t.Errorf("the log says\n%s", log)
			}
			if files, _ := os.ReadDir(dir); len(files) > 0 && tt.args[0] != "iters" { // that makes directories
				t.Errorf("there are %v", files)
			}
		})
	}
	if n := fakeStarts(); n != 0 {
		t.Errorf("CRIU was started %d times", n)
	}
	// What she may, and as whom CRIU then runs.
	if got := libcriuBy(t, alice, "unix:"+s.Path, "dump", imagesOf(t, alice), strconv.Itoa(child.PID), "leave"); got != "result 0\n" {
		t.Errorf("a dump of her own: %q", got)
	}
	if b, _ := os.ReadFile(fakeTrace); string(b) != "started uid 1000 euid 1000\n" {
		t.Errorf("CRIU was started as %q", b)
	}
	for _, a := range []*App{hers, roots, child} {
		a.Awake(t)
	}
	s.stop(t)
	nothingLeft(t)
}

// TestAccessLinks: the directory is hers, and so is what its names lead to. Neither
// CRIU nor we write where she could not.
func TestAccessLinks(t *testing.T) {
	need(t)
	s := startService(t, "--config", withAccess(t, "{uids: [1000]}"))
	a := startVisible(t, alice)
	// Links in her directory, by the names that CRIU and we write to.
	secret := filepath.Join(images(t), "secret")
	if err := os.WriteFile(secret, []byte("root's"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"files.img", "criu.log", "criuhook.plan", "criuhook.img", "inventory.img", fmt.Sprintf("core-%d.img", a.PID)} {
		t.Run(name, func(t *testing.T) {
			dir := imagesOf(t, alice)
			if err := os.Symlink(secret, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
			got := libcriuBy(t, alice, "unix:"+s.Path, "dump", dir, strconv.Itoa(a.PID), "leave")
			t.Logf("%s", got)
			if b, err := os.ReadFile(secret); err != nil || string(b) != "root's" {
				t.Errorf("root's file has become %.60q, %v", b, err)
			}
			var st unix.Stat_t
			if err := unix.Stat(secret, &st); err != nil || st.Uid != 0 || st.Mode&0o777 != 0o600 {
				t.Errorf("root's file: %+v, %v", st, err)
			}
			a.Awake(t)
		})
	}
	// And a directory that is not hers.
	t.Run("directory", func(t *testing.T) {
		dir := images(t)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		got := libcriuBy(t, alice, "unix:"+s.Path, "dump", dir, strconv.Itoa(a.PID), "leave")
		if files, _ := os.ReadDir(dir); len(files) > 0 || !strings.HasPrefix(got, "result -") {
			t.Errorf("%q; there are %v", got, files)
		}
	})
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// startSetuid starts a process of alice's that has become root: its real ids are hers.
func startSetuid(t testing.TB) int {
	t.Helper()
	cmd := exec.Command("perl", "-e", `$< = 1000; $( = 1000; sleep 1000`)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, "the set-user-id program", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		return strings.Contains(string(b), "Uid:\t1000\t0\t0\t0")
	})
	return cmd.Process.Pid
}

// withRootsChild starts a process of alice's with a child that is root's, as of sudo.
func withRootsChild(t testing.TB) int {
	t.Helper()
	cmd := exec.Command("perl", "-e", `use POSIX; if (!fork) { sleep 1000; exit } POSIX::setgid(1000); $( = "1000"; $) = "1000 1000"; POSIX::setuid(1000); sleep 1000`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &Process{PID: cmd.Process.Pid, started: cmd}
	t.Cleanup(func() { p.Kill(t) })
	eventually(t, "the process of alice's", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		return strings.Contains(string(b), "Uid:\t1000\t1000\t1000\t1000") && len(sessionOf(cmd.Process.Pid)) == 2
	})
	return cmd.Process.Pid
}

// TestAccessOptions: what would have root do something for her.
func TestAccessOptions(t *testing.T) {
	need(t)
	s := startService(t, "--criu", fakeCRIU(t), "--config", withAccess(t, "{uids: [1000]}"))
	a := startApp(t, alice, nil)
	dir := imagesOf(t, alice)
	for name, change := range map[string]func(*rpc.CriuOpts){
		"exec_cmd":    func(o *rpc.CriuOpts) { o.ExecCmd = []string{"/bin/sh"} },
		"config_file": func(o *rpc.CriuOpts) { o.ConfigFile = proto.String("/tmp/evil.conf") },
		"root":        func(o *rpc.CriuOpts) { o.Root = proto.String("/") },
		"external":    func(o *rpc.CriuOpts) { o.External = []string{"unix[1]"} },
		"images_dir":  func(o *rpc.CriuOpts) { o.ImagesDir = proto.String("/etc") },
		"log_file":    func(o *rpc.CriuOpts) { o.LogFile = proto.String("../../etc/passwd") },
	} {
		req := dumpRequest(openDir(t, dir), a.PID)
		change(req.Opts)
		b, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		out := asUser(t, alice, s.Path, b)
		resp := &rpc.CriuResp{}
		if err := proto.Unmarshal(out, resp); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if resp.GetSuccess() || resp.GetType() != rpc.CriuReqType_DUMP || !strings.Contains(resp.GetCrErrmsg(), name) {
			t.Errorf("%s: %v", name, resp)
		}
	}
	if n := fakeStarts(); n != 0 {
		t.Errorf("CRIU was started %d times", n)
	}
	s.stop(t)
	nothingLeft(t)
}

// TestAccessSetuid: a CRIU that is set-user-id root does not become root for her.
func TestAccessSetuid(t *testing.T) {
	need(t)
	program, err := os.ReadFile(fakeCRIU(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := images(t)
	file := filepath.Join(dir, "criu-setuid")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(file, program, 0o755), os.Chmod(file, 0o755|os.ModeSetuid)); err != nil {
		t.Fatal(err)
	}
	// It works as such: else there is nothing to see.
	cmd := exec.Command(file, "swrk", "-1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice.UID, Gid: alice.GID}}
	_ = cmd.Run()
	if b, _ := os.ReadFile(fakeTrace); string(b) != "started uid 1000 euid 0\n" {
		t.Fatalf("a set-user-id program was started as %q", b)
	}
	fakeCRIU(t)
	s := startService(t, "--criu", file, "--config", withAccess(t, "{uids: [1000]}"))
	a := startApp(t, alice, nil)
	if got := libcriuBy(t, alice, "unix:"+s.Path, "dump", imagesOf(t, alice), strconv.Itoa(a.PID), "leave"); got != "result 0\n" {
		t.Errorf("%q", got)
	}
	if b, _ := os.ReadFile(fakeTrace); string(b) != "started uid 1000 euid 1000\n" {
		t.Errorf("CRIU was started as %q", b)
	}
	s.stop(t)
	nothingLeft(t)
}

// asUser sends one message as a user, if there is one, and returns the answer.
func asUser(t testing.TB, u User, path string, msg []byte) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "perl", "-e",
		`use Socket; local $/; my $m = <STDIN>; socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die "connect: $!"; !length $m or send($s, $m, 0) or die; recv($s, my $a, 65536, 0); print $a`, path)
	cmd.Stdin = strings.NewReader(string(msg))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("send as uid %d: %v", u.UID, err)
	}
	return out
}
