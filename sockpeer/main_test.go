// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// actVariable makes the test binary a process of the tests: see acts.
const actVariable = "SOCKPEER_TEST_ACT"

// patience bounds every wait for a condition; nothing passes or fails by it
// unless the condition never comes.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if act := os.Getenv(actVariable); act != "" {
		name, arg, _ := strings.Cut(act, " ")
		acts[name](arg)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: namespaces and other users need it")
	}
}

// process is a child whose fds from 3 on are those it was given.
type process struct {
	t    *testing.T
	pid  int
	in   *os.File
	out  *bufio.Reader
	done bool
}

// start runs an act. It ends when its stdin does, at the latest with the test.
func start(t *testing.T, act string, fds ...int) *process {
	t.Helper()
	outR, outW, err := os.Pipe()
	check(t, err)
	inR, inW, err := os.Pipe()
	check(t, err)
	files := []uintptr{inR.Fd(), outW.Fd(), 2}
	for _, fd := range fds {
		files = append(files, uintptr(fd))
	}
	exe, err := os.Executable()
	check(t, err)
	pid, err := syscall.ForkExec(exe, []string{exe}, &syscall.ProcAttr{
		Env: append(os.Environ(), actVariable+"="+act), Files: files,
	})
	inR.Close()
	outW.Close()
	check(t, err)
	p := &process{t: t, pid: pid, in: inW, out: bufio.NewReader(outR)}
	t.Cleanup(func() {
		p.stop()
		outR.Close()
	})
	if p.line() != "ready" {
		t.Fatalf("the process for %q did not start", act)
	}
	return p
}

func (p *process) line() string {
	p.t.Helper()
	s, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("process %d: %v after %q", p.pid, err, s)
	}
	return strings.TrimSpace(s)
}

func (p *process) stop() {
	if p.done {
		return
	}
	p.done = true
	p.in.Close()
	unix.Kill(p.pid, unix.SIGKILL)
	for {
		if _, err := unix.Wait4(p.pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("in vain waited until %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// noLeak fails the test if it ends with more fds than it began with. To be
// called first.
func noLeak(t *testing.T) {
	t.Helper()
	before := openFDs()
	t.Cleanup(func() {
		for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			after := openFDs()
			if len(after) <= len(before) {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%d fds became %d:\n%v\n%v", len(before), len(after), before, after)
				return
			}
		}
	})
}

func openFDs() []string {
	var out []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		// What the Go runtime opens once, and ReadDir's own.
		if err != nil || strings.HasPrefix(link, "anon_inode:[event") {
			continue
		}
		out = append(out, e.Name()+" "+link)
	}
	return out
}

// fds that a test closes at its end, unless it has done so.
func closing(t *testing.T, fds ...int) {
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
}

func newSocket(t *testing.T, typ sockpeer.Type) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	return fd
}

// address turns a Name into what x/sys wants.
func address(n sockpeer.Name) *unix.SockaddrUnix { return &unix.SockaddrUnix{Name: n.Pattern()} }

func listener(t *testing.T, typ sockpeer.Type, name sockpeer.Name) int {
	t.Helper()
	fd := newSocket(t, typ)
	check(t, unix.Bind(fd, address(name)))
	if typ != sockpeer.Dgram {
		check(t, unix.Listen(fd, 16))
	}
	closing(t, fd)
	return fd
}

func connected(t *testing.T, typ sockpeer.Type, name sockpeer.Name) int {
	t.Helper()
	fd := newSocket(t, typ)
	check(t, unix.Connect(fd, address(name)))
	return fd
}

func accept(t *testing.T, l int) int {
	t.Helper()
	fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
	check(t, err)
	closing(t, fd)
	return fd
}

func pair(t *testing.T, typ sockpeer.Type) (int, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	return fds[0], fds[1]
}

// given starts an act with fds that it alone holds from then on.
func given(t *testing.T, act string, fds ...int) *process {
	t.Helper()
	p := start(t, act, fds...)
	for _, fd := range fds {
		unix.Close(fd)
	}
	return p
}

func inode(t *testing.T, fd int) uint32 {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Fstat(fd, &st))
	return uint32(st.Ino)
}

func scan(t *testing.T, pid int) *sockpeer.Snapshot {
	t.Helper()
	s, err := sockpeer.Scan(pid)
	check(t, err)
	return s
}

// only is the one connection of a tree.
func only(t *testing.T, pid int) sockpeer.Connection {
	t.Helper()
	s := scan(t, pid)
	if len(s.Connections) != 1 {
		t.Fatalf("%d connections, want 1: %+v", len(s.Connections), s.Connections)
	}
	return s.Connections[0]
}

func find(s *sockpeer.Snapshot, inode uint32) *sockpeer.Connection {
	i := slices.IndexFunc(s.Connections, func(c sockpeer.Connection) bool { return c.Inode == inode })
	if i < 0 {
		return nil
	}
	return &s.Connections[i]
}

func procState(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if _, rest, ok := strings.Cut(string(b), ") "); ok {
		return rest[:1]
	}
	return ""
}
