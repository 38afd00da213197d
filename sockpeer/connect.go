// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer/child"
)

// fileSystemTime is how much longer than asked for Connect waits for a look-up
// of a path to end.
const fileSystemTime = time.Second

// ErrListener: somebody else than expected listens at a name.
var ErrListener = errors.New("the listener belongs to another user")

// errLate: time was over before the first attempt, or while a path was walked.
var errLate = errors.New("there was no time to try")

// retryInterval is how often Connect tries again while a daemon is away.
// There is no event for a socket file that is to come back with a listener.
const retryInterval = 20 * time.Millisecond

// Connector connects sockets as somebody else.
type Connector struct {
	// Root is the directory that paths start from, usually /proc/PID/root;
	// a name that leads out of it by a link does not.
	Root *os.File
	// Or is another name of the listener, tried in turn with the first where
	// that is missing, refuses or is not open to the identity; "": none.
	Or Name
	// As is who connects.
	As Identity
	// ListenerUID is who must have called listen(); -1: anybody. Datagram
	// sockets do not tell, see [DgramPeerUID].
	ListenerUID int64
	// Slots, if not nil, bounds how many threads connect at the same time,
	// of all Connectors that share it: an attempt holds one place in it.
	Slots chan struct{}
	// PID, if not 0, is the pid in our pid namespace that the listener is to
	// see (SO_PEERCRED), of a process that does not exist yet: it exists
	// while a child of ours connects. Where that cannot be, as somebody has
	// the pid or we may not choose one, the listener sees ours. What greet
	// sends has ours, should the listener look at it (SCM_CREDENTIALS).
	PID int
}

// Connect connects an existing, unconnected socket to a name, in place: the
// open file description stays, with its flags, options and epoll
// registrations. It tries until ctx ends while the name is missing, refuses,
// has a full backlog or is not open to the identity; other errors are final.
// Then greet, if not nil, runs as the same identity. pid is what the listener
// sees of the one who connected, in our pid namespace.
//
// If the listener is not the expected one, or greet fails, the connection is
// of no use and is shut down: a stream cannot be taken back. The error is
// [ErrListener], or greet's.
func (c *Connector) Connect(ctx context.Context, sock *Socket, to Name, greet func() error) (pid int, err error) {
	if to == "" {
		return 0, errors.New("connect a socket: the peer has no name")
	}
	restore, err := setNonblock(sock)
	if err != nil {
		return 0, err
	}
	defer restore()
	to, pid, err = c.retry(ctx, sock, to)
	if err != nil {
		return 0, fmt.Errorf("connect to %s as uid %d: %w", to, c.As.UID, err)
	}
	// Not as the identity, which may not look: SIOCGSKNS takes CAP_NET_ADMIN.
	err = c.checkListener(sock, to)
	if err == nil && greet != nil {
		err = c.As.Do(greet)
	}
	if err != nil {
		return 0, errors.Join(err, disconnect(sock))
	}
	return pid, nil
}

// inTime makes one attempt. That sees to ctx itself, but the kernel may hold it
// in a file system that does not answer (FUSE, NFS, an automount): then its
// thread is left behind.
func (c *Connector) inTime(ctx context.Context, sock *Socket, to Name) (pid int, err error) {
	if c.Slots != nil {
		select {
		case c.Slots <- struct{}{}:
			defer func() { <-c.Slots }()
		case <-ctx.Done():
			return 0, errLate
		}
	}
	type result struct {
		pid int
		err error
	}
	done := make(chan result, 1)
	go func() {
		pid, err := c.connectOnce(ctx, sock, to)
		done <- result{pid, err}
	}()
	select {
	case r := <-done:
		return r.pid, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.pid, r.err
	case <-time.After(fileSystemTime):
		return 0, errors.New("the file system it is in does not answer")
	}
}

