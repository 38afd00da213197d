// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// listenAs makes a listener of another user's.
func listenAs(t *testing.T, id sockpeer.Identity, typ sockpeer.Type, name sockpeer.Name) int {
	t.Helper()
	fd := -1
	check(t, id.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.Bind(fd, address(name)); err != nil || typ == sockpeer.Dgram {
			return err
		}
		return unix.Listen(fd, 16)
	}))
	closing(t, fd)
	return fd
}

// dead asserts what an application finds on a closed connection.
func dead(t *testing.T, s *sockpeer.Socket) {
	t.Helper()
	for range 2 {
		n, _, err := unix.Recvfrom(s.FD(), make([]byte, 8), unix.MSG_DONTWAIT)
		if n != 0 || err != nil {
			t.Errorf("read: %d, %v, want the end of file", n, err)
		}
	}
	if err := unix.Sendto(s.FD(), []byte("x"), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write: %v, want EPIPE", err)
	}
}

func TestConnectWrongListener(t *testing.T) {
	needRoot(t)
	for _, typ := range types {
		t.Run(typ.String(), func(t *testing.T) {
			noLeak(t)
			name := sockpeer.Name("\x00sockpeer-wrong")
			listenAs(t, sockpeer.Identity{UID: 2000, GID: 2000}, typ, name)
			check(t, connectAs(t, patience, user, 2000, dormant(t, typ), name))
			check(t, connectAs(t, patience, user, -1, dormant(t, typ), name))
			s := dormant(t, typ)
			err := connectAs(t, patience, user, 0, s, name)
			if !errors.Is(err, sockpeer.ErrListener) || !strings.Contains(err.Error(), "2000") {
				t.Fatalf("%v", err)
			}
			if typ == sockpeer.Dgram {
				if ok := must(s.Connected())(t); ok {
					t.Error("still connected")
				}
				return
			}
			dead(t, s)
		})
	}
}

func TestConnectPeerUID(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-uid")
	l := listenAs(t, sockpeer.Identity{UID: 2000, GID: 2000}, sockpeer.Stream, name)
	fd := connected(t, sockpeer.Stream, name)
	accept(t, l)
	if c := only(t, given(t, "hold", fd).pid); c.Peer.UID != 2000 {
		t.Errorf("%+v", c.Peer)
	}
	dgram := sockpeer.Name("\x00sockpeer-uid-dgram")
	listenAs(t, sockpeer.Identity{UID: 2000, GID: 2000}, sockpeer.Dgram, dgram)
	fd = connected(t, sockpeer.Dgram, dgram)
	s := sockpeer.NewSocket(dup(fd), "s")
	if uid := must(sockpeer.DgramPeerUID(s))(t); uid != 2000 {
		t.Errorf("datagrams: uid %d", uid)
	}
	check(t, s.Close())
	if c := only(t, given(t, "hold", fd).pid); c.Peer.UID != 2000 {
		t.Errorf("%+v", c.Peer)
	}
	if _, err := sockpeer.DgramPeerUID(dormant(t, sockpeer.Dgram)); err == nil {
		t.Error("an unconnected socket has a peer")
	}
}

// TestScanOwner: a listener made by one process, and another that accepts.
func TestScanOwner(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name(t.TempDir() + "/s")
	l := listener(t, sockpeer.Stream, name)
	worker := start(t, "accept", l)
	fd := connected(t, sockpeer.Stream, name)
	if worker.line() != "accepted" {
		t.Fatal("not accepted")
	}
	p := given(t, "hold", fd)
	c := only(t, p.pid)
	if c.Peer.PID != worker.pid || c.Peer.Exe == "" || c.Peer.UID != 0 {
		t.Errorf("%+v, the worker is %d", c.Peer, worker.pid)
	}
	all, err := sockpeer.ScanAll()
	check(t, err)
	if got := find(all, c.Inode); got == nil || got.Peer != c.Peer {
		t.Errorf("ScanAll: %+v", got)
	}
}

