// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// wake is an eventfd that is readable from when something ends on.
type wake struct {
	fd    int
	ended chan struct{} // closed when it is not needed any more
	done  chan struct{} // closed when nobody writes any more
}

// wakeBy makes a wake for the end of ctx, and of another thing, if not nil.
func wakeBy(ctx context.Context, other <-chan struct{}) (*wake, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make an eventfd: %w", err)
	}
	w := &wake{fd: fd, ended: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for over := ctx.Done(); over != nil || other != nil; {
			select {
			case <-over:
				over = nil
			case <-other:
				other = nil
			case <-w.ended:
				return
			}
			w.tell()
		}
	}()
	return w, nil
}

func (w *wake) tell() {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	_, _ = unix.Write(w.fd, one) // full, it is readable as well
}

// heard takes the readiness back.
func (w *wake) heard() {
	var b [8]byte
	_, _ = unix.Read(w.fd, b[:])
}

func (w *wake) close() {
	close(w.ended)
	<-w.done
	unix.Close(w.fd)
}

// forever is the pause of a poll that nothing but an event ends.
const forever = time.Duration(-1)

// poll waits until one of the descriptors is ready, or the pause is over, and
// sets revents.
func poll(fds []unix.PollFd, pause time.Duration) error {
	var end time.Time
	if pause >= 0 {
		end = time.Now().Add(pause)
	}
	for {
		ms := -1
		if pause >= 0 {
			ms = int(max(0, time.Until(end)+time.Millisecond-1) / time.Millisecond)
		}
		_, err := unix.Poll(fds, ms)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
