// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// gone tells the errors of a process or an fd that vanished meanwhile.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF)
}

func procPath(pid int, elem ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, elem...)...)
}

// numbers lists the entries of a directory of /proc that are numbers.
func numbers(dir string) ([]int, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, n := range names {
		if i, err := strconv.Atoi(n); err == nil {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out, nil
}

// parents maps every process to its parent. /proc/PID/task/TID/children would
// be cheaper, but skips children of a running task (proc(5)).
func parents() (map[int]int, error) {
	pids, err := numbers("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	out := make(map[int]int, len(pids))
	for _, pid := range pids {
		b, err := os.ReadFile(procPath(pid, "stat"))
		if err != nil {
			continue // gone
		}
		if ppid, ok := parseStatPPID(string(b)); ok {
			out[pid] = ppid
		}
	}
	return out, nil
}

// parseStatPPID reads the parent from /proc/PID/stat. The name before it can
// hold blanks and parentheses.
func parseStatPPID(stat string) (int, bool) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, false
	}
	f := strings.Fields(stat[i+1:])
	if len(f) < 2 {
		return 0, false
	}
	ppid, err := strconv.Atoi(f[1])
	return ppid, err == nil
}

// Tree returns root and its descendants, ordered by pid.
func Tree(root int) ([]int, error) {
	up, err := parents()
	if err != nil {
		return nil, err
	}
	if _, ok := up[root]; !ok {
		return nil, fmt.Errorf("process %d does not exist: %w", root, unix.ESRCH)
	}
	var out []int
	for pid := range up {
		if below(up, pid, root) {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	return out, nil
}

// below reports whether pid is root or descends from it. The map was not read
// in one moment, so it can hold a cycle of reused pids.
func below(up map[int]int, pid, root int) bool {
	for range len(up) + 1 {
		if pid == root {
			return true
		}
		next, ok := up[pid]
		if !ok || next == 0 {
			return false
		}
		pid = next
	}
	return false
}

// ReadProcess reads what /proc/PID says of a process.
func ReadProcess(pid int) (Process, error) {
	p, err := readStatus(procPath(pid))
	if err != nil {
		return Process{}, fmt.Errorf("read process %d: %w", pid, err)
	}
	p.PID = pid
	if len(p.NSPID) == 0 {
		p.NSPID = []int{pid}
	}
	p.Exe = readExe(pid)
	if p.MixedIdentity, err = mixedIdentity(pid, p.Identity); err != nil {
		return Process{}, fmt.Errorf("read the threads of process %d: %w", pid, err)
	}
	if !sameUserns(pid) {
		// Capabilities there say nothing about what it may do here.
		p.Identity.CapEff = 0
	}
	return p, nil
}

// readStatus reads the status file of a process or thread.
func readStatus(dir string) (Process, error) {
	f, err := os.Open(filepath.Join(dir, "status"))
	if err != nil {
		return Process{}, err
	}
	defer f.Close()
	p, err := parseStatus(f)
	if err != nil {
		return Process{}, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return p, nil
}

// mixedIdentity reports whether a thread has another identity than the first:
// to the kernel each has its own (credentials(7)).
func mixedIdentity(pid int, first Identity) (bool, error) {
	tids, err := numbers(procPath(pid, "task"))
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		if tid == pid {
			continue
		}
		p, err := readStatus(procPath(pid, "task", strconv.Itoa(tid)))
		if gone(err) {
			continue
		}
		if err != nil {
			return false, err
		}
		id := p.Identity
		if id.UID != first.UID || id.GID != first.GID || id.CapEff != first.CapEff || !slices.Equal(id.Groups, first.Groups) {
			return true, nil
		}
	}
	return false, nil
}

func readExe(pid int) string {
	exe, err := os.Readlink(procPath(pid, "exe"))
	if err != nil {
		return "" // a kernel thread, a zombie, or gone
	}
	return strings.TrimSuffix(exe, " (deleted)")
}

func sameUserns(pid int) bool {
	theirs, err1 := os.Readlink(procPath(pid, "ns/user"))
	ours, err2 := os.Readlink("/proc/self/ns/user")
	return err1 == nil && err2 == nil && theirs == ours
}

// parseStatus reads /proc/PID/status: name, effective ids, groups, effective
// capabilities and the pids in nested namespaces.
func parseStatus(r io.Reader) (Process, error) {
	var p Process
	var seen int
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20) // a task can be in 65536 groups
	for sc.Scan() {
		key, val, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			continue
		}
		f := strings.Fields(val)
		var err error
		switch key {
		case "Name":
			p.Comm = strings.TrimPrefix(val, "\t")
		case "Uid", "Gid":
			if len(f) < 2 {
				return p, fmt.Errorf("line %q is too short", sc.Text())
			}
			var id uint64
			id, err = strconv.ParseUint(f[1], 10, 32) // effective
			if key == "Uid" {
				p.Identity.UID = uint32(id)
			} else {
				p.Identity.GID = uint32(id)
			}
			seen++
		case "Groups":
			for _, g := range f {
				id, e := strconv.ParseUint(g, 10, 32)
				if e != nil {
					return p, fmt.Errorf("line %q: %w", sc.Text(), e)
				}
				p.Identity.Groups = append(p.Identity.Groups, uint32(id))
			}
			seen++
		case "NSpid":
			for _, s := range f {
				n, e := strconv.Atoi(s)
				if e != nil {
					return p, fmt.Errorf("line %q: %w", sc.Text(), e)
				}
				p.NSPID = append(p.NSPID, n)
			}
		case "CapEff":
			if len(f) == 1 {
				p.Identity.CapEff, err = strconv.ParseUint(f[0], 16, 64)
			}
			seen++
		}
		if err != nil {
			return p, fmt.Errorf("line %q: %w", sc.Text(), err)
		}
	}
	if err := sc.Err(); err != nil {
		return p, err
	}
	if seen != 4 {
		return p, errors.New("no Uid, Gid, Groups or CapEff line")
	}
	return p, nil
}

// fdTable is what a scan looks for among the fds of a process, or of a thread
// that has its own table.
type fdTable struct {
	pid, tid int
	sockets  map[int]uint32 // fd to inode
	anon     map[int]bool   // anonymous files: whether it is an epoll instance
}

// readFDTable reads one fd table.
func readFDTable(pid, tid int) (fdTable, error) {
	dir := procPath(pid, "task", strconv.Itoa(tid), "fd")
	t := fdTable{pid: pid, tid: tid, sockets: map[int]uint32{}, anon: map[int]bool{}}
	fds, err := numbers(dir)
	if err != nil {
		return t, fmt.Errorf("list fds of process %d: %w", pid, err)
	}
	for _, fd := range fds {
		link, err := os.Readlink(filepath.Join(dir, strconv.Itoa(fd)))
		if err != nil {
			continue // closed meanwhile
		}
		if ino, ok := parseSocketLink(link); ok {
			t.sockets[fd] = ino
		} else if strings.HasPrefix(link, "anon_inode:") {
			t.anon[fd] = link == eventpoll
		}
	}
	return t, nil
}

func parseSocketLink(link string) (uint32, bool) {
	s, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 32)
	return uint32(n), err == nil
}

