// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/rule"
	"criuhook/criuhook/service"
)

// patience is for what comes at once unless something is broken.
const patience = 10 * time.Second

// worker answers each request when it is told to.
type worker struct {
	begun chan struct{} // one for each request that has begun
	end   chan struct{} // one ends one, closed ends all
	gave  chan struct{} // one for each that was made to give up
}

func newWorker() *worker {
	return &worker{make(chan struct{}, 1000), make(chan struct{}), make(chan struct{}, 1000)}
}

func (w *worker) Work(ctx context.Context, s *service.Session) error {
	w.begun <- struct{}{}
	select {
	case <-w.end:
	case <-ctx.Done():
		w.gave <- struct{}{}
		return context.Cause(ctx)
	}
	req, err := service.Decode(s.First)
	if err != nil {
		return err
	}
	b, err := proto.Marshal(&rpc.CriuResp{Type: req.Type, Success: proto.Bool(true)})
	if err != nil {
		return err
	}
	_, err = s.Conn.Write(b)
	return err
}

// logText is what was logged.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is a server that runs.
type running struct {
	path        string
	log         logText
	stop, hurry context.CancelFunc
	done        chan error
}

func serve(t *testing.T, w service.Worker, change func(*rule.Service)) *running {
	t.Helper()
	r := &running{path: filepath.Join(short(t), "sock"), done: make(chan error, 1)}
	l, err := service.Listen(r.path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	limits := rule.DefaultService
	if os.Getuid() != 0 {
		limits.UIDs = []uint32{uint32(os.Getuid())}
	}
	if change != nil {
		change(&limits)
	}
	log := logrus.New()
	log.SetOutput(&r.log)
	s := &service.Server{
		Config: func() (*rule.Set, error) { return &rule.Set{Service: limits}, nil },
		Limits: limits, Work: w, Log: log,
	}
	ctx, stop := context.WithCancel(context.Background())
	hurry, now := context.WithCancel(context.Background())
	r.stop, r.hurry = stop, now
	go func() { r.done <- s.Serve(ctx, hurry, l) }()
	t.Cleanup(func() {
		stop()
		now()
	})
	return r
}

func (r *running) ended(t *testing.T) {
	t.Helper()
	select {
	case err := <-r.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatalf("the server does not end; it said\n%s", r.log.String())
	}
}

func (r *running) dial(t *testing.T) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: r.path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// version is a request that everybody may make.
var version, _ = proto.Marshal(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()})

func send(t *testing.T, c *net.UnixConn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c *net.UnixConn) *rpc.CriuResp {
	t.Helper()
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(b[:n], resp); err != nil {
		t.Fatal(err)
	}
	return resp
}

// refused checks an answer without success, after which the connection ends.
func refused(t *testing.T, c *net.UnixConn, kind rpc.CriuReqType, errno unix.Errno, text string) {
	t.Helper()
	resp := receive(t, c)
	if resp.GetType() != kind || resp.GetSuccess() || unix.Errno(resp.GetCrErrno()) != errno || !strings.Contains(resp.GetCrErrmsg(), text) {
		t.Errorf("the answer is %v, expected %v, %v, %q", resp, kind, errno, text)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the answer: %v", err)
	}
}

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal("waited in vain for: " + what)
	}
}

