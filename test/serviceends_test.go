// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// held is a dump whose client has not answered the notification yet.
func (s *Service) held(t testing.TB, a *App, stage string) (rpcConn, string) {
	t.Helper()
	dir := images(t)
	c := s.dial(t)
	req := dumpRequest(openDir(t, dir), a.PID)
	req.Opts.NotifyScripts = proto.Bool(true)
	c.send(t, req)
	for {
		resp := c.receive(t)
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
		}
		if resp.GetNotify().GetScript() == stage {
			return c, dir
		}
		c.send(t, &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)})
	}
}

// TestServiceClientDies: in the middle of its dump, at each notification that it
// answers. The application runs on, with its connection.
func TestServiceClientDies(t *testing.T) {
	need(t)
	s := startService(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := s.descriptors()
	for _, stage := range []string{"pre-dump", "query-ext-files", "post-dump"} {
		c, dir := s.held(t, a, stage)
		c.Close()
		s.wantIdle(t, before)
		a.Request(t, "c")
		if _, err := os.Lstat(filepath.Join(dir, "criuhook.img")); err == nil {
			t.Errorf("%s: the dump of a client that has died looks complete", stage)
		}
	}
	// And in its restore: what was restored by then goes with it.
	dir := images(t)
	d := openDir(t, dir)
	c := s.dial(t)
	c.send(t, dumpRequest(d, a.PID))
	if resp := c.receive(t); !resp.GetSuccess() {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
	}
	a.Dumped(t, dir)
	req := dumpRequest(d, 0)
	req.Type, req.Opts.Pid, req.Opts.NotifyScripts = rpc.CriuReqType_RESTORE.Enum(), nil, proto.Bool(true)
	c = s.dial(t)
	c.send(t, req)
	for resp := c.receive(t); resp.GetNotify().GetScript() != "post-restore"; resp = c.receive(t) {
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
		}
		c.send(t, &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)})
	}
	c.Close()
	s.wantIdle(t, before)
	awaitFree(t, a.dumpedThreads(dir))
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServiceCRIUDies: the client is told, by the end of its connection at least,
// as by CRIU's own service.
func TestServiceCRIUDies(t *testing.T) {
	need(t)
	s := startService(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := s.descriptors()
	c, _ := s.held(t, a, "query-ext-files")
	for _, pid := range running("criu") {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for {
		resp, err := c.try()
		if err == nil && resp.GetSuccess() {
			t.Fatalf("a CRIU that was killed has succeeded: %v", resp)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.wantIdle(t, before)
	// The kernel lets go of a tree whose tracer has died.
	a.Request(t, "c")
	if err := s.tryVersion(t); err != nil {
		t.Errorf("the next request: %v", err)
	}
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServiceStop: what is under way comes to its end; after a second signal it
// is made to give up.
func TestServiceStop(t *testing.T) {
	need(t)
	for _, patient := range []bool{true, false} {
		t.Run(fmt.Sprintf("patient=%v", patient), func(t *testing.T) {
			s := startService(t)
			_, path := daemon(t, "unix", "reconnect")
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			c, dir := s.held(t, a, "post-dump")
			if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the socket is gone", func() bool { _, err := os.Lstat(s.Path); return os.IsNotExist(err) })
			select {
			case <-s.done:
				t.Fatal("the service has ended in the middle of a dump")
			case <-time.After(20 * time.Millisecond):
			}
			if !patient {
				if err := s.cmd.Process.Signal(unix.SIGINT); err != nil {
					t.Fatal(err)
				}
				s.ended(t)
				a.Request(t, "c")
				if _, err := os.Lstat(filepath.Join(dir, "criuhook.img")); err == nil {
					t.Error("a dump that was made to give up looks complete")
				}
				return
			}
			c.send(t, &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)})
			resp := c.receive(t)
			for resp.GetType() == rpc.CriuReqType_NOTIFY {
				c.send(t, &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)})
				resp = c.receive(t)
			}
			if !resp.GetSuccess() {
				t.Errorf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
			}
			s.ended(t)
			a.Dumped(t, dir)
		})
	}
	nothingLeft(t)
	noCRIULeft(t)
}
