// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/relay"
	"criuhook/criuhook/rule"
)

func opened(t *testing.T, dir string) *int32 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return proto.Int32(int32(f.Fd()))
}

// idle is a process to dump, of which the fakes touch nothing.
func idle(t *testing.T) *int32 {
	t.Helper()
	return proto.Int32(int32(os.Getpid()))
}

func dumpOf(t *testing.T) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{Pid: idle(t), ImagesDirFd: opened(t, t.TempDir())}}
}

func decoded(t *testing.T, b []byte) *rpc.CriuReq {
	t.Helper()
	req := &rpc.CriuReq{}
	if err := proto.Unmarshal(b, req); err != nil {
		t.Fatal(err)
	}
	return req
}

// TestUntouched: what needs no change passes byte for byte, both ways, of any size.
func TestUntouched(t *testing.T) {
	long, err := proto.Marshal(&rpc.CriuResp{Type: rpc.CriuReqType_VERSION.Enum(), Success: proto.Bool(true), CrErrmsg: proto.String(string(bytes.Repeat([]byte("x"), 300_000)))})
	if err != nil {
		t.Fatal(err)
	}
	long = append(long, unknown...)
	for _, answer := range [][]byte{long, []byte("not protobuf at all \xff\xff")} {
		s := serve(t, fake{Answer: answer}, nil)
		req := &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()}
		req.ProtoReflect().SetUnknown(unknown)
		sent := s.request(req)
		if got, _ := s.receive(); !bytes.Equal(got, answer) {
			t.Errorf("the client got %d bytes, expected %d", len(got), len(answer))
		}
		if err := s.wait(); err != nil {
			t.Error(err)
		}
		if got := s.received(); len(got) != 1 || !bytes.Equal(got[0], sent) {
			t.Errorf("CRIU got %x, expected %x", got, sent)
		}
	}
}

// TestGarbage passes: CRIU says what it thinks of it. A service refuses it.
func TestGarbage(t *testing.T) {
	s := serve(t, fake{}, nil)
	s.send([]byte{0xff, 1, 2})
	if got, _ := s.receive(); got != nil {
		t.Errorf("the client got %x", got)
	}
	if got := s.received(); len(got) != 1 || !bytes.Equal(got[0], []byte{0xff, 1, 2}) {
		t.Errorf("CRIU got %x", got)
	}

	s = serve(t, fake{}, func(r *relay.Relay) { r.Standalone = true })
	s.send([]byte{0xff, 1, 2})
	if got := s.response(); got.GetSuccess() || got.GetType() != rpc.CriuReqType_EMPTY || got.GetCrErrno() != int32(unix.EBADMSG) {
		t.Errorf("the client got %v", got)
	}
	if err := s.wait(); err == nil {
		t.Error("Run does not tell")
	}
	if got := s.received(); len(got) != 0 {
		t.Errorf("CRIU got %x", got)
	}
}

func TestTooLarge(t *testing.T) {
	s := serve(t, fake{}, func(r *relay.Relay) { r.MaxMessage = 4096 })
	s.send(make([]byte, 4097))
	if got := s.response(); got.GetSuccess() || got.GetCrErrno() != int32(unix.EMSGSIZE) {
		t.Errorf("the client got %v", got)
	}
	if err := s.wait(); err == nil {
		t.Error("Run does not tell")
	}
}