// TestServe: many clients at once; those that ask for nothing take no place.
func TestServe(t *testing.T) {
	w := newWorker()
	r := serve(t, w, func(s *rule.Service) { s.Requests = 4 })
	for range 20 {
		r.dial(t) // and says nothing
	}
	var clients []*net.UnixConn
	for range 10 {
		c := r.dial(t)
		send(t, c, version)
		clients = append(clients, c)
	}
	root := os.Getuid() == 0
	at := 4
	if !root {
		at = 2 // users other than root leave half of the places free
	}
	for range at {
		await(t, "a request to begin", w.begun)
	}
	select {
	case <-w.begun:
		t.Errorf("more than %d requests are under way", at)
	default:
	}
	close(w.end)
	for _, c := range clients {
		if resp := receive(t, c); !resp.GetSuccess() {
			t.Error(resp)
		}
	}
	r.stop()
	r.ended(t)
	if _, err := os.Lstat(r.path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestServeRefuses(t *testing.T) {
	w := newWorker()
	close(w.end)
	r := serve(t, w, func(s *rule.Service) { s.Message, s.Idle = 4096, 50*time.Millisecond })
	c := r.dial(t)
	refused(t, c, rpc.CriuReqType_EMPTY, unix.ETIMEDOUT, "no request came in 50ms")

	c = r.dial(t)
	send(t, c, make([]byte, 5000))
	refused(t, c, rpc.CriuReqType_EMPTY, unix.EMSGSIZE, "5000 bytes, at most 4096")

	c = r.dial(t)
	send(t, c, []byte("garbage"))
	refused(t, c, rpc.CriuReqType_EMPTY, unix.EBADMSG, "7 bytes that are no request")

	c = r.dial(t)
	send(t, c, version[:1])
	refused(t, c, rpc.CriuReqType_EMPTY, unix.EBADMSG, "1 bytes that are no request")

	c = r.dial(t)
	c.CloseWrite()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
	select {
	case <-w.begun:
		t.Error("work was begun")
	default:
	}
	if n := strings.Count(r.log.String(), "refused"); n != 4 {
		t.Errorf("%d refusals were logged:\n%s", n, r.log.String())
	}
}

func TestServeStranger(t *testing.T) {
	if asNobody(t) { // root is no stranger
		return
	}
	w := newWorker()
	r := serve(t, w, func(s *rule.Service) { s.UIDs = nil })
	c := r.dial(t)
	send(t, c, version)
	refused(t, c, rpc.CriuReqType_VERSION, unix.EPERM, "may not use this service")
}

func TestServeTooMany(t *testing.T) {
	w := newWorker()
	r := serve(t, w, func(s *rule.Service) { s.Clients, s.Requests = 2, 2 })
	a := r.dial(t)
	send(t, a, version)
	await(t, "a request to begin", w.begun)
	if os.Getuid() != 0 {
		refused(t, r.dial(t), rpc.CriuReqType_EMPTY, unix.EBUSY, "half of all connections")
		return
	}
	b := r.dial(t)
	send(t, b, version)
	await(t, "a request to begin", w.begun)
	refused(t, r.dial(t), rpc.CriuReqType_EMPTY, unix.EBUSY, "2 clients")
	close(w.end)
	receive(t, a)
	receive(t, b)
	for range 1000 { // until the others have left
		c := r.dial(t)
		send(t, c, version)
		if receive(t, c).GetSuccess() {
			return
		}
	}
	t.Error("nobody is let in any more")
}

// TestGone: a client that goes while it waits for its turn gives it up.
func TestGone(t *testing.T) {
	w := newWorker()
	r := serve(t, w, func(s *rule.Service) { s.Requests = 1 })
	a, b, c := r.dial(t), r.dial(t), r.dial(t)
	send(t, a, version)
	await(t, "a request to begin", w.begun)
	send(t, b, version)
	b.Close()
	send(t, c, version)
	close(w.end)
	receive(t, a)
	if resp := receive(t, c); !resp.GetSuccess() {
		t.Error(resp)
	}
}

// TestDrain: work under way comes to its end, and nothing else begins.
func TestDrain(t *testing.T) {
	w := newWorker()
	r := serve(t, w, func(s *rule.Service) { s.Requests = 2 })
	working, waiting, silent := r.dial(t), r.dial(t), r.dial(t)
	send(t, working, version)
	await(t, "a request to begin", w.begun)
	if os.Getuid() == 0 {
		other := r.dial(t)
		send(t, other, version)
		await(t, "a request to begin", w.begun)
		defer receive(t, other)
	}
	send(t, waiting, version)
	r.stop()
	resp := receive(t, waiting)
	if resp.GetSuccess() || unix.Errno(resp.GetCrErrno()) != unix.ESHUTDOWN {
		t.Errorf("%v", resp)
	}
	refused(t, silent, rpc.CriuReqType_EMPTY, unix.ESHUTDOWN, "ending")
	if _, err := net.Dial("unixpacket", r.path); err == nil {
		t.Error("another client was let in")
	}
	select {
	case err := <-r.done:
		t.Fatalf("the server has ended while a request is under way: %v", err)
	default:
	}
	close(w.end)
	if resp := receive(t, working); !resp.GetSuccess() {
		t.Error(resp)
	}
	r.ended(t)
}

func TestDrainHurry(t *testing.T) {
	for name, end := range map[string]func(*running){
		"told again":       func(r *running) { r.stop(); r.hurry() },
		"the time is over": func(r *running) { r.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorker()
			r := serve(t, w, func(s *rule.Service) {
				if name != "told again" {
					s.Drain = 10 * time.Millisecond
				}
			})
			c := r.dial(t)
			send(t, c, version)
			await(t, "a request to begin", w.begun)
			end(r)
			await(t, "the request to give up", w.gave)
			r.ended(t)
		})
	}
}

func TestBadConfiguration(t *testing.T) {
	path := filepath.Join(short(t), "sock")
	l, err := service.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	s := &service.Server{
		Config: func() (*rule.Set, error) { return nil, os.ErrInvalid },
		Limits: rule.DefaultService, Work: newWorker(), Log: log,
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{path: path, done: make(chan error, 1)}
	go func() { r.done <- s.Serve(ctx, context.Background(), l) }()
	c := r.dial(t)
	send(t, c, version)
	refused(t, c, rpc.CriuReqType_VERSION, unix.EINVAL, "configuration")
	stop()
	r.ended(t)
}
