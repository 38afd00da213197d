// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// maxHeld bounds what is held back, in bytes, until CRIU has opened its log.
const maxHeld = 1 << 20

// CRIULog writes to CRIU's log, through CRIU's own descriptor: whatever its
// name leads to, nothing is written that CRIU did not open. What comes before
// is held back until then.
type CRIULog struct {
	mu   sync.Mutex
	held bytes.Buffer
	out  *sockpeer.Socket // a duplicate of CRIU's fd
}

// Write writes to the log, or holds the text back.
func (l *CRIULog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out == nil {
		if l.held.Len()+len(b) <= maxHeld {
			l.held.Write(b)
		}
		return len(b), nil
	}
	return unix.Write(l.out.FD(), b)
}

// Attach finds CRIU's log, once CRIU waits for us and has opened it: path, or
// moved, where a configuration file took it.
func (l *CRIULog) Attach(criu int, path string, moved bool) {
	if l == nil || path == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out != nil {
		return
	}
	fd := openAs(criu, path)
	if fd < 0 && moved {
		fd = appendOnly(criu)
	}
	if fd < 0 {
		return
	}
	var err error
	if l.out, err = sockpeer.Duplicate(criu, fd); err != nil {
		l.out = nil
		return
	}
	_, _ = unix.Write(l.out.FD(), l.held.Bytes()) // a log that is full is no reason to fail
	l.held.Reset()
}

// openAs is the descriptor under which a process has a file open; -1: none.
func openAs(pid int, path string) int {
	want, err := os.Stat(path)
	if err != nil {
		return -1
	}
	for _, fd := range descriptors(pid) {
		if got, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil && os.SameFile(got, want) {
			return fd
		}
	}
	return -1
}

// appendOnly is a descriptor that CRIU has of a file as it opens its log, and
// nothing else (log_init in criu/log.c); -1: none.
func appendOnly(pid int) int {
	const how = unix.O_WRONLY | unix.O_APPEND
	fds := descriptors(pid)
	slices.Sort(fds)
	for _, fd := range slices.Backward(fds) { // CRIU's own are the highest
		if fd <= unix.Stderr {
			break
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), "flags:")
		line, _, _ := strings.Cut(rest, "\n")
		flags, err := strconv.ParseUint(strings.TrimSpace(line), 8, 32)
		if err != nil || flags&(unix.O_ACCMODE|unix.O_APPEND) != how {
			continue
		}
		if got, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil && got.Mode().IsRegular() {
			return fd
		}
	}
	return -1
}

func descriptors(pid int) (fds []int) {
	names, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)) // nothing, if it is gone
	for _, name := range names {
		if fd, err := strconv.Atoi(name.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}

// Save writes what is held back to a new file, where CRIU, which was not
// started, would have put its log.
func (l *CRIULog) Save(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return fmt.Errorf("write CRIU's log: %w", err)
	}
	_, err = f.Write(l.held.Bytes())
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write CRIU's log: %w", err)
	}
	return nil
}

// Attached reports whether what is written reaches CRIU's log.
func (l *CRIULog) Attached() bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out != nil
}

// Detach lets go of the log of a CRIU that has ended.
func (l *CRIULog) Detach() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out != nil {
		l.out.Close()
		l.out = nil
	}
}

// Has reports whether a process has a file or directory open.
func Has(pid int, path string) bool { return openAs(pid, path) >= 0 }
