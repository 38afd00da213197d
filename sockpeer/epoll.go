// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bufio"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// eventpoll is what the fd of an epoll instance links to in /proc/PID/fd.
const eventpoll = "anon_inode:[eventpoll]"

// watch is what an epoll instance watches, as /proc/PID/fdinfo/EPFD says it
// (proc(5)).
type watch struct {
	fd int // when it was registered; may be another file's by now
	// ino and sdev are the file's inode and the kernel's number of its device;
	// known: a kernel from 4.13 on tells them.
	ino   uint64
	sdev  uint64
	known bool
}

// parseEpoll reads the files that an epoll instance watches for input or
// output. own is the instance's own inode, which all anonymous files share; 0:
// the kernel, before 5.14, does not tell.
func parseEpoll(r io.Reader) (own uint64, watches []watch) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		line := sc.Text()
		if v, ok := strings.CutPrefix(line, "ino:"); ok {
			own, _ = strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			continue
		}
		if !strings.HasPrefix(line, "tfd:") {
			continue
		}
		// "tfd:        5 events:       1d data: … pos:0 ino:3f1c sdev:8"
		var w watch
		var events uint64
		var errFD, errEvents, errIno, errDev error = nil, strconv.ErrSyntax, strconv.ErrSyntax, strconv.ErrSyntax
		f := strings.Fields(strings.ReplaceAll(line, ":", ": "))
		if len(f) < 2 {
			continue
		}
		w.fd, errFD = strconv.Atoi(f[1])
		for i := 2; i+1 < len(f); i += 2 {
			switch f[i] {
			case "events:":
				events, errEvents = strconv.ParseUint(f[i+1], 16, 64)
			case "ino:":
				w.ino, errIno = strconv.ParseUint(f[i+1], 16, 64)
			case "sdev:":
				w.sdev, errDev = strconv.ParseUint(f[i+1], 16, 64)
			}
		}
		if errFD != nil || errEvents != nil ||
			events&(unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDNORM|unix.EPOLLRDHUP|unix.EPOLLPRI) == 0 {
			continue
		}
		w.known = errIno == nil && errDev == nil
		watches = append(watches, w)
	}
	return own, watches
}

// watched is what of interest an epoll instance watches.
type watched struct {
	sockets map[uint32]int // connections: inode to an fd
	epolls  []int
}

// watching reads what an epoll fd watches, once: many threads may wait on it.
func (t *waitTable) watching(epfd int) watched {
	if w, ok := t.read[epfd]; ok {
		return w
	}
	w := watched{sockets: map[uint32]int{}}
	f, err := os.Open(procPath(t.pid, "task", strconv.Itoa(t.tid), "fdinfo", strconv.Itoa(epfd)))
	if err == nil {
		own, watches := parseEpoll(f)
		f.Close()
		w = t.resolve(own, watches)
	}
	t.read[epfd] = w
	return w
}

// resolve finds what is watched among the connections and epoll fds. A closed
// fd stays registered while a duplicate lives: the inode tells the socket.
func (t *waitTable) resolve(own uint64, watches []watch) watched {
	out := watched{sockets: map[uint32]int{}}
	lost := false
	for _, w := range watches {
		ino := uint32(w.ino)
		if !w.known {
			ino = t.sockets[w.fd]
		}
		isEpoll, anonymous := t.anon[w.fd]
		switch {
		case t.targets[ino] && (!w.known || w.sdev == sockfs() || sockfs() == 0):
			fd, ok := t.fds[ino]
			if !ok || t.sockets[w.fd] == ino {
				fd = w.fd
			}
			out.sockets[ino] = fd
		case isEpoll && (!w.known || own == 0 || w.ino == own):
			out.epolls = append(out.epolls, w.fd)
		case w.known && w.ino == own && own != 0 && !anonymous:
			// All anonymous files have one inode, so nothing tells
			// which this is, or whether it is an epoll instance.
			lost = true
		}
	}
	if lost {
		for fd, isEpoll := range t.anon {
			if isEpoll {
				out.epolls = append(out.epolls, fd)
			}
		}
	}
	return out
}

// reach returns the connections behind fds that a thread waits on, and an fd
// of each: the fds themselves, and what epoll instances watch, which can be
// others (up to EP_MAX_NESTS, fs/eventpoll.c). Each is looked at once.
func (t *waitTable) reach(fds []int) map[uint32]int {
	found := map[uint32]int{}
	seen := map[int]bool{}
	for todo := fds; len(todo) > 0; {
		fd := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if ino := t.sockets[fd]; t.targets[ino] {
			found[ino] = fd
		}
		if !t.anon[fd] || seen[fd] {
			continue
		}
		seen[fd] = true
		w := t.watching(fd)
		for ino, fd := range w.sockets {
			if _, ok := found[ino]; !ok {
				found[ino] = fd
			}
		}
		todo = append(todo, w.epolls...)
	}
	return found
}

// sockfs is the kernel's number of the device that all sockets are on; 0: not
// known.
var sockfs = sync.OnceValue(func() uint64 {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0
	}
	return uint64(kernelDev(st.Dev))
})
