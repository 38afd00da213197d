// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Role is the first argument that makes a test binary the application.
const Role = "criuhook-test-app"

// QuietRole is an application none of whose threads waits in a poll of any kind:
// CRIU's images do not tell what for.
const QuietRole = Role + "-quiet"

// Main runs the application if the process was started as one, and then does
// not return. Arguments: Role, the path of the control socket, and the names
// of connections inherited as fd 3, 4 ….
func Main() {
	if len(os.Args) < 3 || os.Args[1] != Role && os.Args[1] != QuietRole {
		return
	}
	signal.Ignore(unix.SIGPIPE)
	a := &app{conns: map[string]int{}}
	for i, name := range os.Args[3:] {
		a.conns[name] = 3 + i
	}
	if os.Args[1] == QuietRole {
		a.quiet(os.Args[2])
	}
	l, err := net.Listen("unix", os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			continue
		}
		// One at a time would let a request that hangs block the rest.
		go a.serve(c)
	}
}

type app struct {
	mu       sync.Mutex
	conns    map[string]int
	requests atomic.Int64
	failed   atomic.Int64
	lastErr  atomic.Value
	stop     atomic.Bool
	workers  sync.WaitGroup
	serial   atomic.Int64
	signals  atomic.Int64
	epoll    int
}

func (a *app) serve(c io.ReadWriteCloser) {
	defer c.Close()
	var cmd Command
	if err := json.NewDecoder(c).Decode(&cmd); err != nil {
		return
	}
	var ans Answer
	if err := a.do(&cmd, &ans); err != nil {
		ans.Err = err.Error()
		if ans.Err == "" {
			ans.Err = "unknown error"
		}
	}
	_ = json.NewEncoder(c).Encode(ans)
}

func (a *app) fd(name string) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fd, ok := a.conns[name]
	if !ok {
		return -1, fmt.Errorf("no connection %q", name)
	}
	return fd, nil
}

func (a *app) keep(name string, fd int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns[name] = fd
}

func (a *app) do(cmd *Command, ans *Answer) error {
	switch cmd.Op {
	case "open":
		flags := cmd.Type | unix.SOCK_CLOEXEC
		fd, err := unix.Socket(unix.AF_UNIX, flags, 0)
		if err != nil {
			return err
		}
		to := cmd.To
		if len(cmd.ToBytes) > 0 {
			to = string(cmd.ToBytes)
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: to}); err != nil {
			unix.Close(fd)
			return err
		}
		if cmd.Nonblock {
			if err := unix.SetNonblock(fd, true); err != nil {
				return err
			}
		}
		a.keep(cmd.Conn, fd)
		ans.FD = fd
		return nil
	case "ping":
		return nil
	case "exit": // with code Value
		os.Exit(cmd.Value)
	case "pair": // a connection that does not leave the process
		fds, err := unix.Socketpair(unix.AF_UNIX, cmd.Type|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			a.keep(cmd.Conn, fds[0])
			a.keep(cmd.As, fds[1])
		}
		return err
	case "chroot":
		return unix.Chroot(cmd.To)
	case "stats":
		ans.Count = a.counters()
		return nil
	case "hammer":
		for i := range cmd.Threads {
			fd, err := a.fd(cmd.Conn + strconv.Itoa(i))
			if err != nil {
				return err
			}
			a.workers.Go(func() { a.hammer(fd) })
		}
		return nil
	case "rest":
		a.stop.Store(true)
		a.workers.Wait()
		a.stop.Store(false)
		ans.Count = a.counters()
		return nil
	case "signals": // count those of number Value
		a.countSignals(unix.Signal(cmd.Value))
		return nil
	case "background": // the operation in Text
		go a.background(*cmd)
		return nil
	case "accept":
		return a.acceptOne(cmd.Conn, cmd.To)
	case "ghost":
		return a.ghost(cmd.Conn, int64(cmd.Value))
	case "trace": // process Value, until it ends
		return trace(cmd.Value)
	case "threads":
		for range cmd.Threads {
			go func() {
				runtime.LockOSThread()
				for {
					time.Sleep(time.Hour)
				}
			}()
		}
		return nil
	}
	fd, err := a.fd(cmd.Conn)
	if err != nil {
		return err
	}
	return a.onConnection(cmd, ans, fd)
}

func (a *app) onConnection(cmd *Command, ans *Answer, fd int) error {
	switch cmd.Op {
	case "request":
		return a.request(fd)
	case "write":
		_, err := unix.Write(fd, []byte(cmd.Text))
		return err
	case "send":
		return unix.Sendto(fd, []byte(cmd.Text), unix.MSG_NOSIGNAL, nil)
	case "read":
		b := make([]byte, 4096)
		n, err := unix.Read(fd, b)
		ans.Text = string(b[:max(n, 0)])
		return err
	case "setopt":
		return unix.SetsockoptInt(fd, cmd.Level, cmd.Option, cmd.Value)
	case "timeout":
		tv := unix.NsecToTimeval(int64(cmd.Value) * int64(time.Millisecond))
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, cmd.Option, &tv)
	case "owner": // SIGIO to ourselves
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETOWN, os.Getpid()); err != nil {
			return err
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETSIG, cmd.Value); err != nil {
			return err
		}
		fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl|unix.O_ASYNC)
		return err
	case "poll":
		var err error
		ans.Text, err = pollNow(fd)
		return err
	case "details":
		return details(fd, &ans.Conn)
	case "shutdown": // as Value says
		return unix.Shutdown(fd, cmd.Value)
	case "dup":
		n, err := unix.Dup(fd)
		if err == nil {
			a.keep(cmd.As, n)
			ans.FD = n
		}
		return err
	case "nonblock":
		return unix.SetNonblock(fd, true)
	case "move": // to fd Value, with O_CLOEXEC or not in Option
		if err := unix.Dup3(fd, cmd.Value, cmd.Option); err != nil {
			return err
		}
		a.keep(cmd.Conn, cmd.Value)
		return unix.Close(fd)
	case "epoll-add":
		return a.epollAdd(fd)
	case "epoll-wait":
		return a.epollWait(fd)
	case "close":
		return unix.Close(fd)
	case "child":
		// An fd of a child is the same description: fork and exec keep it.
		child := exec.Command("/proc/self/exe", os.Args[1], cmd.As, cmd.Conn)
		n, err := unix.Dup(fd)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(n), cmd.Conn)
		defer f.Close()
		child.ExtraFiles = []*os.File{f}
		return child.Start()
	}
	return fmt.Errorf("no operation %q", cmd.Op)
}

