// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// user is somebody without rights.
var user = sockpeer.Identity{UID: 1000, GID: 1001, Groups: []uint32{1002, 1003}}

// root is uid 0 without a capability, as in a container.
var root = sockpeer.Identity{}

func rootDir(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// open is a directory that everybody may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o777))
	check(t, os.Chmod(filepath.Dir(dir), 0o755))
	return dir
}

// world is a listener that everybody may connect to.
func world(t *testing.T, typ sockpeer.Type, name sockpeer.Name) int {
	t.Helper()
	l := listener(t, typ, name)
	if !name.Abstract() {
		check(t, os.Chmod(string(name), 0o777))
	}
	return l
}

func dormant(t *testing.T, typ sockpeer.Type) *sockpeer.Socket {
	t.Helper()
	s := sockpeer.NewSocket(newSocket(t, typ), "the test's socket")
	t.Cleanup(func() { s.Close() })
	return s
}

func soon(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func connectAs(t *testing.T, d time.Duration, id sockpeer.Identity, uid int64, s *sockpeer.Socket, to sockpeer.Name) error {
	t.Helper()
	c := sockpeer.Connector{Root: rootDir(t, "/"), As: id, ListenerUID: uid}
	pid, err := c.Connect(soon(t, d), s, to, nil)
	if err == nil && pid != os.Getpid() {
		t.Errorf("the listener sees pid %d, not ours", pid)
	}
	return err
}

func peerGroups(t *testing.T, fd int) []uint32 {
	t.Helper()
	out := make([]uint32, 64)
	n := uint32(len(out) * 4)
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&out[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		t.Fatal(e)
	}
	return out[:n/4]
}

func TestConnectAsUser(t *testing.T) {
	needRoot(t)
	for _, typ := range types[:2] {
		for _, kind := range []string{"path", "abstract"} {
			t.Run(typ.String()+" "+kind, func(t *testing.T) {
				noLeak(t)
				name := sockpeer.Name(openDir(t) + "/" + strings.Repeat("long", 10))
				if kind == "abstract" {
					name = "\x00sock\x00peer"
				}
				l := world(t, typ, name)
				s := dormant(t, typ)
				flags := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t)
				check(t, connectAs(t, patience, user, 0, s, name))
				fd := accept(t, l)
				cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
				check(t, err)
				if cred.Uid != user.UID || cred.Gid != user.GID || !slices.Equal(peerGroups(t, fd), user.Groups) {
					t.Errorf("the daemon sees %+v, groups %v", cred, peerGroups(t, fd))
				}
				if after := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t); after != flags {
					t.Errorf("flags %o became %o", flags, after)
				}
				if ok := must(s.Connected())(t); !ok {
					t.Error("not connected")
				}
				if err := connectAs(t, patience, user, 0, s, name); !errors.Is(err, unix.EISCONN) && !errors.Is(err, unix.EINVAL) {
					t.Errorf("a second time: %v", err)
				}
			})
		}
	}
}

func TestConnectKeepsNonblock(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-nonblock")
	listener(t, sockpeer.Stream, name)
	for _, on := range []bool{false, true} {
		s := dormant(t, sockpeer.Stream)
		check(t, unix.SetNonblock(s.FD(), on))
		c := sockpeer.Connector{As: me(t), ListenerUID: -1}
		_, err := c.Connect(t.Context(), s, name, nil)
		check(t, err)
		if flags := must(unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0))(t); (flags&unix.O_NONBLOCK != 0) != on {
			t.Errorf("flags %o, O_NONBLOCK was %v", flags, on)
		}
	}
}

func me(t *testing.T) sockpeer.Identity {
	t.Helper()
	return must(sockpeer.ReadProcess(os.Getpid()))(t).Identity
}

func TestConnectPermissions(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := openDir(t)
	closed := filepath.Join(dir, "closed")
	check(t, os.Mkdir(closed, 0o700))
	inClosed := sockpeer.Name(closed + "/s")
	world(t, sockpeer.Stream, inClosed)
	mine := sockpeer.Name(dir + "/mine")
	listener(t, sockpeer.Stream, mine)
	check(t, os.Chown(string(mine), 4000, 4000))
	check(t, os.Chmod(string(mine), 0o600))
	grouped := sockpeer.Name(dir + "/grouped")
	listener(t, sockpeer.Stream, grouped)
	check(t, os.Chown(string(grouped), 0, int(user.Groups[1])))
	check(t, os.Chmod(string(grouped), 0o660))
	override := sockpeer.Identity{CapEff: 1 << unix.CAP_DAC_OVERRIDE}

	for _, c := range []struct {
		what string
		as   sockpeer.Identity
		to   sockpeer.Name
		ok   bool
	}{
		{"a directory of root's", user, inClosed, false},
		{"a directory of root's, as root", root, inClosed, true},
		{"another user's socket, as root without capabilities", root, mine, false},
		{"another user's socket, as root with CAP_DAC_OVERRIDE", override, mine, true},
		{"another user's socket, as a user", user, mine, false},
		{"its own socket", sockpeer.Identity{UID: 4000, GID: 4000}, mine, true},
		{"by a supplementary group", user, grouped, true},
		{"without that group", sockpeer.Identity{UID: 1000, GID: 1001}, grouped, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := dormant(t, sockpeer.Stream)
			// Refused, it tries again: the daemon may not be done with its file.
			wait := patience
			if !c.ok {
				wait = 30 * time.Millisecond
			}
			err := connectAs(t, wait, c.as, 0, s, c.to)
			if c.ok != (err == nil) || err != nil && !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%v", err)
			}
			if connected := must(s.Connected())(t); connected != c.ok {
				t.Errorf("connected: %v", connected)
			}
		})
	}
}

