// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// Errors that end a session.
var (
	// errDrained: there is no request, and none is to be taken any more.
	errDrained = errors.New("the service ends")
	errEnded   = errors.New("CRIU has ended")
)

// session is one run of a Relay.
type session struct {
	*Relay
	ctx    context.Context
	fd     int // the client's connection
	wake   *wake
	worker *worker // nil: none
	silent bool    // the client sends nothing any more
}

func run(ctx context.Context, r *Relay) error {
	s := &session{Relay: r, ctx: ctx}
	var err error
	if s.fd, err = number(r.Client); err != nil {
		return err
	}
	if s.Peer.Open == nil || s.Peer.Duplicate == nil {
		own := *r
		s.Relay = &own
		var done func()
		if own.Peer, done, err = NewPeer(r.Client); err != nil {
			return err
		}
		defer done()
		own.Peer.PID = cmp.Or(r.Peer.PID, own.Peer.PID)
	}
	if s.wake, err = wakeBy(ctx, r.Draining); err != nil {
		return err
	}
	defer s.wake.close()
	err = s.serveAll()
	return errors.Join(err, s.dismiss())
}

func (s *session) serveAll() error {
	for first := s.First; ; first = nil {
		m := message{data: first}
		if first == nil {
			var err error
			switch m, err = s.request(); {
			case errors.Is(err, io.EOF), errors.Is(err, errDrained), errors.Is(err, errEnded):
				return nil
			case errors.Is(err, errTooLarge), errors.Is(err, errTruncated):
				s.refuse(rpc.CriuReqType_EMPTY, unix.EMSGSIZE, err)
				return err
			case err != nil:
				return err
			}
		}
		more, err := s.serve(m)
		if err != nil || !more {
			return err
		}
	}
}

// most is the size of the largest message of the client.
func (s *session) most() int { return cmp.Or(s.MaxMessage, criurpc.MaxMessage) }

// request waits for the client's next request.
func (s *session) request() (message, error) {
	pause := forever
	if s.Idle > 0 {
		pause = s.Idle
	}
	for end := time.Now().Add(pause); ; {
		switch {
		case s.ctx.Err() != nil:
			return message{}, context.Cause(s.ctx)
		case s.drained():
			return message{}, errDrained
		}
		fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.wake.fd), Events: unix.POLLIN}}
		if s.worker != nil {
			fds = append(fds, unix.PollFd{Fd: int32(s.worker.PIDFD()), Events: unix.POLLIN})
		}
		if err := poll(fds, pause); err != nil {
			return message{}, fmt.Errorf("wait for a request: %w", err)
		}
		m, err := receive(s.fd, s.most())
		switch {
		case !errors.Is(err, unix.EAGAIN):
			return m, err
		case len(fds) > 2 && fds[2].Revents != 0:
			return message{}, errEnded
		case fds[1].Revents != 0:
			s.wake.heard()
		}
		if pause >= 0 {
			if pause = time.Until(end); pause <= 0 {
				return message{}, fmt.Errorf("no request came for %v: %w", s.Idle, os.ErrDeadlineExceeded)
			}
		}
	}
}

func (s *session) drained() bool {
	select {
	case <-s.Draining:
		return true
	default:
		return false
	}
}

// serve serves one request. more: another may come.
func (s *session) serve(m message) (more bool, err error) {
	defer m.close()
	req := &rpc.CriuReq{}
	if err := proto.Unmarshal(m.data, req); err != nil || req.Type == nil {
		if s.Standalone {
			err = fmt.Errorf("%d bytes that are no request of CRIU's RPC", len(m.data))
			s.refuse(rpc.CriuReqType_EMPTY, unix.EBADMSG, err)
			return false, err
		}
		req = nil // CRIU says what it thinks of it
	}
	x := &exchange{session: s, req: req, raw: m}
	defer x.close()
	if err := x.admit(); err != nil {
		s.refuse(req.GetType(), errno(err, unix.EPERM), err)
		x.served(nil, err)
		return false, nil
	}
	x.prepare()
	if err := x.hire(); err != nil {
		x.finish(nil)
		s.refuse(req.GetType(), errno(err, unix.EIO), err)
		x.served(nil, err)
		return false, nil
	}
	resp, err := x.converse()
	if err != nil && x.failed == nil {
		x.failed = err
	}
	x.served(resp, x.failed)
	switch {
	case err != nil: // CRIU has ended, or was made to
		return false, nil
	case x.job.ExecCmd && resp.GetSuccess(): // it becomes another program
		return false, nil
	case !x.mayContinue():
		x.awaitEnd()
		return false, nil
	}
	return true, nil
}

// errno is the one in an error, or else that one.
func errno(err error, other syscall.Errno) syscall.Errno {
	var n syscall.Errno
	if errors.As(err, &n) {
		return n
	}
	return other
}

// refuse answers in CRIU's place.
func (s *session) refuse(kind rpc.CriuReqType, no syscall.Errno, why error) {
	if b, err := proto.Marshal(criurpc.Failure(kind, no, why.Error())); err == nil {
		_ = s.toClient(message{data: b}) // it may be gone
	}
}

// toClient sends, and waits as long as the client does not read.
func (s *session) toClient(m message) error {
	for {
		err := send(s.fd, m)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}, {Fd: int32(s.wake.fd), Events: unix.POLLIN}}
		if err := poll(fds, forever); err != nil {
			return err
		}
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if fds[1].Revents != 0 {
			s.wake.heard()
		}
	}
}

// noSuchFD is the number of a descriptor that no process has.
const noSuchFD = math.MaxInt32
