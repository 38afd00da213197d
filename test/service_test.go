// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// serviceLog is what a service writes.
type serviceLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *serviceLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *serviceLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Service is a running service, ours or CRIU's.
type Service struct {
	Path string
	Log  serviceLog
	cmd  *exec.Cmd
	done chan struct{}
}

// startService starts criuhook serve, with its socket in a folder of its own.
func startService(t testing.TB, args ...string) *Service {
	t.Helper()
	path := filepath.Join(folder(t), "criu.sock")
	return startServiceAs(t, path, exec.Command(criuhook, append([]string{"serve", "--log-level", "debug", "--listen", path}, args...)...))
}

// stockService starts criu service, with our action script or without.
func stockService(t testing.TB, args ...string) *Service {
	t.Helper()
	path := filepath.Join(folder(t), "criu.sock")
	return startServiceAs(t, path, exec.Command("criu", append([]string{"service", "--address", path}, args...)...))
}

// startServiceAs starts it by a command and waits until it listens.
func startServiceAs(t testing.TB, path string, cmd *exec.Cmd) *Service {
	t.Helper()
	// The directory of the service has nothing to do with anybody's.
	cmd.Dir = filepath.Dir(path)
	s := runService(t, path, cmd)
	eventually(t, "the service listens", func() bool {
		c, err := net.Dial("unixpacket", path)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s
}

func runService(t testing.TB, path string, cmd *exec.Cmd) *Service {
	t.Helper()
	s := &Service{Path: path, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &s.Log, &s.Log
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(s.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			t.Logf("the service said:\n%s", s.Log.String())
		}
	})
	return s
}

// stop tells the service to end and waits until it has.
func (s *Service) stop(t testing.TB) {
	t.Helper()
	_ = s.cmd.Process.Signal(unix.SIGTERM)
	s.ended(t)
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the service ended with status %d:\n%s", code, s.Log.String())
	}
	if _, err := os.Lstat(s.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the service has left its socket: %v", err)
	}
}

func (s *Service) ended(t testing.TB) {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(criuTime):
		t.Fatalf("the service does not end:\n%s", s.Log.String())
	}
}

// descriptors counts the fds of the service.
func (s *Service) descriptors() int {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	return len(fds)
}

// children lists the children of the service, zombies too.
func (s *Service) children() (out []string) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) > 1 && f[1] == fmt.Sprint(s.cmd.Process.Pid) {
			out = append(out, string(b))
		}
	}
	return out
}

// rpcConn is a connection to a service.
type rpcConn struct{ *net.UnixConn }

func (s *Service) dial(t testing.TB) rpcConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.Path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(criuTime)); err != nil {
		t.Fatal(err)
	}
	return rpcConn{c}
}

func (c rpcConn) send(t testing.TB, req *rpc.CriuReq) {
	t.Helper()
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func (c rpcConn) try() (*rpc.CriuResp, error) {
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	if errors.Is(err, syscall.ECONNRESET) { // said once; the last words may still come
		n, err = c.Read(b)
	}
	if err != nil {
		return nil, err
	}
	resp := &rpc.CriuResp{}
	return resp, proto.Unmarshal(b[:n], resp)
}

func (c rpcConn) receive(t testing.TB) *rpc.CriuResp {
	t.Helper()
	resp, err := c.try()
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	return resp
}

// dumpRequest is a request to dump; images is an open directory of ours.
func dumpRequest(images *os.File, pid int) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{
		ImagesDirFd: proto.Int32(int32(images.Fd())),
		Pid:         proto.Int32(int32(pid)),
		LogLevel:    proto.Int32(4), LogFile: proto.String("dump.log"),
	}}
}

func openDir(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func tailOf(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-25):], "\n")
}

// TestService: a process with a connection to a daemon is dumped and restored
// through the socket.
func TestService(t *testing.T) {
	need(t)
	s := startService(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.Do(t, app.Command{Op: "open", Conn: "c", To: path, Type: unix.SOCK_STREAM})
	a.Request(t, "c")
	dir := images(t)
	d := openDir(t, dir)
	c := s.dial(t)
	c.send(t, dumpRequest(d, a.PID))
	if resp := c.receive(t); !resp.GetSuccess() || resp.GetType() != rpc.CriuReqType_DUMP {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
	}
	a.Dumped(t, dir)
	for range 2 { // images can be restored as often as one likes
		c = s.dial(t)
		req := dumpRequest(d, a.PID)
		req.Type, req.Opts.Pid, req.Opts.LogFile = rpc.CriuReqType_RESTORE.Enum(), nil, proto.String("restore.log")
		c.send(t, req)
		if resp := c.receive(t); !resp.GetSuccess() || int(resp.GetRestore().GetPid()) != a.PID {
			t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "restore.log")))
		}
		a.Request(t, "c")
		a.Kill(t)
	}
	if n := len(srv.Clients()); n != 3 {
		t.Errorf("the daemon saw %d connections, expected 3: %+v", n, srv.Clients())
	}
	if err := srv.Await("EOF of all connections", func(c []echo.Client) bool { return echo.Open(c) == 0 }); err != nil {
		t.Error(err)
	}
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServiceRefuses: what a rule refuses runs on, and the reason is where people
// look: in CRIU's log and in the service's.
func TestServiceRefuses(t *testing.T) {
	need(t)
	s := startService(t)
	_, path := daemon(t, "unix", "refuse")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir := images(t)
	c := s.dial(t)
	c.send(t, dumpRequest(openDir(t, dir), a.PID))
	if resp := c.receive(t); resp.GetSuccess() || resp.GetType() != rpc.CriuReqType_DUMP {
		t.Errorf("%v", resp)
	}
	a.Request(t, "c")
	b, err := os.ReadFile(filepath.Join(dir, "dump.log"))
	if err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	for where, text := range map[string]string{"CRIU's log": string(b), "the service's log": s.Log.String()} {
		if !strings.Contains(text, "t-refuse") {
			t.Errorf("%s does not name the rule:\n%s", where, text)
		}
	}
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServiceByScript: our action script under CRIU's own service.
func TestServiceByScript(t *testing.T) {
	need(t)
	s := stockService(t, "--action-script="+criuhook)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.Do(t, app.Command{Op: "open", Conn: "c", To: path, Type: unix.SOCK_STREAM})
	a.Request(t, "c")
	dir := images(t)
	d := openDir(t, dir)
	c := s.dial(t)
	c.send(t, dumpRequest(d, a.PID))
	if resp := c.receive(t); !resp.GetSuccess() {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
	}
	a.Dumped(t, dir)
	c = s.dial(t)
	req := dumpRequest(d, a.PID)
	req.Type, req.Opts.Pid, req.Opts.LogFile = rpc.CriuReqType_RESTORE.Enum(), nil, proto.String("restore.log")
	c.send(t, req)
	if resp := c.receive(t); !resp.GetSuccess() {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "restore.log")))
	}
	a.Request(t, "c")
	if n := len(srv.Clients()); n != 2 {
		t.Errorf("the daemon saw %d connections, expected 2: %+v", n, srv.Clients())
	}
	_ = s.cmd.Process.Kill()
	s.ended(t)
	nothingLeft(t)
}
