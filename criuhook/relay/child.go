// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/swrk"
)

// Child starts CRIU as a child.
type Child struct {
	Path string // of the real CRIU
	// Arg0 is the name it is called by, for its messages; "": Path.
	Arg0 string
	// Options are put before swrk.
	Options []string
	Env     []string // nil: ours
	Dir     string   // "": ours
	// Stdout and Stderr are CRIU's; nil is /dev/null, which its stdin is always.
	Stdout, Stderr io.Writer
	SysProcAttr    *syscall.SysProcAttr
	// Release, if not nil, empties the fd store of a CRIU that has become another
	// program (exec_cmd), see dropin.ReleaseBy. It is called in a goroutine.
	Release func(ctx context.Context, criu, pidfd int) error
}

// Start starts CRIU.
func (c *Child) Start(job Job) (Worker, error) {
	args := c.Options
	if job.WorkDir >= 0 {
		args = append(args[:len(args):len(args)], "-W", fmt.Sprintf("/proc/self/fd/%d", criurpc.CriuFD(job.WorkDir)))
	}
	cmd := exec.Command(c.Path, append(args[:len(args):len(args)], "swrk", strconv.Itoa(int(criurpc.CriuFD(-1))))...)
	if c.Arg0 != "" {
		cmd.Args[0] = c.Arg0
	}
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = c.Env, c.Dir, c.Stdout, c.Stderr, c.SysProcAttr
	cmd.ExtraFiles = append([]*os.File{job.Socket}, job.Files...)
	// A process that CRIU leaves behind may hold its stderr: do not wait for that.
	cmd.WaitDelay = 200 * time.Millisecond
	swrk.RaiseLimit(len(job.Files))
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s as CRIU: %w", c.Path, err)
	}
	w := &childWorker{cmd: cmd, child: c, job: job, exited: make(chan struct{})}
	var err error
	// It is not reaped yet, so it is that one.
	if w.pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("open CRIU, process %d: %w", cmd.Process.Pid, err)
	}
	go func() {
		_ = cmd.Wait() // what it had to say it has said by RPC
		close(w.exited)
	}()
	return w, nil
}

type childWorker struct {
	cmd    *exec.Cmd
	child  *Child
	job    Job
	pidfd  int
	exited chan struct{} // closed when it is reaped
}

func (w *childWorker) PID() int     { return w.cmd.Process.Pid }
func (w *childWorker) PIDFD() int   { return w.pidfd }
func (w *childWorker) FD(i int) int { return int(criurpc.CriuFD(i)) }

func (w *childWorker) Close(grace time.Duration, running, restoring bool) error {
	if w.job.ExecCmd && !running { // maybe it is CRIU no more
		go w.leave()
		return nil
	}
	defer unix.Close(w.pidfd)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-w.exited:
		return nil
	case <-timer.C:
	}
	criurpc.Kill(w.cmd.Process, running, restoring)
	<-w.exited
	return fmt.Errorf("CRIU (pid %d) did not end within %v and was killed", w.PID(), grace)
}

func (w *childWorker) leave() {
	defer unix.Close(w.pidfd)
	if w.child.Release != nil {
		_ = w.child.Release(context.Background(), w.PID(), w.pidfd) // it is about EOF at a daemon, at the most
	}
	<-w.exited
}
