// SPDX-License-Identifier: Apache-2.0

// Command criuhook lets CRIU dump processes that hold one half of a unix
// connection to a daemon outside, and gives them a working one on restore.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"criuhook/criuhook/action"
	"criuhook/sockpeer"
)

// version is set by the linker (-ldflags "-X main.version=…").
var version = "devel"

// Exit codes of the contract.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
)

// The main goroutine stays on the first thread. If another one executes CRIU, or
// us anew, PR_SET_PDEATHSIG is lost, by which our caller wants us to end with it
// (it is a thread's own, see prctl(2)).
func init() { runtime.LockOSThread() }

func main() {
	begin()
	if sockpeer.Elevated() {
		forgetCaller()
	}
	if len(os.Args) == 1 && os.Getenv(action.StageVariable) != "" {
		os.Exit(runScript(context.Background()))
	}
	switch {
	case calledAsCRIU(os.Args[0]):
		os.Exit(runCRIU(context.Background(), os.Args[0], os.Args[1:]))
	case len(os.Args) > 1 && os.Args[1] == criuName:
		os.Exit(runCRIU(context.Background(), criuName, os.Args[2:]))
	}
	os.Exit(runCommand(context.Background(), os.Args[1:]))
}

// forgetCaller takes out of the environment by what a caller who has fewer rights
// than we would have CRIU, which we become, obey files of his own: ~/.criu/default.conf
// with its action scripts, another such file, and plugins (criu/config.c, plugin.c).
func forgetCaller() {
	for _, name := range []string{"HOME", "CRIU_CONFIG_FILE", "CRIU_LIBS_DIR"} {
		_ = os.Unsetenv(name) // it fails only for bad names
	}
}

// exitError carries an exit code; one without a cause has said all it has to.
type exitError struct {
	code  int
	cause error
}

func (e *exitError) Error() string {
	if e.cause == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.cause.Error()
}

func (e *exitError) Unwrap() error { return e.cause }

// exitCode is what an error of a command means to the caller.
func exitCode(err error) int {
	var e *exitError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &e):
		return e.code
	}
	return exitFailed
}
