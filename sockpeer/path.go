// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxTries bounds how many names are tried for one socket file, give or take
// those of one mount: a mount namespace can hold thousands.
const maxTries = 4096

// maxPath is the longest name that connect(2) takes (sun_path, unix(7)).
const maxPath = 107

// search is for a name by which a process reaches a socket file.
type search struct {
	pid int
	// file is what the daemon's name leads to now, was what it is bound to, if
	// that is another: a mount of a single file still shows that one.
	file, was VFS
	name      Name // as it was bound
	peer      int  // to whom the name leads to file; 0: not known
}

// findPath looks for the file where file systems of its device are mounted
// below a process' root: at the mount point itself, below it under one of the
// last parts of its names elsewhere, and where it is in the file system, as far
// as the mounts of the peer tell that. The shortest name is taken.
func findPath(s search) Name {
	ends, inside := tails(string(s.name)), []string(nil)
	if real, root, ok := findMount(s.peer, s.name); ok {
		ends = tails(string(s.name), real)
		for _, tail := range ends {
			inside = append(inside, path.Join(root, tail))
		}
	}
	if found := s.find(s.file, ends, inside); found != "" || s.was == (VFS{}) {
		return found
	}
	return s.find(s.was, ends, inside)
}

// find tries ends below each mount point, and where inside, paths in the file
// system, are to be found.
func (s search) find(want VFS, ends, inside []string) Name {
	f, err := os.Open(procPath(s.pid, "mountinfo"))
	if err != nil {
		return ""
	}
	defer f.Close()
	names := map[string]bool{}
	for _, m := range readMounts(f) {
		if m.dev != want.Dev {
			continue
		}
		if len(names) > maxTries {
			break
		}
		for _, tail := range ends {
			names[path.Join(m.point, tail)] = true
		}
		for _, p := range inside {
			if rest, ok := strings.CutPrefix(p, m.root); ok && (rest == "" || rest[0] == '/' || m.root == "/") {
				names[path.Join(m.point, rest)] = true
			}
		}
	}
	sorted := slices.SortedFunc(maps.Keys(names), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	for _, name := range sorted {
		if len(name) > maxPath {
			break
		}
		// The mount tells the device; stat(2) may show another (btrfs, overlay).
		if file := findSocket(s.pid, Name(name)); file != nil && uint32(file.ino) == want.Inode && (file.layered || file.is(want)) {
			return Name(name)
		}
	}
	return ""
}

// findMount tells what a name leads a process to: the path without links, below
// the root of its mount namespace, and what of the file system is mounted there.
func findMount(pid int, name Name) (real, root string, ok bool) {
	if pid <= 0 {
		return "", "", false
	}
	fd, err := openFor(pid, name)
	if err != nil {
		return "", "", false
	}
	defer unix.Close(fd)
	real, err1 := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	info, err2 := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	f, err3 := os.Open(procPath(pid, "mountinfo"))
	if err3 != nil {
		return "", "", false
	}
	defer f.Close()
	if err1 != nil || err2 != nil {
		return "", "", false
	}
	for _, m := range readMounts(f) {
		if strings.Contains(string(info), "\nmnt_id:\t"+m.id+"\n") {
			return real, m.root, true
		}
	}
	return "", "", false
}

// tails are the ends of paths, the shortest first: "" and what follows each
// slash.
func tails(paths ...string) []string {
	out := []string{""}
	for _, p := range paths {
		for i := len(p) - 1; i >= 0; i-- {
			if p[i] == '/' && i+1 < len(p) {
				out = append(out, p[i+1:])
			}
		}
	}
	return out
}

// mount is a line of /proc/PID/mountinfo.
type mount struct {
	id    string
	dev   uint32 // as the kernel keeps it
	root  string // what of the file system is mounted
	point string // where, below the root of PID
}

// readMounts reads /proc/PID/mountinfo (proc_pid_mountinfo(5)).
func readMounts(r io.Reader) (mounts []mount) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
		f := strings.Fields(sc.Text())
		if len(f) < 5 {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		a, err1 := strconv.ParseUint(major, 10, 12)
		b, err2 := strconv.ParseUint(minor, 10, 20)
		if err1 == nil && err2 == nil {
			mounts = append(mounts, mount{f[0], uint32(a<<20 | b), unescape(f[3]), unescape(f[4])})
		}
	}
	return mounts
}

// unescape undoes what the kernel does to blanks and backslashes in names
// (mangle, fs/seq_file.c): \040 and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
