// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Stream reads and writes the socket until ctx ends. It does not depend on
// O_NONBLOCK, which is the description's and so the application's. Written by
// [Identity.Do], messages have the credentials of the identity (SCM_CREDENTIALS).
func (s *Socket) Stream(ctx context.Context) io.ReadWriter {
	return &stream{ctx: ctx, s: s}
}

type stream struct {
	ctx context.Context
	s   *Socket
}

func (s *stream) Read(b []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(s.s.fd, b, unix.MSG_DONTWAIT)
		switch {
		case err == nil && n == 0 && len(b) > 0:
			return 0, io.EOF
		case err == nil:
			return n, nil
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return 0, fmt.Errorf("read from %s: %w", s.s.name, err)
		}
		if err := s.wait(unix.POLLIN); err != nil {
			return 0, err
		}
	}
}

func (s *stream) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.SendmsgN(s.s.fd, b[done:], credentials(), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		done += max(n, 0)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return done, fmt.Errorf("write to %s: %w", s.s.name, err)
		}
		if err := s.wait(unix.POLLOUT); err != nil {
			return done, err
		}
	}
	return done, nil
}

// credentials are those of a thread that acts as somebody else, by its effective
// ids; left alone the kernel takes the real ones. nil: they are the same.
func credentials() []byte {
	cred := unix.Ucred{Pid: int32(unix.Getpid()), Uid: uint32(unix.Geteuid()), Gid: uint32(unix.Getegid())}
	if int(cred.Uid) == unix.Getuid() && int(cred.Gid) == unix.Getgid() {
		return nil
	}
	return unix.UnixCredentials(&cred)
}

// wait polls until the socket is ready or ctx ends; at most pollSlice at once,
// for a cancellation without a deadline.
func (s *stream) wait(events int16) error {
	const pollSlice = 100 * time.Millisecond
	if err := s.ctx.Err(); err != nil {
		return fmt.Errorf("wait for %s: %w", s.s.name, os.ErrDeadlineExceeded)
	}
	d := pollSlice
	if end, ok := s.ctx.Deadline(); ok {
		d = min(d, max(time.Until(end), time.Millisecond))
	}
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(s.s.fd), Events: events}}, int(d.Milliseconds())+1)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for %s: %w", s.s.name, err)
	}
	return nil
}