// TestDumpRequest: what is added to a request, and that the rest stays.
func TestDumpRequest(t *testing.T) {
	s := serve(t, fake{}, nil)
	req := dumpOf(t)
	req.Opts.Pid = nil // itself
	req.Opts.LogFile, req.Opts.GhostLimit = proto.String("x.log"), proto.Uint32(77)
	req.Opts.WorkDirFd = proto.Int32(1 << 20) // not open
	req.ProtoReflect().SetUnknown(unknown)
	req.Opts.ProtoReflect().SetUnknown(unknown)
	s.request(req)
	s.response()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	got := decoded(t, s.received()[0])
	if got.GetOpts().GetPid() != int32(os.Getpid()) || !got.GetOpts().GetNotifyScripts() {
		t.Errorf("CRIU got %v", got)
	}
	if n := got.GetOpts().GetWorkDirFd(); n != 1<<31-1 {
		t.Errorf("a descriptor that is not open is number %d", n)
	}
	got.Opts.Pid, got.Opts.NotifyScripts = nil, nil
	got.Opts.ImagesDirFd, got.Opts.WorkDirFd = req.Opts.ImagesDirFd, req.Opts.WorkDirFd
	if !proto.Equal(got, req) {
		t.Errorf("CRIU got %v, expected %v", got, req)
	}
	if len(s.over) != 1 || !s.over[0].Success || s.over[0].PID != os.Getpid() {
		t.Errorf("served: %+v", s.over)
	}
}

var stages = []string{"pre-dump", "network-lock", "query-ext-files", "network-unlock"}

func agree(success bool, opts *rpc.CriuOpts) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: &success, Opts: opts}
}

// TestNotifications: who asked for them gets them as CRIU sent them, with what
// came with them, and CRIU gets what it answers.
func TestNotifications(t *testing.T) {
	s := serve(t, fake{Notify: stages, File: true}, func(r *relay.Relay) { noPart(r) })
	req := dumpOf(t)
	req.Opts.NotifyScripts = proto.Bool(true)
	s.request(req)
	var sent [][]byte
	for _, stage := range stages {
		b, fds := s.receive()
		want, err := proto.Marshal(&rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: &rpc.CriuNotify{Script: &stage}})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, append(want, unknown...)) || len(fds) != 1 {
			t.Fatalf("%s: the client got %x and %d files", stage, b, len(fds))
		}
		unix.Close(fds[0])
		reply := agree(true, &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), External: []string{"mine " + stage}})
		reply.ProtoReflect().SetUnknown(unknown)
		sent = append(sent, s.request(reply))
	}
	if resp := s.response(); !resp.GetSuccess() {
		t.Errorf("CRIU answered %v", resp)
	}
	for i, got := range s.received()[1:] {
		if !bytes.Equal(got, sent[i]) {
			t.Errorf("%s: CRIU got %x, expected %x", stages[i], got, sent[i])
		}
	}
}

// noPart has no connection to decide about refuse a dump.
func noPart(r *relay.Relay) {
	r.Rules = func() (*rule.Set, error) { return &rule.Set{Unknown: rule.Hangup, Inbound: rule.Hangup}, nil }
}

// TestNotificationsUnasked: who did not ask gets none, and a file that comes with
// one finds nobody, as without us.
func TestNotificationsUnasked(t *testing.T) {
	for _, file := range []bool{false, true} {
		s := serve(t, fake{Notify: []string{"pre-dump"}, File: file}, noPart)
		s.request(dumpOf(t))
		if resp := s.response(); resp.GetType() != rpc.CriuReqType_DUMP || resp.GetSuccess() == file {
			t.Errorf("file %v: the client got %v", file, resp)
		}
	}
}

// TestClientsNo: CRIU hears it as it was said.
func TestClientsNo(t *testing.T) {
	s := serve(t, fake{Notify: stages}, noPart)
	req := dumpOf(t)
	req.Opts.NotifyScripts = proto.Bool(true)
	s.request(req)
	s.receive()
	no := s.request(agree(false, nil))
	if got := s.response().GetNotify().GetScript(); got != "network-unlock" {
		t.Errorf("the client is told of %q next", got)
	}
	s.request(agree(true, nil))
	if resp := s.response(); resp.GetType() != rpc.CriuReqType_DUMP || resp.GetSuccess() {
		t.Errorf("CRIU answered %v", resp)
	}
	if got := s.received()[1]; !bytes.Equal(got, no) {
		t.Errorf("CRIU got %x, expected %x", got, no)
	}
}

