// SPDX-License-Identifier: Apache-2.0

package interpose

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// Verb is the hidden verb of this program that runs a tracer: it takes a
// process of its own, one that CRIU does not wait for, nor is waited for as
// CRIU's parent.
const Verb = "interpose"

// Descriptors that the process of a tracer inherits.
const (
	DirFD    = 3 // images directory
	statusFD = 4 // where it says that CRIU may run on
)

// ready is what it says then. Anything else is why it cannot.
const ready = "ready"

// lineBreak stands for a newline in that.
const lineBreak = "\x00"

// Spawn starts a tracer and waits until it follows CRIU, or says why it
// cannot. dir may be nil.
func Spawn(dir *os.File, args ...string) error {
	status, tell, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer status.Close()
	cmd := exec.Command("/proc/self/exe", append([]string{Verb}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
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
		go func() { _ = cmd.Wait() }() // what it has to say is in the log
		return nil
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("hear from the tracer: %w", err)
	case line == "":
		return fmt.Errorf("the tracer ended at once: %w", errors.Join(cmd.Wait(), errors.New("see the messages above")))
	}
	_ = cmd.Wait() // it says nothing more than the line
	return errors.New(strings.ReplaceAll(strings.TrimSpace(line), lineBreak, "\n"))
}

// Ready tells who called Spawn that CRIU may run on, or with an error that it
// cannot be followed.
func Ready(err error) {
	status := os.NewFile(statusFD, "status")
	defer status.Close()
	if err == nil {
		fmt.Fprintln(status, ready)
	} else {
		fmt.Fprintln(status, strings.ReplaceAll(err.Error(), "\n", lineBreak))
	}
}
