// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// abort makes CRIU give up what it is at, which it does at a notification:
// the one that waits is answered as failed, the next one finds nobody. After
// that, receiving ends with the grace period.
func (c *Client) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted || c.closed {
		return
	}
	_ = c.replyLocked(nil, false) // hangUp says the same
	c.aborted = true
	// Only this direction: CRIU can still send, and we still hear how it ended.
	c.conn.hangUp()
	c.deadline = time.Now().Add(c.config.Grace)
	if !c.dead && c.config.Grace > 0 {
		c.conn.setDeadline(c.deadline)
	}
}

// finish waits until CRIU has ended, kills it if it does not, and closes the
// socket. The caller has the token of busy.
func (c *Client) finish() error {
	c.abort()
	c.mu.Lock()
	closed, left := c.closed, time.Until(c.deadline)
	c.mu.Unlock()
	if closed {
		return nil
	}
	var grace <-chan time.Time
	if c.config.Grace > 0 {
		timer := time.NewTimer(left)
		defer timer.Stop()
		grace = timer.C
	}
	var err error
	select {
	case <-c.exited:
	case <-grace:
		err = fmt.Errorf("CRIU (pid %d) did not end within %v and was killed", c.PID(), c.config.Grace)
		c.kill()
		<-c.exited
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return errors.Join(err, c.conn.close())
}

func (c *Client) kill() {
	c.mu.Lock()
	running, restoring := c.running, c.restoring
	c.mu.Unlock()
	Kill(c.cmd.Process, running, restoring)
}

// Kill kills a CRIU that is a child of ours: the last resort. Tasks that CRIU has
// seized run on when it is gone (ptrace(2)). Its children do not end with it,
// and half restored tasks would wait for it for ever: running, a request is under
// way, so that they are its own business only; restoring, it is a restore.
func Kill(criu *os.Process, running, restoring bool) {
	var others []int
	if running {
		// Stopped, it makes no more of them while we look.
		_ = criu.Signal(unix.SIGSTOP)
		others = below(criu.Pid)
	}
	if running && restoring { // not on a dump: there CRIU traces the application
		for _, pid := range children(os.Getpid()) { // rst_sibling makes them ours
			if tracer(pid) == criu.Pid {
				others = append(append(others, pid), below(pid)...)
			}
		}
	}
	for _, pid := range others {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = criu.Kill()
}

// below lists the descendants of a process.
func below(pid int) []int {
	out := children(pid)
	for i := 0; i < len(out); i++ {
		out = append(out, children(out[i])...)
	}
	return out
}

// children needs CONFIG_PROC_CHILDREN, as CRIU does.
func children(pid int) []int {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	threads, _ := os.ReadDir(dir) // nothing, if it is gone
	var out []int
	for _, t := range threads {
		b, _ := os.ReadFile(dir + "/" + t.Name() + "/children")
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				out = append(out, child)
			}
		}
	}
	return out
}

// tracer is who traces a process, 0 for nobody.
func tracer(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(b), "\nTracerPid:")
	line, _, _ := strings.Cut(rest, "\n")
	n, _ := strconv.Atoi(strings.TrimSpace(line))
	return n
}
