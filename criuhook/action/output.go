// SPDX-License-Identifier: Apache-2.0

package action

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// CRIUStderr opens CRIU's own stderr, where a person, or a JVM's console, sees
// what goes wrong: a script's stderr is CRIU's log. It returns nil if that is
// the same file, or if CRIU works for a program (swrk), whose stderr may be a
// container's.
func CRIUStderr(criu int) *os.File {
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
	return os.NewFile(uintptr(s.FD()), "stderr of CRIU")
}

// oneLine writes an error as a line of the tracer's status.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", lineBreak) }

// lineBreak stands for a newline there.
const lineBreak = "\x00"
