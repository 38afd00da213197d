// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// All in this file is against a real CRIU, see criu_test.go.

func TestCRIURestore(t *testing.T) {
	needCRIU(t)
	a := startApp(t)
	if _, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(false), &yes{}); err != nil {
		t.Fatalf("%+v\n%s", err, a.log())
	}
	_ = a.cmd.Wait()
	if !isKilled(a.cmd) {
		t.Fatalf("after the dump: %v", a.cmd.ProcessState)
	}

	// A restore that is refused, and cancelled, leaves nothing; the next works.
	for _, c := range []struct {
		name   string
		cancel bool
		refuse bool
	}{{"refused", false, true}, {"cancelled", true, false}, {"done", false, false}} {
		t.Run(c.name, func(t *testing.T) {
			nothingLeft(t)
			eventually(t, "the pid is free", func() bool { return isFree(a.pid) })
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			var stages []criurpc.Stage
			o := a.opts()
			o.RstSibling = proto.Bool(true)
			resp, err := criurpc.Run(ctx, criurpc.Config{}, &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: o},
				criurpc.HandlerFunc(func(ctx context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
					stages = append(stages, n.Stage)
					if n.Stage != criurpc.StagePostRestore {
						return nil, nil
					}
					if n.PID != a.pid {
						t.Errorf("pid %d at post-restore, want %d", n.PID, a.pid)
					}
					if c.refuse {
						return nil, errStop
					}
					if c.cancel {
						cancel(errStop)
						<-ctx.Done()
					}
					return nil, nil
				}))
			if c.refuse || c.cancel {
				if !errors.Is(err, errStop) || resp.GetSuccess() {
					t.Fatalf("answer %v, error %+v", resp, err)
				}
				// rst_sibling: the root task is our child, ours to reap.
				var status unix.WaitStatus
				if _, err := unix.Wait4(a.pid, &status, 0, nil); err != nil || status.Signal() != unix.SIGKILL {
					t.Errorf("the half restored task: status %#x, %v", status, err)
				}
				return
			}
			if err != nil {
				t.Fatalf("%+v\n%s", err, a.log())
			}
			if got := int(resp.GetRestore().GetPid()); got != a.pid {
				t.Errorf("restored pid %d, want %d", got, a.pid)
			}
			eventually(t, "the restored process runs, that is, it sleeps", func() bool { return state(a.pid) == "S" })
			want := []criurpc.Stage{criurpc.StagePreRestore, criurpc.StagePostRestore,
				criurpc.StagePreResume, criurpc.StagePostResume}
			if !slices.Equal(stages, want) {
				t.Errorf("notifications %v, want %v", stages, want)
			}
			_ = unix.Kill(a.pid, unix.SIGTERM)
			var status unix.WaitStatus
			if _, err := unix.Wait4(a.pid, &status, 0, nil); err != nil || status.Signal() != unix.SIGTERM {
				t.Errorf("the restored process: status %#x, %v", status, err)
			}
		})
	}
}

// TestCRIURestoreKilled: what hangs in the middle goes with CRIU.
func TestCRIURestoreKilled(t *testing.T) {
	for _, sibling := range []bool{false, true} {
		t.Run(fmt.Sprint("sibling=", sibling), func(t *testing.T) {
			needCRIU(t)
			a := startApp(t)
			if _, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(false), nil); err != nil {
				t.Fatalf("%+v", err)
			}
			_ = a.cmd.Wait()
			eventually(t, "the pid is free", func() bool { return isFree(a.pid) })
			c, err := criurpc.Start(criurpc.Config{Grace: 1})
			if err != nil {
				t.Fatal(err)
			}
			o := a.opts()
			o.RstSibling = &sibling
			var half string
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			_, err = c.Do(ctx, &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: o},
				criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
					if n.Stage == criurpc.StagePostRestore {
						half = state(a.pid)
						if err := unix.Kill(c.PID(), unix.SIGSTOP); err != nil {
							t.Error(err)
						}
						cancel(errStop)
					}
					return nil, nil
				}))
			if !errors.Is(err, errStop) || half == "" {
				t.Errorf("error %v, half restored task %q", err, half)
			}
			if sibling {
				_, _ = unix.Wait4(a.pid, nil, 0, nil)
			}
			eventually(t, "the half restored task is gone", func() bool { return isFree(a.pid) })
		})
	}
}

func TestCRIUInheritFd(t *testing.T) {
	needCRIU(t)
	var pipes [2]struct{ r, w *os.File }
	var names [2]string
	for i := range pipes {
		p := &pipes[i]
		var err error
		if p.r, p.w, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		defer p.r.Close()
		defer p.w.Close()
		if names[i], err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", p.w.Fd())); err != nil {
			t.Fatal(err)
		}
	}
	a := startApp(t, pipes[0].w)
	if _, err := criurpc.Run(t.Context(), criurpc.Config{}, a.dump(false), nil); err != nil {
		t.Fatalf("%+v", err)
	}
	_ = a.cmd.Wait()
	eventually(t, "the pid is free", func() bool { return isFree(a.pid) })
	o := a.opts()
	o.RstSibling = proto.Bool(true)
	o.InheritFd = []*rpc.InheritFd{criurpc.InheritFd(1, names[0])}
	_, err := criurpc.Run(t.Context(), criurpc.Config{Files: []*os.File{pipes[1].r, pipes[1].w}},
		&rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: o}, nil)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/1", a.pid)); got != names[1] {
		t.Errorf("stdout of the restored process is %s, %v; want %s", got, err, names[1])
	}
	_ = unix.Kill(a.pid, unix.SIGTERM)
	_, _ = unix.Wait4(a.pid, nil, 0, nil)
}

func isKilled(cmd *exec.Cmd) bool {
	w, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && w.Signal() == syscall.SIGKILL
}

// isFree reports whether a pid can be given again: a while after the process
// was reaped. F_SETOWN looks the number up.
func isFree(pid int) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETOWN, pid)
	return errors.Is(err, unix.ESRCH)
}
