// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hopeless: CRIU will refuse at once, and its own message is the right one. The
// images directory comes first in CRIU, then the work directory, and the
// process last.
func (c *Command) hopeless() bool {
	if c.Name != "dump" && c.Name != "restore" {
		return false
	}
	if !isDir(c.ImagesDir) || c.WorkDir != "" && !isDir(c.WorkDir) {
		return true
	}
	if c.Name == "restore" {
		return false
	}
	_, err := os.Stat("/proc/" + strconv.Itoa(c.Tree))
	return errors.Is(err, fs.ErrNotExist)
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// dieBy ends this process by a signal, whatever the runtime does at that signal.
// If the signal does not end it, it returns.
func dieBy(sig syscall.Signal) {
	// The core, if there is to be one, is CRIU's.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	// Zeros are SIG_DFL, no flags and an empty mask, in whatever order the
	// kernel has them (struct sigaction in include/linux/signal_types.h).
	var action [4]uint64
	const maskSize = 8 // bytes
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, maskSize, 0, 0)
	runtime.LockOSThread() // which has it delivered before the call returns
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), sig)
}