// request sends a line of its own and expects it back.
func (a *app) request(fd int) error {
	line := fmt.Sprintf("%d-%d-%d\n", os.Getpid(), fd, a.serial.Add(1))
	if err := writeAll(fd, line); err != nil {
		return err
	}
	got, err := readLine(fd)
	if err == nil && got != line {
		err = fmt.Errorf("sent %q, got %q", line, got)
	}
	return err
}

func writeAll(fd int, s string) error {
	for s != "" {
		n, err := unix.Write(fd, []byte(s))
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			wait(fd, unix.POLLOUT)
		case err != nil:
			return err
		default:
			s = s[n:]
		}
	}
	return nil
}

var errEOF = errors.New("EOF")

func readLine(fd int) (string, error) {
	var line []byte
	b := make([]byte, 4096)
	for len(line) == 0 || line[len(line)-1] != '\n' {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			wait(fd, unix.POLLIN)
		case err != nil:
			return "", err
		case n == 0:
			return "", errEOF
		default:
			line = append(line, b[:n]...)
		}
	}
	return string(line), nil
}

func wait(fd int, events int16) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, -1)
}

// hammer makes requests on a thread of its own until told to rest.
func (a *app) hammer(fd int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for !a.stop.Load() {
		err := a.request(fd)
		a.requests.Add(1)
		if err != nil {
			a.failed.Add(1)
			a.lastErr.Store(err.Error())
			return
		}
	}
}

func (a *app) counters() Counters {
	c := Counters{Requests: a.requests.Load(), Failed: a.failed.Load(), Signals: a.signals.Load()}
	c.LastErr, _ = a.lastErr.Load().(string)
	if e, err := os.ReadDir("/proc/self/fd"); err == nil {
		c.FDs = len(e) - 1 // without the directory's own
	}
	if e, err := os.ReadDir("/proc/self/task"); err == nil {
		c.Threads = len(e)
	}
	return c
}

func (a *app) epollAdd(fd int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.epoll == 0 {
		ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return err
		}
		a.epoll = ep
	}
	return unix.EpollCtl(a.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// epollWait makes a request whose answer is awaited with epoll.
func (a *app) epollWait(fd int) error {
	const line = "epoll\n"
	if err := writeAll(fd, line); err != nil {
		return err
	}
	ev := make([]unix.EpollEvent, 4)
	n, err := unix.EpollWait(a.epoll, ev, 10_000)
	for err == unix.EINTR { // by a dump: epoll_wait is not restarted
		n, err = unix.EpollWait(a.epoll, ev, 10_000)
	}
	if err != nil {
		return err
	}
	if n != 1 || int(ev[0].Fd) != fd || ev[0].Events&unix.EPOLLIN == 0 {
		return fmt.Errorf("epoll returned %d events, the first %+v", n, ev[0])
	}
	got, err := readLine(fd)
	if err == nil && got != line {
		err = fmt.Errorf("got %q", got)
	}
	return err
}

func details(fd int, d *Details) error {
	var errs []error
	integer := func(opt int) int {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
		errs = append(errs, err)
		return v
	}
	timeval := func(opt int) string {
		v, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, opt)
		errs = append(errs, err)
		if v == nil {
			return ""
		}
		return time.Duration(v.Nano()).String()
	}
	control := func(cmd int) int {
		v, err := unix.FcntlInt(uintptr(fd), cmd, 0)
		errs = append(errs, err)
		return v
	}
	d.FD = fd
	d.Flags = control(unix.F_GETFL)
	d.Cloexec = control(unix.F_GETFD)&unix.FD_CLOEXEC != 0
	d.SndBuf, d.RcvBuf = integer(unix.SO_SNDBUF), integer(unix.SO_RCVBUF)
	d.PassCred = integer(unix.SO_PASSCRED)
	d.RcvTimeo, d.SndTimeo = timeval(unix.SO_RCVTIMEO), timeval(unix.SO_SNDTIMEO)
	d.OwnerPID, d.Signal = control(unix.F_GETOWN), control(unix.F_GETSIG)
	var st unix.Stat_t
	errs = append(errs, unix.Fstat(fd, &st))
	d.Inode = st.Ino
	if sa, err := unix.Getpeername(fd); err == nil {
		if un, ok := sa.(*unix.SockaddrUnix); ok {
			d.PeerName = un.Name
		}
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		if un, ok := sa.(*unix.SockaddrUnix); ok {
			d.SockName = un.Name
		}
	}
	return errors.Join(errs...)
}