// retry returns the name that it connected to, or else to.
func (c *Connector) retry(ctx context.Context, sock *Socket, to Name) (name Name, pid int, err error) {
	names := []Name{to}
	if c.Or != "" && c.Or != to {
		names = append(names, c.Or)
	}
	tick := time.NewTicker(retryInterval)
	defer tick.Stop()
	last := errLate
	for {
		for i, name := range names {
			pid, err = c.inTime(ctx, sock, name)
			if err == nil || !comesBack(err) && !errors.Is(err, errLate) {
				return name, pid, err
			}
			if !errors.Is(err, errLate) && (i == 0 || last == errLate) {
				last = err // of the first name, which is to be told
			}
		}
		if ctx.Err() != nil {
			return to, 0, fmt.Errorf("until the time was over: %w", last)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// disconnect makes a connection unusable: a stream dead, a datagram socket
// unconnected.
func disconnect(sock *Socket) error {
	t, err := sock.Type()
	if err != nil {
		return err
	}
	if t == Dgram {
		// AF_UNSPEC dissolves the association (connect(2)).
		sa := unix.RawSockaddrUnix{Family: unix.AF_UNSPEC}
		_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(sock.fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa.Family))
		if e != 0 {
			return fmt.Errorf("disconnect %s: %w", sock.name, e)
		}
		return nil
	}
	if err := unix.Shutdown(sock.fd, unix.SHUT_RDWR); err != nil {
		return fmt.Errorf("shut down %s: %w", sock.name, err)
	}
	drain(sock)
	return nil
}

// drain throws away what came before a shutdown, half a greeting, which is not
// for the application. Nothing more can come.
func drain(sock *Socket) {
	// A read of nothing is the end, or an empty packet: more of these than fit
	// into a queue (net.core.wmem_max) are the end.
	const manyEmpty = 4096
	b := make([]byte, 4096)
	for empty := 0; empty < manyEmpty; {
		n, _, err := unix.Recvfrom(sock.fd, b, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return // reset: there is nothing left
		case n == 0:
			empty++
		}
	}
}

// comesBack tells the errors of a daemon that is restarting or swamped.
func comesBack(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EAGAIN) ||
		// Many a daemon opens its socket file to others only after it listens.
		errors.Is(err, unix.EACCES)
}

func (c *Connector) connectOnce(ctx context.Context, sock *Socket, to Name) (pid int, err error) {
	at, file := to, -1
	err = c.As.Do(func() (err error) {
		if !to.Abstract() {
			// The path is walked below Root with the identity's rights, then
			// the socket file is named by a descriptor: no second walk, no
			// limit of 108 bytes, no chroot of our own.
			if file, err = openBelow(int(c.Root.Fd()), to); err != nil {
				return err
			}
			at = Name(fmt.Sprintf("/proc/thread-self/fd/%d", file))
			if ctx.Err() != nil {
				return errLate // nobody may wait for it any more, and sock be closed
			}
		}
		if c.PID != 0 {
			return nil
		}
		return connectRaw(sock.fd, at, connectHere)
	})
	if file >= 0 {
		defer unix.Close(file)
	}
	if err != nil || c.PID == 0 {
		return os.Getpid(), err
	}
	if leave := c.takeTurn(ctx); leave != nil {
		defer leave()
		return c.connectAsPID(sock, at)
	}
	return c.connectHereAs(sock, at)
}

// takeTurn waits until nobody else connects under the pid. It gives up while
// there is time left to connect without: on a machine that is swamped the pid
// is what can be done without.
func (c *Connector) takeTurn(ctx context.Context) (leave func()) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	return child.Turn(ctx, c.PID)
}

// connectAsPID connects under the pid, or, where that cannot be, under ours.
func (c *Connector) connectAsPID(sock *Socket, at Name) (pid int, err error) {
	err = connectRaw(sock.fd, at, func(fd int, sa *unix.RawSockaddrUnix, n uintptr) error {
		var p child.Program
		if err := c.As.addTake(&p); err != nil {
			return fmt.Errorf("%w: %w", child.ErrNotStarted, err)
		}
		connect := p.Call(unix.SYS_CONNECT, child.Args{uintptr(fd), p.Pointer(unsafe.Pointer(sa)), n})
		err := p.Run(c.PID)
		var failed *child.CallError
		if errors.As(err, &failed) {
			if failed.Index != connect {
				// Identity.take is to tell why.
				return fmt.Errorf("%w: %w", child.ErrNotStarted, err)
			}
			return failed.Errno
		}
		if connected, e := sock.Connected(); err != nil && !errors.Is(err, child.ErrNotStarted) && e == nil && connected {
			return nil // killed when that was done
		}
		return err
	})
	if !errors.Is(err, child.ErrNotStarted) {
		return c.PID, err
	}
	return c.connectHereAs(sock, at)
}

// connectHereAs connects under our own pid.
func (c *Connector) connectHereAs(sock *Socket, at Name) (pid int, err error) {
	return os.Getpid(), c.As.Do(func() error { return connectRaw(sock.fd, at, connectHere) })
}

// connectHere is connect(2) by the calling thread.
func connectHere(fd int, sa *unix.RawSockaddrUnix, n uintptr) error {
	_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(sa)), n)
	if e != 0 {
		return e
	}
	return nil
}

// connectRaw has a socket connected to a name by connect, which stands for
// connect(2).
func connectRaw(fd int, to Name, connect func(fd int, sa *unix.RawSockaddrUnix, n uintptr) error) error {
	sa := unix.RawSockaddrUnix{Family: unix.AF_UNIX}
	if len(to) > len(sa.Path) || !to.Abstract() && len(to) == len(sa.Path) {
		return fmt.Errorf("name of %d bytes: %w", len(to), unix.ENAMETOOLONG)
	}
	for i := range len(to) {
		sa.Path[i] = int8(to[i])
	}
	n := unsafe.Offsetof(sa.Path) + uintptr(len(to))
	if !to.Abstract() {
		n++ // the final NUL
	}
	restore, err := keepUnnamed(fd)
	if err != nil {
		return err
	}
	if err := connect(fd, &sa, n); err != nil {
		return errors.Join(err, restore())
	}
	return restore()
}

