// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
)

// DefaultGrace is what CRIU gets to come to an end by itself, unless
// [Config.Grace] says otherwise.
const DefaultGrace = time.Minute

// ErrClosed: the Client has had its last request.
var ErrClosed = errors.New("this CRIU takes no more requests: start another")

var errClosing = errors.New("the Client was closed in the middle of it")

// Config tells how to start CRIU. The zero value is good for most.
type Config struct {
	// Path of CRIU, or its name, looked up in PATH. Default: criu.
	Path string
	// Arg0 is the name CRIU is called by, for its messages. Default: Path.
	Arg0 string
	// Args are options of CRIU's command line, put before swrk. A request overrides
	// those that it sets.
	Args []string
	// Env is CRIU's environment, nil for ours.
	Env []string
	// Stdin, Stdout and Stderr are those of CRIU; nil is /dev/null. An *os.File is
	// passed on as it is. From a Stderr that is none, or nil, the lines of
	// an [Error] are taken where CRIU has written no log.
	Stdin          *os.File
	Stdout, Stderr io.Writer
	// Files are inherited by CRIU; the number there is [CriuFD]. They can be closed
	// here after Start.
	Files []*os.File
	// Keep are descriptors of ours that Args name: CRIU has them under the same
	// numbers. Not together with Files.
	Keep []int
	// LogFile is CRIU's log where Args or a config_file put it; the log that a
	// request names is found without.
	LogFile string
	// Grace is what CRIU gets to clean up after a cancellation, or to end after its
	// last answer, before it is killed. 0 is [DefaultGrace], below 0 is for ever.
	Grace time.Duration
	// SysProcAttr is for the process of CRIU. A program that is stopped by Ctrl-C
	// sets Setpgid, so that the terminal does not kill CRIU in the middle of a dump.
	SysProcAttr *syscall.SysProcAttr
}

// CriuFD is the number that Config.Files[i] has in CRIU.
func CriuFD(i int) int32 {
	return int32(4 + i) // after stdio and the socket
}

// InheritFd is an entry of CriuOpts.InheritFd: on restore, CRIU uses
// Config.Files[i] for key, such as "socket:[INODE]", instead of what it dumped.
func InheritFd(i int, key string) *rpc.InheritFd {
	fd := CriuFD(i)
	return &rpc.InheritFd{Key: &key, Fd: &fd}
}

// Client is a CRIU that waits for requests. It must be closed.
type Client struct {
	config Config
	conn   *conn
	cmd    *exec.Cmd
	stderr *lastErrors   // nil if it goes to a file
	exited chan struct{} // closed when CRIU is reaped
	busy   chan struct{} // holds one token while a request is under way

	mu      sync.Mutex // for all below
	pending bool       // a notification waits for its answer
	aborted bool       // nothing more is to be sent
	dead    bool       // exited is closed
	// running is set while the processes of CRIU below it are its own business
	// only, so that they die with it.
	running   bool
	restoring bool      // the request is a restore
	over      bool      // no further request
	deadline  time.Time // of the grace period, once aborted
	closing   bool      // Close was called
	closed    bool
}

// Start starts CRIU.
func Start(config Config) (*Client, error) {
	if config.Path == "" {
		config.Path = "criu"
	}
	if config.Grace == 0 {
		config.Grace = DefaultGrace
	}
	conn, theirs, err := pair()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", config.Path, err)
	}
	defer theirs.Close()
	c := &Client{
		config: config,
		conn:   conn,
		exited: make(chan struct{}),
		busy:   make(chan struct{}, 1),
	}
	kept, closeKept, err := config.kept()
	if err != nil {
		_ = conn.close()
		return nil, err
	}
	defer closeKept()
	number := int(CriuFD(-1)) + len(kept)
	args := append(append([]string(nil), config.Args...), "swrk", strconv.Itoa(number))
	c.cmd = exec.Command(config.Path, args...)
	if config.Arg0 != "" {
		c.cmd.Args[0] = config.Arg0
	}
	c.cmd.Env = config.Env
	c.cmd.ExtraFiles = append(append(kept, theirs), config.Files...)
	c.cmd.SysProcAttr = config.SysProcAttr
	if config.Stdin != nil { // not to make a typed nil of it
		c.cmd.Stdin = config.Stdin
	}
	c.cmd.Stdout = config.Stdout
	c.cmd.Stderr = config.Stderr
	if _, isFile := config.Stderr.(*os.File); !isFile {
		c.stderr = &lastErrors{next: config.Stderr}
		c.cmd.Stderr = c.stderr
	}
	// A process that CRIU leaves behind may hold its stderr: do not wait for that.
	c.cmd.WaitDelay = 200 * time.Millisecond
	if err := c.cmd.Start(); err != nil {
		_ = conn.close()
		return nil, fmt.Errorf("start %s as CRIU: %w", config.Path, err)
	}
	go c.reap()
	return c, nil
}

// kept are the descriptors to keep whose numbers come before the first that is
// free for the socket; nil is one that is not open. Those behind it are
// inherited anyway.
func (config *Config) kept() (files []*os.File, closeAll func(), err error) {
	closeAll = func() {
		for _, f := range files {
			f.Close()
		}
	}
	if len(config.Keep) > 0 && len(config.Files) > 0 {
		return nil, nil, errors.New("start CRIU: Config.Keep and Config.Files exclude each other")
	}
	for fd := int(CriuFD(-1)); slices.Contains(config.Keep, fd); fd++ {
		var f *os.File
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		switch {
		case err == nil:
			f = os.NewFile(uintptr(n), strconv.Itoa(fd))
		case !errors.Is(err, unix.EBADF):
			closeAll()
			return nil, nil, fmt.Errorf("start CRIU: hand on fd %d: %w", fd, err)
		}
		files = append(files, f)
	}
	return files, closeAll, nil
}

// lastWords is how long CRIU's answer may take when CRIU has ended: what is called
// CRIU may have a process between itself and us (package relay).
const lastWords = 2 * time.Second

// reap ends a receive when CRIU is gone: a child it left may still hold the other
// end of the socket.
func (c *Client) reap() {
	_ = c.cmd.Wait() // kept in ProcessState
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	c.conn.setDeadline(time.Now().Add(lastWords))
	close(c.exited)
}

// PID of CRIU.
func (c *Client) PID() int { return c.cmd.Process.Pid }

// Signal sends CRIU a signal.
func (c *Client) Signal(sig os.Signal) error { return c.cmd.Process.Signal(sig) }

// Wait waits until CRIU has ended, or the command that it became by exec_cmd,
// and tells how. It does not make it end; Close does.
func (c *Client) Wait() *os.ProcessState {
	<-c.exited
	return c.cmd.ProcessState
}

// Close lets CRIU end and waits until it has. A request under way is
// cancelled. The error tells that CRIU did not end in [Config.Grace] and was
// killed. Further calls do nothing.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	c.abort()
	c.busy <- struct{}{}
	defer func() { <-c.busy }()
	return c.finish()
}

// Run starts CRIU for one request, see [Client.Do].
func Run(ctx context.Context, config Config, req *rpc.CriuReq, h Handler) (*rpc.CriuResp, error) {
	if err := ctx.Err(); err != nil {
		return nil, &Error{Op: describe(req), Err: context.Cause(ctx)}
	}
	c, err := Start(config)
	if err != nil {
		return nil, &Error{Op: describe(req), Err: err}
	}
	resp, err := c.Do(ctx, req, h)
	// What CRIU said counts more than how it ended.
	if closeErr := c.Close(); closeErr != nil && resp == nil && err == nil {
		err = closeErr
	}
	return resp, err
}
