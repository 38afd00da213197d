// SPDX-License-Identifier: Apache-2.0

package app

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// background does an operation on a goroutine of its own. How it ended shows
// in the counters.
func (a *app) background(cmd Command) {
	cmd.Op = cmd.Text
	err := a.do(&cmd, &Answer{})
	a.requests.Add(1)
	if err != nil {
		a.failed.Add(1)
		a.lastErr.Store(err.Error())
	}
}

// countSignals counts the signals of one number that come.
func (a *app) countSignals(sig os.Signal) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, sig)
	go func() {
		for range signals {
			a.signals.Add(1)
		}
	}()
}

// pollNow returns the events that poll(2) shows at once, as names.
func pollNow(fd int) (string, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT | unix.POLLRDHUP}}
	if _, err := unix.Poll(p, 0); err != nil {
		return "", err
	}
	var names []string
	for _, e := range []struct {
		bit  int16
		name string
	}{{unix.POLLIN, "IN"}, {unix.POLLOUT, "OUT"}, {unix.POLLRDHUP, "RDHUP"}, {unix.POLLHUP, "HUP"}, {unix.POLLERR, "ERR"}} {
		if p[0].Revents&e.bit != 0 {
			names = append(names, e.name)
		}
	}
	return strings.Join(names, " "), nil
}

// acceptOne listens at a name and keeps the first connection to it.
func (a *app) acceptOne(conn, name string) error {
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: name}); err != nil {
		return err
	}
	if err := unix.Listen(l, 1); err != nil {
		return err
	}
	go func() {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err == nil {
			a.keep(conn, fd)
		}
	}()
	return nil
}

// ghost keeps a file open that has no name any more. CRIU dumps it with its
// contents, up to a limit (criu(8), --ghost-limit).
func (a *app) ghost(conn string, size int64) error {
	name := filepath.Join("/tmp", "ghost-"+filepath.Base(os.Args[2])+conn)
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Unlink(name); err != nil {
		return err
	}
	if _, err := unix.Pwrite(fd, make([]byte, size), 0); err != nil {
		return err
	}
	a.keep(conn, fd)
	return nil
}

// trace holds a process as a debugger would that stops it nowhere.
func trace(pid int) error {
	seized := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // ptrace(2) knows threads only
		err := unix.PtraceSeize(pid)
		seized <- err
		for err == nil {
			var ws unix.WaitStatus
			if _, err = unix.Wait4(pid, &ws, unix.WALL, nil); err == unix.EINTR {
				err = nil
			} else if err == nil && ws.Stopped() {
				_ = unix.PtraceCont(pid, int(ws.StopSignal())) // killed: the next wait says so
			}
		}
	}()
	return <-seized
}

// quiet serves the control socket with calls that block.
func (a *app) quiet(control string) {
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(l, &unix.SockaddrUnix{Name: control})
	}
	if err == nil {
		err = unix.Listen(l, unix.SOMAXCONN)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			continue
		}
		go a.serve(os.NewFile(uintptr(fd), "control"))
	}
}
