// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// attach finds CRIU's log, once CRIU waits for us and has opened it.
func (l *CRIULog) attach(criu int, path string) {
	if l == nil || path == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out != nil {
		return
	}
	want, err := os.Stat(path)
	if err != nil {
		return
	}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", criu)) // the pattern is valid
	for _, link := range links {
		if got, err := os.Stat(link); err != nil || !os.SameFile(got, want) {
			continue
		}
		var fd int
		if _, err := fmt.Sscanf(filepath.Base(link), "%d", &fd); err != nil {
			continue
		}
		if l.out, err = sockpeer.Duplicate(criu, fd); err != nil {
			l.out = nil
			continue
		}
		_, _ = unix.Write(l.out.FD(), l.held.Bytes()) // a log that is full is no reason to fail
		l.held.Reset()
		return
	}
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

// attached reports whether what is written reaches CRIU's log.
func (l *CRIULog) attached() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out != nil
}

// detach lets go of the log of a CRIU that has ended.
func (l *CRIULog) detach() {
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
