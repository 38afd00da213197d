// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/rule"
)

// errGone: the client has closed its connection.
var errGone = errors.New("the client is gone")

// session is one connection.
type session struct {
	server  *Server
	conn    *net.UnixConn
	working bool // under server.mu: has a place among the requests
}

// Session is what a Worker gets to know of one connection.
type Session struct {
	Conn   *net.UnixConn
	Client *Client
	// First is the first request as it was received, which Allow has passed.
	First []byte
	// Rules are the configuration as it was when the client came.
	Rules *rule.Set
	// Log is for messages about this client.
	Log *logrus.Entry
	// Draining is closed when no further request may begin.
	Draining <-chan struct{}
	// Allow is to be asked before each further request.
	Allow  func(*rpc.CriuReq) error
	Limits rule.Service
}

func (s *session) run(ctx context.Context) {
	defer s.conn.Close()
	client, err := newClient(s.conn)
	if err != nil {
		s.server.Log.Warnf("a client is turned away: %v", err)
		return // it has ended, or the kernel does not tell: no one to answer to
	}
	log := s.server.Log.WithFields(logrus.Fields{"client": client.PID, "uid": client.UID})
	if err := s.enter(client); err != nil {
		s.refuse(log, s.kindAtOnce(), err)
		return
	}
	defer s.leave(client)
	s.converse(ctx, client, log)
}

// enter counts the connections of users other than root: none takes more than
// half of them, and a quarter stays free for root, whoever the others are.
func (s *session) enter(c *Client) error {
	if c.UID == 0 {
		return nil
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	most := s.server.Limits.Clients
	switch {
	case s.server.byUID[c.UID] >= max(1, most/2):
		return refuse(unix.EBUSY, "uid %d has half of all connections already: try again later", c.UID)
	case s.server.others >= max(1, most-(most+3)/4):
		return refuse(unix.EBUSY, "users other than root have %d connections already: try again later", s.server.others)
	}
	s.server.byUID[c.UID]++
	s.server.others++
	return nil
}

// kindAtOnce takes a request that has come, for its type: left unread, it would
// make the kernel tell the client of a reset before it gets our answer.
func (s *session) kindAtOnce() rpc.CriuReqType {
	var req *rpc.CriuReq
	if b, err := receiveAtOnce(s.conn, s.server.Limits.Message); err == nil {
		req, _ = Decode(b)
	}
	return req.GetType()
}

func (s *session) leave(c *Client) {
	if c.UID == 0 {
		return
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.server.others--
	if s.server.byUID[c.UID]--; s.server.byUID[c.UID] == 0 {
		delete(s.server.byUID, c.UID)
	}
}

// strangerTime is how long a client who may do nothing can take to say what it
// wants, for an answer of that type.
const strangerTime = time.Second

// converse takes the first request, and has it and what follows worked on.
func (s *session) converse(ctx context.Context, client *Client, log *logrus.Entry) {
	limits := s.server.Limits
	rules, barred := s.server.Config()
	if barred != nil {
		barred = refuse(unix.EINVAL, "read the configuration: %v", barred)
		rules = &rule.Set{}
	}
	policy := Policy{UIDs: rules.Service.UIDs, GIDs: rules.Service.GIDs}
	if barred == nil {
		barred = policy.Admit(client)
	}
	wait := limits.Idle
	if barred != nil {
		wait = min(wait, strangerTime)
	}
	b, err := s.first(wait)
	var req *rpc.CriuReq
	if err == nil {
		req, err = Decode(b)
	}
	if errors.Is(err, io.EOF) {
		return // it has asked for nothing
	}
	kind := req.GetType()
	switch {
	case s.server.ending():
		err = errEnding
	case barred != nil:
		err = barred
	case isTimeout(err):
		err = refuse(unix.ETIMEDOUT, "no request came in %v", wait)
	case errors.Is(err, errTooLarge):
		err = refuse(unix.EMSGSIZE, "%v", err)
	case err != nil:
		err = refuse(unix.EBADMSG, "%v", err)
	default:
		err = policy.Allow(client, req)
	}
	if err != nil {
		s.refuse(log, kind, err)
		return
	}
	release, err := s.slot(ctx, client)
	if err != nil {
		if !errors.Is(err, errGone) {
			s.refuse(log, kind, err)
		}
		return
	}
	defer release()
	started := time.Now()
	err = s.server.Work.Work(ctx, &Session{
		Conn: s.conn, Client: client, First: b, Rules: rules, Log: log, Limits: limits,
		Draining: s.server.slots.closed,
		Allow:    func(req *rpc.CriuReq) error { return policy.Allow(client, req) },
	})
	if err != nil {
		log.Warnf("%s: %v (after %v)", kindOf(req), err, time.Since(started).Round(time.Millisecond))
	}
}

// first waits for the first message; in a service that ends it takes what has
// come.
func (s *session) first(wait time.Duration) ([]byte, error) {
	s.server.mu.Lock()
	draining := s.server.draining
	if !draining { // else drain may have set another already
		_ = s.conn.SetReadDeadline(time.Now().Add(wait))
	}
	s.server.mu.Unlock()
	if !draining {
		b, err := receive(s.conn, s.server.Limits.Message)
		if !isTimeout(err) {
			return b, err
		}
	}
	// What has come all the same: left unread, it would make the kernel tell the
	// client of a reset before it gets our answer.
	return receiveAtOnce(s.conn, s.server.Limits.Message)
}

// slot waits for a place among the requests, as long as the client does.
func (s *session) slot(ctx context.Context, c *Client) (release func(), err error) {
	gone, stop := watch(s.conn)
	giveBack, err := s.server.slots.take(ctx, c.UID == 0, gone)
	stop()
	if err != nil {
		return nil, err
	}
	s.server.mu.Lock()
	s.working = true
	s.server.mu.Unlock()
	return func() {
		giveBack()
		s.server.mu.Lock()
		s.working = false
		s.server.mu.Unlock()
	}, nil
}

// watch closes a channel when the client has gone. After stop nobody reads
// from the connection any more.
func watch(c *net.UnixConn) (gone <-chan struct{}, stop func()) {
	out, done := make(chan struct{}), make(chan struct{})
	_ = c.SetReadDeadline(time.Time{})
	go func() {
		defer close(done)
		raw, err := c.SyscallConn()
		if err != nil {
			return
		}
		over := false
		err = raw.Read(func(fd uintptr) bool {
			n, err := recv(int(fd), nil, unix.MSG_PEEK|unix.MSG_TRUNC)
			over = err == nil && n == 0
			// Something else that has come is for later; no more is to be learned.
			return !errors.Is(err, unix.EAGAIN)
		})
		if err == nil && over {
			close(out)
		}
	}()
	return out, func() {
		_ = c.SetReadDeadline(time.Unix(1, 0))
		<-done
		_ = c.SetReadDeadline(time.Time{})
	}
}

// refuse answers a request that is not carried out, and says so in the log.
func (s *session) refuse(log *logrus.Entry, kind rpc.CriuReqType, why error) {
	log.Warnf("refused: %s: %v", kind, why)
	// It may not be there any more to hear it.
	_ = send(s.conn, Answer(kind, why))
}
