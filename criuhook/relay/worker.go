// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
)

// worker is a CRIU and our end of its socket.
type worker struct {
	Worker
	fd      int
	probe   bool // of Relay.Probe
	hungUp  bool // nothing more is sent to it
	ended   bool // nothing more comes from it
	running bool // it has a request that it has not answered
	restore bool // which is a restore
	overdue bool // it had its time to end
}

// hire starts a CRIU. SO_PEERCRED of its end is this process: in it CRIU looks up
// the numbers of descriptors.
func (s *session) hire(start Starter, job Job) (*worker, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socketpair: %w", err)
	}
	job.Socket = os.NewFile(uintptr(pair[1]), "CRIU's end of its RPC socket")
	defer job.Socket.Close()
	w, err := start.Start(job)
	if err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	return &worker{Worker: w, fd: pair[0]}, nil
}

// dismiss ends the CRIU that works, if one does.
func (s *session) dismiss() error {
	w := s.worker
	if w == nil {
		return nil
	}
	s.worker = nil
	unix.Close(w.fd)
	s.CRIULog.Detach()
	grace := cmp.Or(s.Grace, criurpc.DefaultGrace)
	if w.overdue {
		grace = 0
	}
	return w.Close(grace, w.running, w.restore)
}

// hangUp tells CRIU that nothing more will come; it can still send.
func (w *worker) hangUp() {
	if !w.hungUp {
		w.hungUp = true
		_ = unix.Shutdown(w.fd, unix.SHUT_WR)
	}
}

// toCRIU sends. It hardly waits: CRIU has read the last message before it
// answered that.
func (s *session) toCRIU(m message) error {
	w := s.worker
	for {
		err := send(w.fd, m)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLOUT}, {Fd: int32(w.PIDFD()), Events: unix.POLLIN}, {Fd: int32(s.wake.fd), Events: unix.POLLIN}}
		if err := poll(fds, forever); err != nil {
			return err
		}
		switch {
		case s.ctx.Err() != nil:
			return context.Cause(s.ctx)
		case fds[1].Revents != 0:
			return unix.EPIPE
		case fds[2].Revents != 0:
			s.wake.heard()
		}
	}
}

// fromCRIU waits for what CRIU says next. errEnded: nothing more. When the
// context ends, CRIU finds nobody at its next notification and comes to an end;
// if not in time, that is the error.
func (s *session) fromCRIU() (message, error) {
	w := s.worker
	pause := forever
	var end time.Time
	for {
		if s.ctx.Err() != nil && end.IsZero() {
			w.hangUp()
			pause = cmp.Or(s.Grace, criurpc.DefaultGrace)
			end = time.Now().Add(pause)
		}
		fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}, {Fd: int32(w.PIDFD()), Events: unix.POLLIN}, {Fd: int32(s.wake.fd), Events: unix.POLLIN}}
		if err := poll(fds, pause); err != nil {
			return message{}, fmt.Errorf("wait for CRIU: %w", err)
		}
		m, err := receive(w.fd, criurpc.MaxMessage)
		switch {
		case err == nil:
			return m, nil
		case !errors.Is(err, unix.EAGAIN): // EOF, or nothing that could be read
			w.ended = true
			return message{}, errEnded
		case fds[1].Revents != 0: // a child it left may still hold the socket
			w.ended = true
			return message{}, errEnded
		case fds[2].Revents != 0:
			s.wake.heard()
		}
		if !end.IsZero() {
			if pause = time.Until(end); pause <= 0 {
				w.overdue = true
				return message{}, fmt.Errorf("%w; CRIU (pid %d) did not come to an end in time", context.Cause(s.ctx), w.PID())
			}
		}
	}
}
