// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// All in this file is against a real CRIU, found in PATH.

func needCRIU(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: CRIU needs root")
	}
	if _, err := exec.LookPath("criu"); err != nil {
		t.Skip("SKIP: no CRIU in PATH; use: go test -exec scripts/sandbox")
	}
	nothingLeft(t)
}

// app is a process to dump.
type app struct {
	cmd    *exec.Cmd
	pid    int
	images *os.File
}

func startApp(t *testing.T, stdout ...*os.File) *app {
	t.Helper()
	a := &app{cmd: exec.Command("/bin/sleep", "1000")}
	a.cmd.Dir = "/"
	if len(stdout) > 0 {
		a.cmd.Stdout = stdout[0]
	}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	dir, err := os.MkdirTemp("/tmp", "images")
	if err != nil {
		t.Fatal(err)
	}
	if a.images, err = os.Open(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.images.Close()
		os.RemoveAll(dir)
	})
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a.pid = a.cmd.Process.Pid
	t.Cleanup(func() {
		_ = a.cmd.Process.Kill()
		_ = a.cmd.Wait()
	})
	// Not before it has become sleep: a process cannot be dumped in mid-exec.
	eventually(t, "the application is up", func() bool { return state(a.pid) == "S" })
	return a
}

func (a *app) opts() *rpc.CriuOpts {
	fd := proto.Int32(int32(a.images.Fd()))
	return &rpc.CriuOpts{
		ImagesDirFd: fd, WorkDirFd: fd,
		LogLevel: proto.Int32(4), LogFile: proto.String("rpc.log"),
	}
}

func (a *app) dump(leaveRunning bool) *rpc.CriuReq {
	o := a.opts()
	o.Pid, o.LeaveRunning = proto.Int32(int32(a.pid)), &leaveRunning
	return &rpc.CriuReq{Type: dump.Enum(), Opts: o}
}

func (a *app) log() string {
	b, _ := os.ReadFile(filepath.Join(a.images.Name(), "rpc.log"))
	return string(b)
}

// unharmed: it runs, nobody traces it, and it dies of a signal as it should.
func (a *app) unharmed(t *testing.T) {
	t.Helper()
	eventually(t, "the application runs, that is, it sleeps", func() bool { return state(a.pid) == "S" })
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.pid))
	if err != nil || !strings.Contains(string(b), "\nTracerPid:\t0\n") {
		t.Errorf("the application is traced, or gone: %v\n%s", err, b)
	}
	_ = a.cmd.Process.Signal(syscall.SIGTERM)
	_ = a.cmd.Wait()
	if w, ok := a.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || w.Signal() != syscall.SIGTERM {
		t.Errorf("the application ended with %v", a.cmd.ProcessState)
	}
}

func state(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) == 0 {
		return ""
	}
	return f[0]
}

func TestCRIUVersionAndFeatures(t *testing.T) {
	needCRIU(t)
	c, err := criurpc.Start(criurpc.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	v, err := c.Version(t.Context())
	if err != nil || v.GetMajorNumber() < 3 {
		t.Errorf("version %v, %v", v, err)
	}
	f, err := c.Features(t.Context(), &rpc.CriuFeatures{PidfdStore: proto.Bool(true)})
	if err != nil || !f.GetPidfdStore() {
		t.Errorf("features %v, %v", f, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("CRIU %v, features %v", v, f)
}

func TestCRIUQueriesExtFiles(t *testing.T) {
	needCRIU(t)
	got, err := criurpc.QueriesExtFiles(t.Context(), criurpc.Config{})
	if err != nil || !got {
		t.Errorf("%v, %+v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "criurpc-probe-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCRIUDumpLeaveRunning(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	h := &yes{}
	resp, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(true), h)
	if err != nil || !resp.GetSuccess() {
		t.Fatalf("%+v\n%s", err, a.log())
	}
	want := []criurpc.Stage{criurpc.StagePreDump, criurpc.StageQueryExtFiles, criurpc.StagePostDump}
	if !slices.Equal(h.stages, want) {
		t.Errorf("notifications %v, want %v", h.stages, want)
	}
	a.unharmed(t)
}

func TestCRIUExternal(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	key := "file[ffff:ffff]"
	_, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(true),
		criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
			if n.Stage == criurpc.StageQueryExtFiles {
				return criurpc.External(key), nil
			}
			return nil, nil
		}))
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if !strings.Contains(a.log(), "Adding external object: "+key) {
		t.Errorf("CRIU did not take %s:\n%s", key, a.log())
	}
	a.unharmed(t)
}

func TestCRIUNotificationFails(t *testing.T) {
	for _, stage := range []criurpc.Stage{criurpc.StagePreDump, criurpc.StageQueryExtFiles, criurpc.StagePostDump} {
		t.Run(string(stage), func(t *testing.T) {
			needCRIU(t)
			a := startApp(t)
			boom := errors.New("boom")
			resp, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(false),
				criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
					if n.Stage == stage {
						return nil, boom
					}
					return nil, nil
				}))
			if !errors.Is(err, boom) || resp == nil || resp.GetSuccess() {
				t.Errorf("answer %v, error %+v", resp, err)
			}
			if full := fmt.Sprintf("%+v", err); !strings.Contains(full, "RPC client reported script error") {
				t.Errorf("no word of CRIU's in %s", full)
			}
			a.unharmed(t)
		})
	}
}

