// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/rule"
)

// Server serves clients. Its fields are set before Serve and not changed.
type Server struct {
	// Config reads the configuration: for each client anew, so that a change
	// needs no restart.
	Config func() (*rule.Set, error)
	// Limits are those in force; what the configuration says of them later
	// counts from the next start on.
	Limits rule.Service
	// Work carries out the requests of one client.
	Work Worker
	Log  *logrus.Logger

	mu       sync.Mutex
	draining bool
	sessions map[*session]struct{}
	byUID    map[uint32]int // connections of clients other than root
	others   int            // their sum
	slots    slots
	all      sync.WaitGroup
}

// Worker carries out requests: the first, which was received and allowed, and
// those that follow on the same connection. It returns when the conversation is
// over, CRIU has ended and is reaped, and closes nothing of the session's. When
// ctx ends, it has to make CRIU give up.
type Worker interface {
	Work(ctx context.Context, s *Session) error
}

// errEnding is why new requests are refused.
var errEnding = refuse(unix.ESHUTDOWN, "the service is ending: try again when it has started anew")

// Serve serves the clients of a listener until ctx ends, and closes the
// listener. Then no new request begins; those under way have Limits.Drain, or
// until hurry ends, to come to their end, and are made to give up after that.
// It returns when nothing is under way any more.
func (s *Server) Serve(ctx, hurry context.Context, l *Listener) error {
	s.sessions, s.byUID = map[*session]struct{}{}, map[uint32]int{}
	s.slots = newSlots(s.Limits.Requests)
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)

	stop := context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := s.accept(ctx, work, l)
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	for _, c := range l.waiting() {
		s.start(work, c)
	}
	if closeErr := l.Close(); err == nil && closeErr != nil {
		err = closeErr
	}
	s.drain(hurry, cancel)
	return err
}

// accept accepts until ctx ends, or the listener is broken.
func (s *Server) accept(ctx, work context.Context, l *Listener) error {
	const longest = time.Second
	wait := 5 * time.Millisecond
	for {
		c, err := l.AcceptUnix()
		switch {
		case err == nil:
			wait = 5 * time.Millisecond
			s.start(work, c)
			continue
		case ctx.Err() != nil:
			return nil
		case !passing(err):
			return err
		}
		// Out of fds or memory: those under way give some back.
		s.Log.Warnf("accept a client: %v; trying again", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, longest)
	}
}

// passing tells errors of accept(2) that pass.
func passing(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EPERM, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// start serves one client.
func (s *Server) start(ctx context.Context, c *net.UnixConn) {
	one := &session{server: s, conn: c}
	s.mu.Lock()
	full := len(s.sessions) >= s.Limits.Clients
	if !full {
		s.sessions[one] = struct{}{}
		s.all.Add(1)
	}
	s.mu.Unlock()
	if full {
		kind := one.kindAtOnce() // not worth a goroutine
		s.Log.Warnf("a client is turned away: %d are connected (service: clients)", s.Limits.Clients)
		_ = send(c, Answer(kind, refuse(unix.EBUSY, "%d clients are connected already: try again later", s.Limits.Clients)))
		_ = c.Close()
		return
	}
	go func() {
		defer s.all.Done()
		one.run(ctx)
		s.mu.Lock()
		delete(s.sessions, one)
		s.mu.Unlock()
	}()
}

// drain lets what is under way come to its end.
func (s *Server) drain(hurry context.Context, cancel context.CancelCauseFunc) {
	s.mu.Lock()
	working := 0
	for one := range s.sessions {
		if one.working {
			working++
			continue
		}
		// It waits for a message; the goroutine then sees why.
		_ = one.conn.SetReadDeadline(time.Unix(1, 0))
	}
	s.mu.Unlock()
	s.slots.close()
	done := make(chan struct{})
	go func() { s.all.Wait(); close(done) }()
	if working > 0 {
		s.Log.Infof("%d requests are under way and may come to their end, at most for %v", working, s.Limits.Drain)
	}
	select {
	case <-done:
		return
	case <-hurry.Done():
		s.Log.Warn("told to end at once: requests under way are made to give up")
	case <-time.After(s.Limits.Drain):
		s.Log.Warnf("requests are still under way after %v, and are made to give up (service: drain)", s.Limits.Drain)
	}
	cancel(errEnding)
	<-done
}

// ending tells whether new requests are refused. From then on drain does not
// wake a session that waits for one.
func (s *Server) ending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}
