// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// fakeTrace is where the fake CRIU tells that it was started.
const fakeTrace = "/tmp/fakecriu.trace"

// fakeBinary is test/rpcclients/fakecriu.c, built once: a fake.
var fakeBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "fakecriu")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "fake-criu")
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-static", "-o", bin, "rpcclients/fakecriu.c").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the fake: %w\n%s", err, out)
	}
	return bin, os.Chmod(dir, 0o755)
})

func fakeCRIU(t testing.TB) string {
	t.Helper()
	bin, err := fakeBinary()
	if err != nil {
		t.Fatal(err)
	}
	if err = os.WriteFile(fakeTrace, nil, 0o666); err == nil {
		err = os.Chmod(fakeTrace, 0o666) // others than root start it, too
	}
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// fakeStarts is how often the fake was started.
func fakeStarts() int {
	b, _ := os.ReadFile(fakeTrace)
	return strings.Count(string(b), "\n")
}

var versionRequest = &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()}

// tryVersion asks for the version on a connection of its own.
func (s *Service) tryVersion(t testing.TB) error {
	c := s.dial(t)
	defer c.Close()
	b, err := proto.Marshal(versionRequest)
	if err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	resp, err := c.try()
	if err != nil {
		return err
	}
	if !resp.GetSuccess() || resp.GetVersion().GetMajorNumber() == 0 {
		return fmt.Errorf("%v", resp)
	}
	return nil
}