// TestOursFails: the client hears nothing of the notification, but of those with
// which CRIU cleans up.
func TestOursFails(t *testing.T) {
	broken := errors.New("no rules today")
	s := serve(t, fake{Notify: stages}, func(r *relay.Relay) {
		r.Rules = func() (*rule.Set, error) { return nil, broken }
	})
	req := dumpOf(t)
	req.Opts.NotifyScripts = proto.Bool(true)
	s.request(req)
	if got := s.response().GetNotify().GetScript(); got != "network-unlock" {
		t.Errorf("the client is told of %q", got)
	}
	s.request(agree(true, nil))
	if resp := s.response(); resp.GetType() != rpc.CriuReqType_DUMP || resp.GetSuccess() {
		t.Errorf("CRIU answered %v", resp)
	}
	if err := s.wait(); err != nil || len(s.over) != 1 || !errors.Is(s.over[0].Err, broken) {
		t.Errorf("%v, served %+v", err, s.over)
	}
}

// TestPreDumps: one connection, one CRIU, and directories that were opened one
// after the other.
func TestPreDumps(t *testing.T) {
	s := serve(t, fake{}, noPart)
	for i := range 3 {
		req := dumpOf(t)
		if i < 2 {
			req.Type = rpc.CriuReqType_PRE_DUMP.Enum()
		}
		s.request(req)
		if resp := s.response(); !resp.GetSuccess() || resp.GetType() != req.GetType() {
			t.Fatalf("%d: CRIU answered %v", i, resp)
		}
	}
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	got := s.received()
	if len(got) != 3 || decoded(t, got[0]).GetOpts().GetNotifyScripts() || !decoded(t, got[2]).GetOpts().GetNotifyScripts() {
		t.Errorf("CRIU got %q", got)
	}
}

// TestProbe: who only asks about CRIU gets another one for the rest.
func TestProbe(t *testing.T) {
	probes := 0
	s := serve(t, fake{}, func(r *relay.Relay) {
		noPart(r)
		start := r.Start
		r.Probe = starter(func(j relay.Job) (relay.Worker, error) { probes++; return start.Start(j) })
	})
	for range 2 {
		s.request(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)})
		s.response()
	}
	s.request(dumpOf(t))
	if resp := s.response(); !resp.GetSuccess() {
		t.Errorf("CRIU answered %v", resp)
	}
	if err := s.wait(); err != nil || probes != 1 {
		t.Errorf("%v, %d CRIUs to ask", err, probes)
	}
}

type starter func(relay.Job) (relay.Worker, error)

func (f starter) Start(j relay.Job) (relay.Worker, error) { return f(j) }

// TestCheck refuses with its own words and number, and may change a request.
func TestCheck(t *testing.T) {
	for _, kind := range []rpc.CriuReqType{rpc.CriuReqType_DUMP, rpc.CriuReqType_RESTORE, rpc.CriuReqType_VERSION} {
		s := serve(t, fake{}, func(r *relay.Relay) {
			r.Check = func(*rpc.CriuReq) error { return fmt.Errorf("not you: %w", unix.EACCES) }
		})
		req := dumpOf(t)
		req.Type = &kind
		s.request(req)
		resp := s.response()
		if resp.GetSuccess() || resp.GetType() != kind || resp.GetCrErrno() != int32(unix.EACCES) || resp.GetCrErrmsg() != "not you: permission denied" {
			t.Errorf("the client got %v", resp)
		}
		if err := s.wait(); err != nil || len(s.received()) != 0 {
			t.Errorf("%v, CRIU got %q", err, s.received())
		}
	}
	s := serve(t, fake{}, func(r *relay.Relay) {
		noPart(r)
		r.Check = func(q *rpc.CriuReq) error { q.Opts.LogLevel = proto.Int32(1); return nil }
	})
	s.request(&rpc.CriuReq{Type: rpc.CriuReqType_CHECK.Enum(), Opts: &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1)}})
	s.response()
	if got := decoded(t, s.received()[0]); got.GetOpts().GetLogLevel() != 1 {
		t.Errorf("CRIU got %v", got)
	}
}