func TestConnectGreet(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-greet")
	l := listener(t, sockpeer.Stream, name)
	check(t, unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
	s := dormant(t, sockpeer.Stream)
	c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, ListenerUID: 0}
	var euid int
	_, err := c.Connect(soon(t, patience), s, name, func() error {
		euid = unix.Geteuid()
		_, err := io.WriteString(s.Stream(t.Context()), "hello")
		return err
	})
	check(t, err)
	if euid != int(user.UID) || unix.Geteuid() != 0 {
		t.Errorf("greeted as %d, and we are %d", euid, unix.Geteuid())
	}
	fd := accept(t, l)
	b, oob := make([]byte, 16), make([]byte, 256)
	n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, 0)
	check(t, err)
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	check(t, err)
	cred, err := unix.ParseUnixCredentials(&msgs[0])
	check(t, err)
	if string(b[:n]) != "hello" || cred.Uid != user.UID || cred.Gid != user.GID {
		t.Errorf("%q from %+v", b[:n], cred)
	}

	// A greeting that fails leaves nothing an application could take for an answer.
	failed := errors.New("no greeting")
	s = dormant(t, sockpeer.Stream)
	_, err = c.Connect(soon(t, patience), s, name, func() error {
		fd := accept(t, l)
		unix.Write(fd, []byte("half an answer"))
		return failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	dead(t, s)
}

func TestIdentityIsOneThreads(t *testing.T) {
	needRoot(t)
	noLeak(t)
	check(t, user.Do(func() error {
		mine := unix.Gettid()
		if mine == os.Getpid() {
			t.Error("the process' first thread, which cannot end, took the identity")
		}
		// Those of the tests before may be about to end.
		for end := time.Now().Add(patience); ; {
			ids := threadsOf(user.UID)
			if slices.Equal(ids, []string{itoa(mine)}) {
				return nil
			}
			if time.Now().After(end) {
				t.Errorf("threads %v have the identity, ours is %d", ids, mine)
				return nil
			}
		}
	}))
}

// TestIdentityCannotBeSignalled: a process of the user whose identity a thread
// has may not signal it, which could end or stop all of ours.
func TestIdentityCannotBeSignalled(t *testing.T) {
	needRoot(t)
	noLeak(t)
	check(t, user.Do(func() error {
		kill := exec.Command("/bin/sh", "-c", fmt.Sprintf("kill -0 %d", unix.Gettid())) // no signal, only whether it may
		kill.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user.UID, Gid: user.GID}}
		out := make(chan string)
		go func() { // another thread, with our own rights, starts it
			b, err := kill.CombinedOutput()
			if err == nil {
				b = append(b, "allowed"...)
			}
			out <- string(b)
		}()
		if said := <-out; !strings.Contains(said, "not permitted") {
			t.Errorf("a process of uid %d that signals the thread: %s", user.UID, said)
		}
		return nil
	}))
}

// threadsOf lists our threads with that effective uid.
func threadsOf(uid uint32) (out []string) {
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, e := range tasks {
		b, err := os.ReadFile("/proc/self/task/" + e.Name() + "/status")
		if err != nil {
			continue // it ended
		}
		_, rest, _ := strings.Cut(string(b), "\nUid:\t")
		if f := strings.Fields(rest); len(f) > 1 && f[1] == itoa(int(uid)) {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestHangup(t *testing.T) {
	needRoot(t)
	for _, typ := range types {
		t.Run(typ.String(), func(t *testing.T) {
			noLeak(t)
			before := len(must(sockpeer.Listeners())(t))
			s := dormant(t, typ)
			flags := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t)
			check(t, sockpeer.Hangup(s))
			if typ == sockpeer.Dgram {
				if ok := must(s.Connected())(t); ok {
					t.Error("connected")
				}
				return
			}
			p := []unix.PollFd{{Fd: int32(s.FD()), Events: unix.POLLIN}}
			if _, err := unix.Poll(p, 0); err != nil || p[0].Revents&(unix.POLLIN|unix.POLLHUP) != unix.POLLIN|unix.POLLHUP || p[0].Revents&unix.POLLERR != 0 {
				t.Errorf("poll: %x, %v", p[0].Revents, err)
			}
			dead(t, s)
			if after := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t); after != flags {
				t.Errorf("flags %o became %o", flags, after)
			}
			if after := len(must(sockpeer.Listeners())(t)); after != before {
				t.Errorf("%d listeners became %d", before, after)
			}
		})
	}
}
