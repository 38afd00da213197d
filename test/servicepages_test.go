// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// TestClientsPageServer: the pages go to a page server.
func TestClientsPageServer(t *testing.T) {
	need(t)
	s := startService(t)
	for _, where := range []string{"unix:" + s.Path, "bin:" + dropinCRIU(t)} {
		kind, _, _ := strings.Cut(where, ":")
		t.Run(kind, func(t *testing.T) {
			_, path := daemon(t, "unix", "reconnect")
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			dir, port := images(t), freePort(t)
			server := exec.Command("criu", "page-server", "-D", dir, "--address", "127.0.0.1", "--port", strconv.Itoa(port), "-v4", "-o", "page.log")
			if err := server.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { _ = server.Wait(); close(ended) }()
			t.Cleanup(func() { _ = server.Process.Kill(); <-ended })
			eventually(t, "the page server listens", func() bool { return listens(port) })
			got := libcriuAt(where)(t, "dump", dir, strconv.Itoa(a.PID), "port="+strconv.Itoa(port))
			if got != "result 0\n" {
				t.Fatalf("dump: %q\n%s", got, tailOf(filepath.Join(dir, "criu.log")))
			}
			select {
			case <-ended:
			case <-time.After(criuTime):
				t.Fatal("the page server does not end")
			}
			if p, _ := filepath.Glob(filepath.Join(dir, "pages-*.img")); len(p) == 0 {
				t.Error("there are no pages")
			}
			a.Dumped(t, dir)
			if got := libcriuAt(where)(t, "restore", dir); got != "a pid came back\n" {
				t.Fatalf("restore: %q\n%s", got, tailOf(filepath.Join(dir, "criu.log")))
			}
			a.Request(t, "c")
			a.Kill(t)
		})
	}
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// TestServicePageServer: the page server is the service's, too.
func TestServicePageServer(t *testing.T) {
	need(t)
	s := startService(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := s.descriptors()
	dir := images(t)
	d := openDir(t, dir)
	serve := dumpRequest(d, 0)
	serve.Type, serve.Opts.Pid, serve.Opts.LogFile = rpc.CriuReqType_PAGE_SERVER.Enum(), nil, proto.String("page.log")
	serve.Opts.Ps = &rpc.CriuPageServerInfo{Address: proto.String("127.0.0.1"), Port: proto.Int32(int32(freePort(t)))}
	c := s.dial(t)
	c.send(t, serve)
	resp := c.receive(t)
	if !resp.GetSuccess() || resp.GetPs().GetPort() <= 0 {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "page.log")))
	}
	s.wantIdle(t, before) // it is a process of its own
	req := dumpRequest(d, a.PID)
	req.Opts.Ps = &rpc.CriuPageServerInfo{Address: proto.String("127.0.0.1"), Port: resp.GetPs().Port}
	c = s.dial(t)
	c.send(t, req)
	if resp := c.receive(t); !resp.GetSuccess() {
		t.Fatalf("%v\n%s", resp, tailOf(filepath.Join(dir, "dump.log")))
	}
	noCRIULeft(t) // the page server ends with the dump
	a.Dumped(t, dir)
	s.stop(t)
	nothingLeft(t)
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// listens looks at /proc, since to connect would take the page server's only turn.
func listens(port int) bool {
	b, _ := os.ReadFile("/proc/net/tcp")
	return strings.Contains(string(b), fmt.Sprintf(":%04X 00000000:0000 0A", port))
}