// many makes n requests, some at the same time.
func (s *Service) many(t *testing.T, n, atOnce int) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make(chan error, atOnce)
	for range atOnce {
		wg.Go(func() {
			for range n / atOnce {
				if err := s.tryVersion(t); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

// wantIdle checks that nothing is left of requests: no child, and no fd more
// than before.
func (s *Service) wantIdle(t *testing.T, fds int) {
	t.Helper()
	eventually(t, "the service to have let go of all", func() bool {
		return len(s.children()) == 0 && s.descriptors() <= fds
	})
}

// TestServiceMany: 10,000 requests by a fake of CRIU, and hundreds by CRIU.
func TestServiceMany(t *testing.T) {
	need(t)
	for _, tt := range []struct {
		name     string
		args     []string
		requests int
	}{
		{"a fake", []string{"--log-level", "info", "--criu", fakeCRIU(t)}, 10000},
		{"CRIU", []string{"--log-level", "info"}, 300},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startService(t, tt.args...)
			s.many(t, 20, 4) // what is opened once
			before := s.descriptors()
			s.many(t, tt.requests, 8)
			s.wantIdle(t, before)
			if tt.name == "a fake" {
				if n := fakeStarts(); n != tt.requests+20 {
					t.Errorf("CRIU was started %d times for %d requests", n, tt.requests+20)
				}
			}
			s.stop(t)
		})
	}
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServicePreDumps: several requests on one connection have one CRIU, a fake
// one here: of real ones the kernel may not let see memory change.
func TestServicePreDumps(t *testing.T) {
	need(t)
	s := startService(t, "--criu", fakeCRIU(t))
	a := startApp(t, root, nil)
	got := libcriuAt("unix:"+s.Path)(t, "iters", images(t), strconv.Itoa(a.PID), "leave")
	if want := "pre-dump 1 is done\npre-dump 2 is done\nresult 0\n"; got != want {
		t.Errorf("%q, expected %q", got, want)
	}
	if n := fakeStarts(); n != 1 {
		t.Errorf("CRIU was started %d times", n)
	}
	s.stop(t)
	nothingLeft(t)
}

// TestService50: 50 clients have 50 processes dumped and restored at the same time.
func TestService50(t *testing.T) {
	need(t)
	s := startService(t)
	_, path := daemon(t, "unix", "reconnect")
	const n = 50
	apps, dirs := make([]*App, n), make([]string, n)
	var wg sync.WaitGroup
	for i := range apps {
		apps[i], dirs[i] = startApp(t, root, nil), images(t)
		apps[i].connect(t, "c", path)
		apps[i].Request(t, "c")
	}
	before := s.descriptors()
	all := func(kind rpc.CriuReqType) {
		t.Helper()
		for i := range apps {
			d, c := openDir(t, dirs[i]), s.dial(t)
			req := dumpRequest(d, apps[i].PID)
			req.Type, req.Opts.LogFile = kind.Enum(), proto.String(kind.String()+".log")
			wg.Go(func() {
				defer c.Close()
				defer d.Close()
				b, err := proto.Marshal(req)
				if err == nil {
					_, err = c.Write(b)
				}
				var resp *rpc.CriuResp
				if err == nil {
					resp, err = c.try()
				}
				if err != nil || !resp.GetSuccess() {
					t.Errorf("%v of process %d: %v, %v\n%s", kind, apps[i].PID, resp, err, tailOf(filepath.Join(dirs[i], kind.String()+".log")))
				}
			})
		}
		wg.Wait()
	}
	all(rpc.CriuReqType_DUMP)
	if t.Failed() {
		return
	}
	for _, a := range apps {
		a.Gone(t)
	}
	all(rpc.CriuReqType_RESTORE)
	if t.Failed() {
		return
	}
	for _, a := range apps {
		a.Request(t, "c")
		a.Kill(t)
	}
	s.wantIdle(t, before)
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServiceNonsense: what is no request is answered, and does no harm.
func TestServiceNonsense(t *testing.T) {
	need(t)
	s := startService(t, "--criu", fakeCRIU(t))
	before := s.descriptors()
	good, err := proto.Marshal(dumpRequest(openDir(t, images(t)), 1))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		what  []byte
		errno unix.Errno
	}{
		{"garbage", []byte("\xff\xfe garbage"), unix.EBADMSG},
		{"truncated", good[:len(good)-3], unix.EBADMSG},
		{"one byte", good[:1], unix.EBADMSG},
		{"too large", make([]byte, 2<<20), unix.EMSGSIZE},
	} {
		c := s.dial(t)
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20) })
		if _, err := c.Write(tt.what); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		resp := c.receive(t)
		if resp.GetSuccess() || unix.Errno(resp.GetCrErrno()) != tt.errno || resp.GetType() != rpc.CriuReqType_EMPTY || resp.GetCrErrmsg() == "" {
			t.Errorf("%s: %v", tt.name, resp)
		}
		if _, err := c.try(); err != io.EOF {
			t.Errorf("%s: the connection goes on: %v", tt.name, err)
		}
	}
	// And a client that says nothing, or goes.
	s.dial(t).Close()
	quiet := s.dial(t)
	// What only CRIU's parent can ask for.
	for what, change := range map[string]func(*rpc.CriuOpts){
		"inherit_fd":  func(o *rpc.CriuOpts) { o.InheritFd = []*rpc.InheritFd{{Key: proto.String("x"), Fd: proto.Int32(0)}} },
		"rst_sibling": func(o *rpc.CriuOpts) { o.RstSibling = proto.Bool(true) },
		"ps.fd":       func(o *rpc.CriuOpts) { o.Ps = &rpc.CriuPageServerInfo{Fd: proto.Int32(0)} },
	} {
		req := dumpRequest(openDir(t, images(t)), 1)
		change(req.Opts)
		c := s.dial(t)
		c.send(t, req)
		if resp := c.receive(t); resp.GetSuccess() || unix.Errno(resp.GetCrErrno()) != unix.EBADRQC || !strings.Contains(resp.GetCrErrmsg(), what) {
			t.Errorf("%s: %v", what, resp)
		}
	}
	if n := fakeStarts(); n != 0 {
		t.Errorf("CRIU was started %d times", n)
	}
	if err := s.tryVersion(t); err != nil {
		t.Errorf("a request of sense: %v", err)
	}
	quiet.Close()
	s.wantIdle(t, before)
	s.stop(t)
	nothingLeft(t)
}
