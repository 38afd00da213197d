// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// TestAccessDescriptors: her process has become a program with more rights, and has
// a directory open that she has no way to, though she could write in it.
func TestAccessDescriptors(t *testing.T) {
	need(t)
	s := startService(t, "--config", withAccess(t, "{uids: [1000]}"))
	a := startVisible(t, alice)
	dir := filepath.Join(images(t), "hers")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, int(alice.UID), int(alice.GID)), os.Chmod(filepath.Dir(dir), 0o700)); err != nil {
		t.Fatal(err)
	}
	req := &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{
		ImagesDirFd: proto.Int32(9), Pid: proto.Int32(int32(a.PID)), LeaveRunning: proto.Bool(true),
	}}
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// What counts for the kernel is the effective uid at connect; the others stay root's.
	cmd := exec.CommandContext(ctx, "perl", "-e", `use Socket; use POSIX; local $/; my $m = <STDIN>;
		POSIX::dup2(POSIX::open($ARGV[1], O_RDONLY), 9) or die; $) = "1000 1000"; $> = 1000;
		socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die "connect: $!";
		$> = 0; send($s, $m, 0) or die; recv($s, my $a, 65536, 0); print $a`, s.Path, dir)
	cmd.Stdin = strings.NewReader(string(b))
	out, err := cmd.Output()
	resp := &rpc.CriuResp{}
	if err = errors.Join(err, proto.Unmarshal(out, resp)); err != nil {
		t.Fatal(err)
	}
	if files, _ := os.ReadDir(dir); resp.GetSuccess() || len(files) > 0 {
		t.Errorf("%v; there are %v", resp, files)
	}
	// CRIU may have a reason of its own to fail.
	eventually(t, "the reason", func() bool {
		return strings.Contains(s.Log.String(), "uid 1000: DUMP of process") && strings.Contains(s.Log.String(), "/fd/9: permission denied")
	})
	a.Awake(t)
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// hold has a user hold a connection until the test ends.
func (s *Service) hold(t testing.TB, u User) {
	t.Helper()
	cmd := exec.Command("perl", "-e",
		`use Socket; socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die "connect: $!"; $| = 1; print "on"; <STDIN>`, s.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err = errors.Join(err, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	if _, err := io.ReadFull(out, make([]byte, 2)); err != nil {
		t.Fatalf("a connection of uid %d: %v", u.UID, err)
	}
}

// TestAccessConnections: users together leave connections free for root, whether
// they may do anything or not.
func TestAccessConnections(t *testing.T) {
	need(t)
	s := startService(t, "--criu", fakeCRIU(t), "--config", withAccess(t, "{uids: [1000, 1001], clients: 8}"))
	refused := func(u User, why string) {
		t.Helper()
		resp := &rpc.CriuResp{}
		if err := proto.Unmarshal(asUser(t, u, s.Path, nil), resp); err != nil {
			t.Fatal(err)
		}
		if unix.Errno(resp.GetCrErrno()) != unix.EBUSY || !strings.Contains(resp.GetCrErrmsg(), why) {
			t.Errorf("uid %d: %v", u.UID, resp)
		}
	}
	for range 4 {
		s.hold(t, alice)
	}
	refused(alice, "half of all connections")
	for range 2 {
		s.hold(t, mallory)
	}
	refused(mallory, "users other than root have 6")
	refused(User{UID: 1002, GID: 1002}, "users other than root have 6")
	for range 3 {
		if err := s.tryVersion(t); err != nil {
			t.Errorf("root: %v", err)
		}
	}
	s.stop(t)
	nothingLeft(t)
}
