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
// program (swrk), whose stderr may be a container's.
func CRIUStderr(criu int) io.Writer {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", criu))
	if err != nil || slices.ContainsFunc(bytes.Split(args, []byte{0}), func(a []byte) bool {
		return string(a) == "swrk" || string(a) == "service"
	}) {
		return nil
	}
	// A duplicate, because /proc/PID/fd cannot open sockets, and O_APPEND
	// and the position are the description's.
	s, err := sockpeer.Duplicate(criu, 2)
	if err != nil {
		return nil
	}
	var theirs, ours unix.Stat_t
	if unix.Fstat(s.FD(), &theirs) != nil || unix.Fstat(2, &ours) != nil || theirs.Dev == ours.Dev && theirs.Ino == ours.Ino {
		s.Close()
		return nil
	}
	return &stderr{fd: s.FD(), left: stderrTime}
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
