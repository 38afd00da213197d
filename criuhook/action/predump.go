// SPDX-License-Identifier: Apache-2.0

package action

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"criuhook/criuhook/interpose"
)

// TracerVerb is the hidden verb by which the script starts its tracer.
const TracerVerb = "interpose"

// Descriptors the tracer inherits beside CRIU's log.
const (
	tracerDirFD    = 3 // images directory
	tracerStatusFD = 4 // where it says that CRIU may run on
)

// ready is what the tracer says then. Anything else is why it cannot.
const ready = "ready"

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
	status, tell, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer status.Close()
	cmd := exec.Command("/proc/self/exe", TracerVerb, "--criu-pid", strconv.Itoa(s.CRIU), "--tree", strconv.Itoa(s.Root))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr // CRIU's log
	cmd.ExtraFiles = []*os.File{dir, tell}
	cmd.Dir = "/"
	// Its own session: a ^C that ends CRIU must not end the tracer first.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	tell.Close()
	if err != nil {
		return fmt.Errorf("start a tracer for CRIU: %w", err)
	}
	// The tracer's watchdog bounds this: its end is the pipe's.
	line, err := bufio.NewReader(status).ReadString('\n')
	switch {
	case err == nil && strings.TrimSpace(line) == ready:
		return cmd.Process.Release()
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("hear from the tracer: %w", err)
	case line == "":
		return fmt.Errorf("the tracer ended at once: %w", errors.Join(cmd.Wait(), errors.New("see the messages above")))
	}
	_ = cmd.Wait() // it says nothing more than the line
	return errors.New(strings.ReplaceAll(strings.TrimSpace(line), lineBreak, "\n"))
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
	return err == nil && len(f) > 1 && f[1] == TracerVerb
}