func (c *Connector) checkListener(sock *Socket, to Name) error {
	if c.ListenerUID < 0 {
		return nil
	}
	uid := int64(-1)
	if t, err := sock.Type(); err != nil {
		return err
	} else if t == Dgram {
		if uid, err = DgramPeerUID(sock); err != nil {
			return fmt.Errorf("check who made %s: %w", to, err)
		}
	} else {
		cred, err := unix.GetsockoptUcred(sock.fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return fmt.Errorf("check who listens at %s: %w", to, err)
		}
		uid = int64(cred.Uid)
	}
	if uid == c.ListenerUID {
		return nil
	}
	return fmt.Errorf("connect to %s: uid %d listens there, expected uid %d: %w", to, uid, c.ListenerUID, ErrListener)
}

// DgramPeerUID tells who made the socket that a datagram socket is connected
// to, from sock_diag: datagram sockets have no SO_PEERCRED.
func DgramPeerUID(sock *Socket) (int64, error) {
	inode, err := sock.Inode()
	if err != nil {
		return -1, err
	}
	ns, err := socketNetns(sock)
	if err != nil {
		return -1, err
	}
	defer ns.Close()
	d, err := dialDiag(ns)
	if err != nil {
		return -1, err
	}
	defer d.Close()
	sk, err := d.one(inode)
	if err != nil {
		return -1, err
	}
	if sk == nil || sk.peer == 0 {
		return -1, errors.New("sock_diag does not show its peer")
	}
	peer, err := d.one(sk.peer)
	if err != nil {
		return -1, err
	}
	if peer == nil {
		return -1, errors.New("its peer is in another network namespace")
	}
	return peer.uid, nil
}

// hangupBacklog leaves room for strangers at Hangup's listener.
const hangupBacklog = 64

// Hangup makes an unconnected stream or seqpacket socket a dead connection:
// EOF for readers, EPIPE for writers, as after the daemon's end. It connects
// it in place to a listener that goes away at once. A datagram socket stays
// unconnected: that is what it finds when its peer has gone.
func Hangup(sock *Socket) error {
	t, err := sock.Type()
	if err != nil {
		return fmt.Errorf("hang up: %w", err)
	}
	if t == Dgram {
		return nil
	}
	ns, err := socketNetns(sock)
	if err != nil {
		return fmt.Errorf("hang up: %w", err)
	}
	defer ns.Close()
	var l int
	// Abstract names belong to a network namespace: the socket's own.
	err = ns.do(func() (err error) {
		l, err = unix.Socket(unix.AF_UNIX, int(t)|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("hang up: make a listener: %w", err)
	}
	defer unix.Close(l)
	// An empty name asks the kernel for a free abstract one (unix(7)).
	if err := unix.Bind(l, &unix.SockaddrUnix{}); err != nil {
		return fmt.Errorf("hang up: bind a listener: %w", err)
	}
	if err := unix.Listen(l, hangupBacklog); err != nil {
		return fmt.Errorf("hang up: listen: %w", err)
	}
	sa, err := unix.Getsockname(l)
	if err != nil {
		return fmt.Errorf("hang up: ask for the listener's name: %w", err)
	}
	restore, err := setNonblock(sock)
	if err != nil {
		return err
	}
	defer restore()
	name := Name("\x00" + strings.TrimPrefix(sa.(*unix.SockaddrUnix).Name, "@"))
	if err := connectRaw(sock.fd, name, connectHere); err != nil {
		return fmt.Errorf("hang up: connect to a listener that will go: %w", err)
	}
	// Accepted: what goes while it waits in the backlog reads as ECONNRESET.
	// Others can see the name too, so ours need not be the first.
	for {
		end, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			unix.Close(end)
		case err == unix.EAGAIN:
			return nil
		case err != unix.EINTR && err != unix.ECONNABORTED:
			return fmt.Errorf("hang up: accept: %w", err)
		}
	}
}

// setNonblock makes sure that connect() on the socket does not wait, and
// returns how to take that back. The flag is the description's, so its owner
// must not run meanwhile, as is so in a restore.
func setNonblock(sock *Socket) (restore func(), err error) {
	fd := uintptr(sock.fd)
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("read the flags of a socket: %w", err)
	}
	if flags&unix.O_NONBLOCK != 0 {
		return func() {}, nil
	}
	if _, err := unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("make a socket non-blocking: %w", err)
	}
	return func() { unix.FcntlInt(fd, unix.F_SETFL, flags) }, nil
}
