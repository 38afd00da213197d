// SPDX-License-Identifier: Apache-2.0

package action

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"criuhook/criuhook/interpose"
)

// preDump leaves a tracer on CRIU. CRIU waits for the script, so the tracer
// must be a process that outlives it.
func (s *Script) preDump() error {
	if by := interpose.TracerOf(s.CRIU); by != 0 && isOurTracer(by) {
		s.Log.Debugf("process %d, of an earlier run of this script, follows CRIU already", by)
		return nil
	}
	dir, err := os.Open(s.ImagesDir)
	if err != nil {
		return fmt.Errorf("open the images directory: %w", err)
	}
	defer dir.Close()
	return interpose.Spawn(dir, "--criu-pid", strconv.Itoa(s.CRIU), "--tree", strconv.Itoa(s.Root))
}

// isOurTracer reports whether a process is a tracer of this program.
func isOurTracer(pid int) bool {
	ours, err1 := os.Stat("/proc/self/exe")
	theirs, err2 := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err1 != nil || err2 != nil || !os.SameFile(ours, theirs) {
		return false
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	f := strings.Split(string(args), "\x00")
	return err == nil && len(f) > 1 && f[1] == interpose.Verb
}
