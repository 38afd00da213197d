// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// freePIDs are n pids that nobody has, and that nobody gets soon.
func freePIDs(t *testing.T, n int) (out []int) {
	t.Helper()
	for pid := 20000; len(out) < n; pid++ {
		if pid >= 32768 {
			t.Fatal("there are no free pids")
		}
		if unix.Kill(pid, 0) == unix.ESRCH {
			out = append(out, pid)
		}
	}
	return out
}

// childless fails the test if it leaves a process.
func childless(t *testing.T) {
	t.Cleanup(func() {
		if pid, err := unix.Wait4(-1, nil, unix.WALL|unix.WNOHANG, nil); err != unix.ECHILD {
			t.Errorf("a process is left: %d, %v", pid, err)
		}
	})
}

// sees fails the test unless the accepted half shows who connected.
func sees(t *testing.T, fd, pid int, id sockpeer.Identity) {
	t.Helper()
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	check(t, err)
	if int(cred.Pid) != pid || cred.Uid != id.UID || cred.Gid != id.GID || !slices.Equal(peerGroups(t, fd), id.Groups) {
		t.Errorf("the daemon sees %+v, groups %v; want pid %d, %+v", cred, peerGroups(t, fd), pid, id)
	}
}

func TestConnectAsPID(t *testing.T) {
	needRoot(t)
	for _, typ := range []sockpeer.Type{sockpeer.Stream, sockpeer.Seqpacket} {
		for _, kind := range []string{"path", "abstract"} {
			for _, id := range []sockpeer.Identity{user, root} {
				t.Run(typ.String()+" "+kind, func(t *testing.T) {
					noLeak(t)
					childless(t)
					name := sockpeer.Name(openDir(t) + "/s")
					if kind == "abstract" {
						name = "\x00sockpeer\x00pid"
					}
					l := world(t, typ, name)
					s := dormant(t, typ)
					flags := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t)
					c := sockpeer.Connector{Root: rootDir(t, "/"), As: id, PID: freePIDs(t, 1)[0]}
					pid, err := c.Connect(soon(t, patience), s, name, func() error {
						_, err := io.WriteString(s.Stream(t.Context()), "hello")
						return err
					})
					check(t, err)
					if pid != c.PID {
						t.Errorf("connected as pid %d, want %d", pid, c.PID)
					}
					fd := accept(t, l)
					sees(t, fd, c.PID, id)
					b := make([]byte, 16)
					if n, err := unix.Read(fd, b); err != nil || string(b[:n]) != "hello" {
						t.Errorf("greeted with %q, %v", b[:max(n, 0)], err)
					}
					if after := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t); after != flags {
						t.Errorf("flags %o became %o", flags, after)
					}
					if err := unix.Kill(c.PID, 0); err != unix.ESRCH {
						t.Errorf("the pid is not free for its process: %v", err)
					}
				})
			}
		}
	}
}

// Where the pid cannot be had, the connection is made without.
func TestConnectWithoutPID(t *testing.T) {
	needRoot(t)
	noLeak(t)
	childless(t)
	name := sockpeer.Name(openDir(t) + "/s")
	l := world(t, sockpeer.Stream, name)
	for _, pid := range []int{
		os.Getpid(), 1,
		1 << 30, -1, // clone3 refuses these, as it does all of them without capability
	} {
		c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, PID: pid}
		s := dormant(t, sockpeer.Stream)
		// No time: it is the same attempt.
		got, err := c.Connect(soon(t, time.Second), s, name, nil)
		check(t, err)
		if got != os.Getpid() {
			t.Errorf("pid %d: connected as %d", pid, got)
		}
		sees(t, accept(t, l), os.Getpid(), user)
	}
}

func TestConnectAsPIDWaits(t *testing.T) {
	needRoot(t)
	noLeak(t)
	childless(t)
	name := sockpeer.Name(openDir(t) + "/late")
	c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, PID: freePIDs(t, 1)[0]}
	made := make(chan int, 1)
	go func() {
		fd, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		time.Sleep(3 * time.Millisecond) // later than the first try, mostly
		unix.Bind(fd, address(name))
		os.Chmod(string(name), 0o700)
		time.Sleep(50 * time.Millisecond) // there, but nobody listens
		unix.Listen(fd, 1)
		time.Sleep(50 * time.Millisecond) // listens, but is not open to others
		os.Chmod(string(name), 0o777)
		made <- fd
	}()
	pid, err := c.Connect(soon(t, patience), dormant(t, sockpeer.Stream), name, nil)
	l := <-made
	closing(t, l)
	check(t, err)
	if pid != c.PID {
		t.Errorf("connected as pid %d, want %d", pid, c.PID)
	}
	sees(t, accept(t, l), c.PID, user)

	check(t, unix.Shutdown(l, unix.SHUT_RDWR))
	pid, err = c.Connect(soon(t, 50*time.Millisecond), dormant(t, sockpeer.Stream), name, nil)
	if pid != 0 || !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: pid %d, %v", pid, err)
	}
	other := name + "-other"
	world(t, sockpeer.Seqpacket, other)
	pid, err = c.Connect(soon(t, time.Hour), dormant(t, sockpeer.Stream), other, nil)
	if pid != 0 || !errors.Is(err, unix.EPROTOTYPE) {
		t.Errorf("another type: pid %d, %v", pid, err)
	}
}

