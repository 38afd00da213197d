// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// againVariable tells a process that it has executed us anew already, and the
// name that it had for ps(1).
const againVariable = "CRIUHOOK_AGAIN"

// anew: this is the second time.
var anew bool

// begin takes note of the second time, and leaves no trace of it to CRIU and its
// scripts. It is to run on the first thread, whose name is the process's.
func begin() {
	name, is := os.LookupEnv(againVariable)
	if !is {
		return
	}
	anew = true
	_ = os.Unsetenv(againVariable) // it fails only for bad names
	if b, err := unix.BytePtrFromString(name); err == nil {
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0)
	}
}

// again returns what executes us anew, with the same arguments, or nil: that has
// been done. The new threads have new pids.
func again() func() error {
	if anew {
		return nil
	}
	return func() error {
		name, _ := os.ReadFile("/proc/self/comm") // else it is "exe"
		env := append(os.Environ(), againVariable+"="+strings.TrimSuffix(string(name), "\n"))
		const self = "/proc/self/exe" // also if it was replaced, or is no more
		return fmt.Errorf("execute %s: %w", self, unix.Exec(self, os.Args, env))
	}
}