func TestConnectStaysInRoot(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := openDir(t)
	inner := filepath.Join(dir, "root")
	check(t, os.Mkdir(inner, 0o755))
	outside := sockpeer.Name(dir + "/s")
	world(t, sockpeer.Stream, outside)
	check(t, os.Symlink(string(outside), inner+"/absolute"))
	check(t, os.Symlink("../s", inner+"/dots"))
	check(t, os.Symlink("/in", inner+"/within"))
	world(t, sockpeer.Stream, sockpeer.Name(inner+"/in"))
	c := sockpeer.Connector{Root: rootDir(t, inner), As: user, ListenerUID: -1}
	for to, ok := range map[sockpeer.Name]bool{"/absolute": false, "/dots": false, "/../s": false, "/in": true, "/within": true, "//in": true} {
		s := dormant(t, sockpeer.Stream)
		_, err := c.Connect(soon(t, 50*time.Millisecond), s, to, nil)
		if ok && err != nil || !ok && !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if _, err := c.Connect(t.Context(), dormant(t, sockpeer.Stream), "", nil); err == nil {
		t.Error("connected to no name")
	}
}

func TestConnectWaits(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := openDir(t)
	name := sockpeer.Name(dir + "/late")
	made := make(chan int, 1)
	go func() {
		fd, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		time.Sleep(3 * time.Millisecond) // later than the first try, mostly
		unix.Bind(fd, address(name))
		os.Chmod(string(name), 0o700)
		time.Sleep(30 * time.Millisecond) // there, but nobody listens
		unix.Listen(fd, 1)
		time.Sleep(30 * time.Millisecond) // listens, but is not open to others
		os.Chmod(string(name), 0o777)
		made <- fd
	}()
	err := connectAs(t, patience, user, 0, dormant(t, sockpeer.Stream), name)
	unix.Close(<-made)
	check(t, err)

	// That file is still there.
	err = connectAs(t, 50*time.Millisecond, user, 0, dormant(t, sockpeer.Stream), name)
	if !errors.Is(err, unix.ECONNREFUSED) || !strings.Contains(err.Error(), string(name)) || !strings.Contains(err.Error(), "uid 1000") {
		t.Errorf("nobody listens: %v", err)
	}
	err = connectAs(t, 50*time.Millisecond, user, 0, dormant(t, sockpeer.Stream), "/nowhere/s")
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such name: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, ListenerUID: -1}
	if _, err := c.Connect(ctx, dormant(t, sockpeer.Stream), "/nowhere/s", nil); !errors.Is(err, unix.ENOENT) {
		t.Errorf("the time was over before: %v", err)
	}
	// Errors that no waiting cures come at once, whatever the time.
	world(t, sockpeer.Seqpacket, sockpeer.Name(dir+"/other"))
	if err := connectAs(t, time.Hour, user, 0, dormant(t, sockpeer.Stream), sockpeer.Name(dir+"/other")); !errors.Is(err, unix.EPROTOTYPE) {
		t.Errorf("another type: %v", err)
	}
}

// TestConnectOr: a listener of two names.
func TestConnectOr(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := openDir(t)
	here, stale, closed := sockpeer.Name(dir+"/here"), sockpeer.Name(dir+"/stale"), sockpeer.Name(dir+"/closed")
	world(t, sockpeer.Stream, here)
	world(t, sockpeer.Stream, closed)
	check(t, os.Chmod(string(closed), 0o700))
	check(t, unix.Close(newBound(t, stale)))
	other := sockpeer.Name(dir + "/other")
	world(t, sockpeer.Seqpacket, other)
	for _, tt := range []struct {
		name   string
		to, or sockpeer.Name
		err    error
	}{
		{"the first is missing", "/nowhere/s", here, nil},
		{"nobody listens at the first", stale, here, nil},
		{"the first is not open to us", closed, here, nil},
		{"the second is missing", here, "/nowhere/s", nil},
		{"neither", stale, "/nowhere/s", unix.ECONNREFUSED},
		{"the first is of another type", other, here, unix.EPROTOTYPE},
		{"the same", stale, stale, unix.ECONNREFUSED},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dormant(t, sockpeer.Stream)
			c := sockpeer.Connector{Root: rootDir(t, "/"), As: user, ListenerUID: 0, Or: tt.or}
			wait := patience
			if tt.err != nil {
				wait = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			_, err := c.Connect(ctx, s, tt.to, nil)
			if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) || err != nil && !strings.Contains(err.Error(), string(tt.to)) {
				t.Errorf("got %v, expected %v", err, tt.err)
			}
		})
	}
}

// newBound is a socket with a name at which nobody listens.
func newBound(t *testing.T, name sockpeer.Name) int {
	t.Helper()
	fd := newSocket(t, sockpeer.Stream)
	check(t, unix.Bind(fd, address(name)))
	check(t, os.Chmod(string(name), 0o777))
	return fd
}

func TestConnectFullBacklog(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-full")
	l := newSocket(t, sockpeer.Stream)
	check(t, unix.Bind(l, address(name)))
	check(t, unix.Listen(l, 0))
	closing(t, l)
	check(t, connectAs(t, patience, user, 0, dormant(t, sockpeer.Stream), name))
	if err := connectAs(t, 50*time.Millisecond, user, 0, dormant(t, sockpeer.Stream), name); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a full backlog: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- connectAs(t, patience, user, 0, dormant(t, sockpeer.Stream), name) }()
	accept(t, l)
	check(t, <-done)
}