// It is the child that the permissions of a socket file are checked for.
func TestConnectAsPIDPermissions(t *testing.T) {
	needRoot(t)
	noLeak(t)
	childless(t)
	mine := sockpeer.Name(openDir(t) + "/mine")
	l := listener(t, sockpeer.Stream, mine)
	check(t, os.Chown(string(mine), 4000, 5000))
	check(t, os.Chmod(string(mine), 0o660))
	for _, c := range []struct {
		what string
		as   sockpeer.Identity
		ok   bool
	}{
		{"its owner", sockpeer.Identity{UID: 4000, GID: 4000}, true},
		{"by a supplementary group", sockpeer.Identity{UID: 1000, GID: 1001, Groups: []uint32{7, 5000}}, true},
		{"another user", user, false},
		{"root without capabilities", root, false},
		{"root with CAP_DAC_OVERRIDE", sockpeer.Identity{CapEff: 1 << unix.CAP_DAC_OVERRIDE}, true},
	} {
		wait := patience
		if !c.ok {
			wait = 30 * time.Millisecond
		}
		conn := sockpeer.Connector{Root: rootDir(t, "/"), As: c.as, PID: freePIDs(t, 1)[0]}
		_, err := conn.Connect(soon(t, wait), dormant(t, sockpeer.Stream), mine, nil)
		if c.ok != (err == nil) || err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: %v", c.what, err)
		}
		if err == nil {
			sees(t, accept(t, l), conn.PID, c.as)
		}
	}
}

func TestConnectAsPIDDatagram(t *testing.T) {
	needRoot(t)
	noLeak(t)
	childless(t)
	for _, name := range []sockpeer.Name{sockpeer.Name(openDir(t) + "/log"), "\x00sockpeer-log"} {
		l := world(t, sockpeer.Dgram, name)
		s := dormant(t, sockpeer.Dgram)
		c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, PID: freePIDs(t, 1)[0]}
		pid, err := c.Connect(soon(t, patience), s, name, nil)
		check(t, err)
		if pid != c.PID {
			t.Errorf("connected as pid %d, want %d", pid, c.PID)
		}
		must(unix.Write(s.FD(), []byte("logged")))(t)
		b := make([]byte, 16)
		if n, err := unix.Read(l, b); err != nil || string(b[:n]) != "logged" {
			t.Errorf("received %q, %v", b[:max(n, 0)], err)
		}
	}
}

// A socket that asks for credentials gets no name by connecting.
func TestConnectAsPIDStaysUnnamed(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-passcred")
	l := world(t, sockpeer.Stream, name)
	for _, pid := range []int{freePIDs(t, 1)[0], os.Getpid()} {
		s := dormant(t, sockpeer.Stream)
		check(t, unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
		c := sockpeer.Connector{As: user, PID: pid}
		if _, err := c.Connect(soon(t, 30*time.Millisecond), s, "\x00sockpeer-nobody", nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect to nobody: %v", err)
		}
		asks := must(unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_PASSCRED))(t)
		got, err := c.Connect(soon(t, patience), s, name, nil)
		check(t, err)
		fd := accept(t, l)
		sees(t, fd, got, user)
		asks += must(unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_PASSCRED))(t)
		own := must(unix.Getsockname(s.FD()))(t).(*unix.SockaddrUnix).Name
		if asks != 2 || own != "" && own != "@" { // x/sys writes no name as either
			t.Errorf("pid %d: asks for credentials %d times of 2, its name is %q", pid, asks, own)
		}
	}
}

func TestConnectAsManyPIDs(t *testing.T) {
	needRoot(t)
	noLeak(t)
	childless(t)
	name := sockpeer.Name(openDir(t) + "/many")
	l := newSocket(t, sockpeer.Stream)
	closing(t, l)
	check(t, unix.Bind(l, address(name)))
	check(t, os.Chmod(string(name), 0o777))
	pids := freePIDs(t, 100)
	check(t, unix.Listen(l, len(pids)))
	slots := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for _, pid := range pids {
		s := dormant(t, sockpeer.Stream)
		c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, PID: pid, Slots: slots}
		wg.Go(func() {
			if got, err := c.Connect(soon(t, patience), s, name, nil); err != nil || got != pid {
				t.Errorf("connect as pid %d: as %d, %v", pid, got, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	var seen []int
	for range pids {
		fd := accept(t, l)
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		check(t, err)
		if cred.Uid != user.UID {
			t.Errorf("the daemon sees %+v", cred)
		}
		seen = append(seen, int(cred.Pid))
	}
	slices.Sort(seen)
	if !slices.Equal(seen, pids) {
		t.Errorf("the daemon sees pids %v", seen)
	}
}
