// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

// lookupBinary is test/lookup, built once.
var lookupBinary = sync.OnceValues(func() (string, error) { return build("lookup/lookup.c") })

// build builds a C program that any user may run.
func build(source string, options ...string) (string, error) {
	name := strings.TrimSuffix(filepath.Base(source), ".c")
	dir, err := os.MkdirTemp("/tmp", name)
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, name)
	args := append([]string{"-O2", "-Wall", "-Werror", "-pthread", "-Ilookup", "-o", bin, source}, options...)
	out, err := exec.Command("gcc", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", source, err, out)
	}
	return bin, os.Chmod(dir, 0o755)
}

// Lookup is a running test/lookup.
type Lookup struct {
	*Process
	stats    string
	perRound int // lookups of all threads
}

// round is what most tests look up: in sssd's cache, in nscd's, and over the
// connection to sssd.
var round = []string{"-u", "alice", "-g", "bob", "-n", "nobody-there"}

// startLookup starts lookup as alice and waits until every thread has made a
// round.
func startLookup(t testing.TB, args ...string) *Lookup {
	t.Helper()
	bin, err := lookupBinary()
	if err != nil {
		t.Fatal(err)
	}
	return startRounds(t, alice, bin, args...)
}

// startRounds starts a program that takes lookup's options.
func startRounds(t testing.TB, u User, bin string, args ...string) *Lookup {
	t.Helper()
	var err error
	names, threads := 0, 1
	for i, a := range args {
		switch a {
		case "-u", "-g", "-n":
			names++
		case "-t":
			if threads, err = strconv.Atoi(args[i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	l := &Lookup{stats: filepath.Join(folder(t), "stats"), perRound: max(names, 1) * threads}
	l.Process = start(t, u, nil, bin, append([]string{"-o", l.stats}, args...)...)
	l.writes = []string{l.stats}
	l.alive = func(t testing.TB) {
		t.Helper()
		if slices.Contains(args, "-p") {
			l.rounds(t, 1)
		} else {
			l.more(t, 2*l.perRound)
		}
	}
	eventually(t, "a round of each thread", func() bool { n, _, all := l.count(t); return n > 0 && all })
	return l
}

// count sums up the lookups and those that failed; all: every thread has made
// some.
func (l *Lookup) count(t testing.TB) (n, failed int, all bool) {
	t.Helper()
	b, err := os.ReadFile(l.stats)
	if err != nil {
		return 0, 0, false
	}
	all = true
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 14 {
			return 0, 0, false // the file is just being made
		}
		a, err1 := strconv.Atoi(f[3])
		b, err2 := strconv.Atoi(f[5])
		if err1 != nil || err2 != nil {
			t.Fatalf("%s: %q", l.stats, line)
		}
		n, failed, all = n+a, failed+b, all && a > 0
	}
	return n, failed, all
}

// longest is the longest wait of any thread in its last round.
func (l *Lookup) longest(t testing.TB) (longest time.Duration) {
	t.Helper()
	b, err := os.ReadFile(l.stats)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		us, err := strconv.Atoi(f[len(f)-1])
		if err != nil {
			t.Fatalf("%s: %q", l.stats, line)
		}
		longest = max(longest, time.Duration(us)*time.Microsecond)
	}
	return longest
}

func (l *Lookup) failed(t testing.TB) int {
	t.Helper()
	_, failed, _ := l.count(t)
	return failed
}

// ask starts a round of a paused lookup.
func (l *Lookup) ask(t testing.TB) {
	t.Helper()
	if err := unix.Kill(l.PID, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
}

// more waits for n more lookups.
func (l *Lookup) more(t testing.TB, n int) {
	t.Helper()
	before, _, _ := l.count(t)
	eventually(t, fmt.Sprintf("%d more lookups", n), func() bool { now, _, _ := l.count(t); return now >= before+n })
}

// rounds makes rounds of a paused lookup, one after another, and returns the
// longest wait in them.
func (l *Lookup) rounds(t testing.TB, n int) (longest time.Duration) {
	t.Helper()
	for range n {
		before, _, _ := l.count(t)
		l.ask(t)
		eventually(t, "a round of lookups", func() bool { now, _, _ := l.count(t); return now >= before+l.perRound })
		longest = max(longest, l.longest(t))
	}
	return longest
}

// wantFailed checks how many lookups have failed so far.
func (l *Lookup) wantFailed(t testing.TB, when string, want int) {
	t.Helper()
	if n := l.failed(t); n != want {
		b, _ := os.ReadFile(l.stats)
		t.Errorf("%s: %d lookups failed, expected %d:\n%s", when, n, want, b)
	}
}

// keepStats puts the stats file back as it was at the dump, which a second
// restore of the same images must find.
func (l *Lookup) keepStats(t testing.TB) (back func()) {
	t.Helper()
	b, err := os.ReadFile(l.stats)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.WriteFile(l.stats, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// zeros checks that memory at the address reads as zeros.
func (l *Lookup) zeros(t testing.TB, m mapping) {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", l.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 64<<10) // the header, and some of the tables
	if _, err := f.ReadAt(b, int64(m.start)); err != nil {
		t.Errorf("read the memory that was a mapping of %s: %v", m.path, err)
	} else if len(bytes.Trim(b, "\x00")) > 0 {
		t.Errorf("the memory that was a mapping of %s does not read as zeros", m.path)
	}
}

// fds maps the fds of the process to what they are.
func (l *Lookup) fds(t testing.TB) map[int]string {
	t.Helper()
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", l.PID))
	out := map[int]string{}
	for _, link := range links {
		fd, _ := strconv.Atoi(filepath.Base(link))
		if name, err := os.Readlink(link); err == nil {
			out[fd] = name
		}
	}
	return out
}

// socketCount is how many fds of the process are sockets.
func (l *Lookup) socketCount(t testing.TB) (n int) {
	t.Helper()
	for name := range maps.Values(l.fds(t)) {
		if strings.HasPrefix(name, "socket:") {
			n++
		}
	}
	return n
}

// mapping is where a process has mapped a file.
type mapping struct {
	start, end uint64
	inode      uint64
	path       string // with " (deleted)" if it is
}

// mappings finds the mappings of caches.
func (l *Lookup) mappings(t testing.TB) (out []mapping) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", l.PID))
	if err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 6 {
			continue
		}
		if _, _, ok := image.CachePath(strings.Join(f[5:], " ")); !ok {
			continue
		}
		m := mapping{path: strings.Join(f[5:], " ")}
		if _, err := fmt.Sscanf(f[0], "%x-%x", &m.start, &m.end); err != nil {
			t.Fatal(err)
		}
		m.inode, _ = strconv.ParseUint(f[4], 10, 64)
		out = append(out, m)
	}
	return out
}

// live reports whether the process has mapped the file that is at path now.
func (l *Lookup) live(t testing.TB, path string) bool {
	t.Helper()
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return false
	}
	for _, m := range l.mappings(t) {
		if m.path == path && m.inode == st.Ino {
			return true
		}
	}
	return false
}

// liveNSCD reports whether the process has mapped the database that nscd has
// open now, whether or not the file has a name.
func (l *Lookup) liveNSCD(t testing.TB) bool {
	t.Helper()
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", named(t, "nscd")))
	for _, link := range links {
		var st unix.Stat_t
		name, err := os.Readlink(link)
		if err != nil || !strings.Contains(name, "/nscd/") || unix.Stat(link, &st) != nil {
			continue
		}
		for _, m := range l.mappings(t) {
			if strings.Contains(m.path, "/nscd/") && m.inode == st.Ino {
				return true
			}
		}
	}
	return false
}

// record reads the record of a dump.
func record(t testing.TB, dir string) *proto.Record {
	t.Helper()
	rec, err := image.ReadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}
