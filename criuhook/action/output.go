// SPDX-License-Identifier: Apache-2.0

package action

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// stderrTime is how long all writes to CRIU's stderr together may wait for its
// reader: the tree can be frozen meanwhile, and CRIU's log has the same lines.
const stderrTime = time.Second

// CRIUStderr opens CRIU's own stderr, where a person, or a JVM's console, sees
// what goes wrong: a script's stderr is CRIU's log. What nobody reads in time
// is dropped. It returns nil if that is the same file, or if CRIU works for a
// program (swrk), whose stderr may be a container's. sized: it must not grow any
// more once the images are written, see [dump.Late].
func CRIUStderr(criu int) (w io.Writer, sized bool) {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", criu))
	if err != nil || slices.ContainsFunc(bytes.Split(args, []byte{0}), func(a []byte) bool {
		return string(a) == "swrk" || string(a) == "service"
	}) {
		return nil, false
	}
	// A duplicate, because /proc/PID/fd cannot open sockets, and O_APPEND
	// and the position are the description's.
	s, err := sockpeer.Duplicate(criu, 2)
	if err != nil {
		return nil, false
	}
	var theirs, ours unix.Stat_t
	if unix.Fstat(s.FD(), &theirs) != nil || unix.Fstat(2, &ours) != nil || theirs.Dev == ours.Dev && theirs.Ino == ours.Ino {
		s.Close()
		return nil, false
	}
	return &stderr{fd: s.FD(), left: stderrTime}, Sized(s.FD())
}

// Sized reports whether fd is a file of which CRIU, if it is in images, notes the
// size, and wants to find it: one that is not only appended to.
func Sized(fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err != nil || flags&unix.O_ACCMODE != unix.O_WRONLY || flags&unix.O_APPEND == 0
}

// stderr writes as long as somebody reads.
type stderr struct {
	fd   int
	left time.Duration
}

func (e *stderr) Write(b []byte) (int, error) {
	const pipeBuf = 4096 // what a pipe that polls writable takes at once (pipe(7))
	for rest := b; len(rest) > 0; {
		start := time.Now()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLOUT}}, int(e.left.Milliseconds()))
		e.left = max(0, e.left-time.Since(start))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		w, err := unix.Write(e.fd, rest[:min(len(rest), pipeBuf)])
		if err != nil && err != unix.EINTR {
			break
		}
		rest = rest[max(w, 0):]
	}
	return len(b), nil
}