func TestCRIUCancelled(t *testing.T) {
	for _, stage := range []criurpc.Stage{criurpc.StagePreDump, criurpc.StageQueryExtFiles, criurpc.StagePostDump} {
		t.Run(string(stage), func(t *testing.T) {
			needCRIU(t)
			a := startApp(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			c, err := criurpc.Start(criurpc.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			resp, err := c.Do(ctx, a.dump(false),
				criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
					if n.Stage != stage {
						return nil, nil
					}
					cancel(errStop)
					// The application runs again while this handler is still at it.
					c.Wait()
					eventually(t, "the application runs", func() bool { return state(a.pid) == "S" })
					return nil, nil
				}))
			if !errors.Is(err, errStop) || resp.GetSuccess() {
				t.Errorf("answer %v, error %+v", resp, err)
			}
			a.unharmed(t)
		})
	}
}

// TestCRIUKilled: the last resort leaves the application running, too.
func TestCRIUKilled(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	c, err := criurpc.Start(criurpc.Config{Grace: 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	_, err = c.Do(ctx, a.dump(false),
		criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
			if n.Stage == criurpc.StageQueryExtFiles {
				// CRIU cannot come to its end.
				if err := unix.Kill(c.PID(), unix.SIGSTOP); err != nil {
					t.Error(err)
				}
				cancel(errStop)
			}
			return nil, nil
		}))
	if !errors.Is(err, errStop) || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("error: %v", err)
	}
	a.unharmed(t)
}

func TestCRIUErrorHasLog(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	req := a.dump(true)
	req.Opts.Pid = proto.Int32(4000000) // no such process
	_, err := criurpc.Run(t.Context(), criurpc.Config{}, req, nil)
	var e *criurpc.Error
	if !errors.As(err, &e) || !errors.Is(err, unix.ESRCH) {
		t.Fatalf("error: %+v", err)
	}
	if strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), "CRIU: dump of process 4000000: failed") {
		t.Errorf("Error(): %s", err)
	}
	full := fmt.Sprintf("%+v", err)
	if !strings.Contains(full, "Dumping FAILED") || !strings.Contains(full, "/rpc.log") {
		t.Errorf("%%+v: %s", full)
	}
	t.Logf("%+v", err)

	// The log that is there now is not that of a request that did not get so far.
	req.Opts.ImagesDirFd = proto.Int32(999)
	_, err = criurpc.Run(t.Context(), criurpc.Config{}, req, nil)
	if !errors.As(err, &e) || e.LogFile != "" || !errors.Is(err, unix.EBADRQC) {
		t.Errorf("error: %+v", err)
	}
	if !strings.Contains(fmt.Sprintf("%+v", err), "/fd/999") {
		t.Errorf("no word of the folder in %+v", err)
	}
	t.Logf("%+v", err)
}

func TestCRIULogToStderr(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	req := a.dump(true)
	req.Opts.Pid, req.Opts.LogFile, req.Opts.LogToStderr = proto.Int32(4000000), nil, proto.Bool(true)
	var out strings.Builder
	_, err := criurpc.Run(t.Context(), criurpc.Config{Stderr: &out}, req, nil)
	var e *criurpc.Error
	if !errors.As(err, &e) || len(e.Log) == 0 || e.LogFile != "" {
		t.Errorf("error: %+v", err)
	}
	if !strings.Contains(out.String(), "Dumping FAILED") {
		t.Errorf("stderr: %s", out.String())
	}
}