// fdTables reads all fd tables of a process: one, unless a thread has called
// unshare(CLONE_FILES).
func fdTables(pid int, tids []int) ([]fdTable, error) {
	first, err := readFDTable(pid, pid)
	if err != nil {
		return nil, err
	}
	out := []fdTable{first}
	for _, tid := range tids {
		// Not only the first thread's: that one may have ended, and the others
		// share a table.
		if slices.ContainsFunc(out, func(t fdTable) bool { return t.tid == tid || sameFiles(t.tid, tid) }) {
			continue
		}
		t, err := readFDTable(pid, tid)
		if err != nil {
			if gone(err) {
				continue
			}
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// sameFiles asks kcmp(2) whether two threads share their fd table. Where it
// cannot tell they do: CRIU, which needs kcmp, does not run there either.
func sameFiles(a, b int) bool {
	const kcmpFiles = 2 // include/uapi/linux/kcmp.h
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kcmpFiles, 0, 0, 0)
	return errno != 0 || r == 0
}

// parseFdinfoFlags reads the octal flags of /proc/PID/fdinfo/FD (proc(5)).
func parseFdinfoFlags(r io.Reader) (int, error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		if v, ok := strings.CutPrefix(sc.Text(), "flags:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 8, 64)
			return int(n), err
		}
	}
	if err := sc.Err(); err != nil {
		return 0, err
	}
	return 0, errors.New("no flags line")
}

func readFdFlags(pid, tid, fd int) (int, error) {
	f, err := os.Open(procPath(pid, "task", strconv.Itoa(tid), "fdinfo", strconv.Itoa(fd)))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return parseFdinfoFlags(f)
}
