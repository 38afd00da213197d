// SPDX-License-Identifier: Apache-2.0

package child_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer/child"
)

// actVariable makes the test binary a program of the tests: it writes its
// number to each descriptor that the variable names.
const actVariable = "CHILD_TEST_ACT"

func TestMain(m *testing.M) {
	if act := os.Getenv(actVariable); act != "" {
		for s := range strings.FieldsSeq(act) {
			fd, _ := strconv.Atoi(s)
			unix.Write(fd, []byte(s))
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// orphan runs a program whose stdout it returns.
func orphan(t *testing.T, argv ...string) (pid int, out string) {
	t.Helper()
	r, w, err := os.Pipe()
	check(t, err)
	defer r.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	check(t, err)
	defer null.Close()
	none := int(null.Fd())
	pid, err = child.Orphan(argv[0], argv, []string{"PATH=/usr/bin:/bin"}, []int{none, int(w.Fd()), none, -1, none})
	w.Close()
	check(t, err)
	b, err := io.ReadAll(r)
	check(t, err)
	noChildren(t)
	return pid, string(b)
}

// field is a line of /proc/PID/status.
func field(status, name string) string {
	for line := range strings.Lines(status) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func TestOrphan(t *testing.T) {
	pid, status := orphan(t, "/bin/cat", "/proc/self/status")
	ours, err := os.ReadFile("/proc/thread-self/status")
	check(t, err)
	if field(status, "Pid") != strconv.Itoa(pid) || field(status, "PPid") == strconv.Itoa(os.Getpid()) {
		t.Errorf("pid %d:\n%s", pid, status)
	}
	// The program's own handlers are none.
	for name, want := range map[string]string{
		"SigBlk": field(string(ours), "SigBlk"), "SigIgn": field(string(ours), "SigIgn"), "SigCgt": "0000000000000000",
	} {
		if got := field(status, name); got != want {
			t.Errorf("%s: %s, ours is %s", name, got, want)
		}
	}
	pid, stat := orphan(t, "/bin/cat", "/proc/self/stat")
	_, rest, _ := strings.Cut(stat, ") ")
	// State, parent, process group, session (proc_pid_stat(5)).
	if f := strings.Fields(rest); f[2] != strconv.Itoa(pid) || f[3] != strconv.Itoa(pid) {
		t.Errorf("pid %d: process group %s, session %s", pid, f[2], f[3])
	}
}

func TestOrphanDescriptors(t *testing.T) {
	// Not close-on-exec: nothing but Orphan keeps it from the program.
	stray, err := unix.Open(os.DevNull, unix.O_RDONLY, 0)
	check(t, err)
	defer unix.Close(stray)
	_, out := orphan(t, "/bin/ls", "/proc/self/fd")
	// 3 is the folder that ls reads.
	if got := strings.Fields(out); fmt.Sprint(got) != "[0 1 2 3 4]" {
		t.Errorf("descriptors %v", got)
	}
}

// Descriptors that change places must not overwrite each other.
func TestOrphanSwapsDescriptors(t *testing.T) {
	exe, err := os.Executable()
	check(t, err)
	var r, w [3]int
	for i := range r {
		var p [2]int
		check(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
		r[i], w[i] = p[0], p[1]
		defer unix.Close(p[0])
	}
	fds := make([]int, w[2]+1)
	for i := range fds {
		fds[i] = -1
	}
	fds[w[0]], fds[w[1]], fds[w[2]] = w[1], w[0], w[2]
	env := append(os.Environ(), fmt.Sprintf("%s=%d %d %d", actVariable, w[0], w[1], w[2]))
	_, err = child.Orphan(exe, []string{exe}, env, fds)
	for _, fd := range w {
		unix.Close(fd)
	}
	check(t, err)
	for i, want := range []int{w[1], w[0], w[2]} {
		b := make([]byte, 64)
		n, err := unix.Read(r[i], b)
		check(t, err)
		if string(b[:n]) != strconv.Itoa(want) {
			t.Errorf("pipe %d is the program's descriptor %s, want %d", i, b[:n], want)
		}
	}
}

func TestOrphanFails(t *testing.T) {
	for _, c := range []struct {
		what, path string
		argv       []string
		fds        []int
		err        error
	}{
		{"no such program", "/nowhere/at/all", nil, nil, unix.ENOENT},
		{"not a program", "/etc/passwd", nil, nil, unix.EACCES},
		{"an argument with a NUL", "/bin/true", []string{"a\x00b"}, nil, unix.EINVAL},
		{"no such descriptor", "/bin/true", nil, []int{0, 1, 1 << 20}, unix.EBADF},
		{"a negative descriptor", "/bin/true", nil, []int{-2}, unix.EBADF},
	} {
		pid, err := child.Orphan(c.path, c.argv, nil, c.fds)
		if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.path) || pid != 0 {
			t.Errorf("%s: pid %d, %v", c.what, pid, err)
		}
		noChildren(t)
	}
}

func BenchmarkOrphan(b *testing.B) {
	for b.Loop() {
		if _, err := child.Orphan("/bin/true", []string{"true"}, nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}