// TestStandalone refuses what CRIU's own service refuses, in its words.
func TestStandalone(t *testing.T) {
	for name, change := range map[string]func(*rpc.CriuOpts){
		"inherit_fd is not allowed in standalone service":  func(o *rpc.CriuOpts) { o.InheritFd = []*rpc.InheritFd{{Key: proto.String("x"), Fd: proto.Int32(0)}} },
		"rst_sibling is not allowed in standalone service": func(o *rpc.CriuOpts) { o.RstSibling = proto.Bool(false) },
		"ps.fd is not allowed in standalone service":       func(o *rpc.CriuOpts) { o.Ps = &rpc.CriuPageServerInfo{Fd: proto.Int32(0)} },
	} {
		s := serve(t, fake{}, func(r *relay.Relay) { r.Standalone = true })
		req := dumpOf(t)
		change(req.Opts)
		s.request(req)
		if resp := s.response(); resp.GetSuccess() || resp.GetCrErrno() != int32(unix.EBADRQC) || resp.GetCrErrmsg() != name {
			t.Errorf("%s: the client got %v", name, resp)
		}
	}
}

// TestCRIUGone: the client finds the end of its connection.
func TestCRIUGone(t *testing.T) {
	s := serve(t, fake{Crash: true}, noPart)
	s.request(dumpOf(t))
	if resp := s.response(); resp != nil {
		t.Errorf("the client got %v", resp)
	}
	if err := s.wait(); err != nil || len(s.over) != 1 || s.over[0].Err == nil {
		t.Errorf("%v, served %+v", err, s.over)
	}
}

// TestReasonSaidOnce: why a CRIU that may not ask was told of nothing is for Served
// to say, and for CRIU's log, and is not logged besides.
func TestReasonSaidOnce(t *testing.T) {
	var said bytes.Buffer
	criu := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(criu, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := serve(t, fake{Crash: true}, func(r *relay.Relay) {
		r.CRIU = criu // of which nobody knows whether it asks
		r.Log.SetOutput(&said)
	})
	req := dumpOf(t)
	req.Opts.Pid = proto.Int32(1 << 30) // there is no such process
	s.request(req)
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if len(s.over) != 1 || s.over[0].Err == nil || !strings.Contains(s.over[0].Err.Error(), "1073741824") || said.Len() > 0 {
		t.Errorf("served %+v, logged %q", s.over, said.String())
	}
}

// TestClientGone: a CRIU that had its notifications passed on finds nobody; one
// that had not comes to its end.
func TestClientGone(t *testing.T) {
	for _, notify := range []bool{false, true} {
		s := serve(t, fake{Notify: stages}, noPart)
		req := dumpOf(t)
		req.Opts.NotifyScripts = &notify
		s.request(req)
		if notify {
			s.receive()
		}
		s.hangUp()
		if err := s.wait(); err != nil {
			t.Error(err)
		}
		if s.over[0].Success == notify {
			t.Errorf("notify %v: served %+v", notify, s.over)
		}
	}
}

// TestCancelled: CRIU is hung up on, and has come to its end when Run returns.
func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	s := serveCtx(t, ctx, fake{Hang: true}, noPart)
	s.request(dumpOf(t))
	for len(s.received()) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel(why)
	if resp := s.response(); resp.GetType() != rpc.CriuReqType_DUMP || resp.GetSuccess() {
		t.Errorf("the client got %v", resp)
	}
	_ = s.wait()
}

// TestDrained: no further request is taken.
func TestDrained(t *testing.T) {
	end := make(chan struct{})
	s := serve(t, fake{}, func(r *relay.Relay) { r.Draining = end })
	version := &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)}
	s.request(version)
	s.response()
	close(end)
	if resp := s.response(); resp != nil {
		t.Errorf("the client got %v", resp)
	}
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if kinds := []rpc.CriuReqType{rpc.CriuReqType_VERSION}; !slices.EqualFunc(s.over, kinds, func(d relay.Served, k rpc.CriuReqType) bool { return d.Type == k && d.Success }) {
		t.Errorf("served %+v", s.over)
	}
}
