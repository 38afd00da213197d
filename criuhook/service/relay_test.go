// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/rule"
	"criuhook/criuhook/service"
)

// TestNoCRIU: that no CRIU could be started is told the client, and said once: it is
// logged, or returned for the caller to log.
func TestNoCRIU(t *testing.T) {
	ours, theirs := pair(t)
	req, err := proto.Marshal(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()})
	if err != nil {
		t.Fatal(err)
	}
	said := &logText{}
	log := logrus.New()
	log.SetOutput(said)
	work := &service.Relay{CRIU: filepath.Join(t.TempDir(), "criu"), NewLog: func(w io.Writer) (*logrus.Logger, error) {
		log := logrus.New()
		log.SetOutput(w)
		return log, nil
	}}
	err = work.Work(t.Context(), &service.Session{
		Conn: ours, Client: &service.Client{PID: os.Getpid()}, First: req,
		Rules: &rule.Set{}, Limits: rule.DefaultService, Log: logrus.NewEntry(log),
		Allow: func(*rpc.CriuReq) error { return nil },
	})
	if resp := receive(t, theirs); resp.GetSuccess() || !strings.Contains(resp.GetCrErrmsg(), work.CRIU) {
		t.Errorf("the client got %v", resp)
	}
	text := said.String()
	if err != nil {
		text += fmt.Sprintln("returned:", err)
	}
	if n := strings.Count(text, "start "+work.CRIU); n != 1 {
		t.Errorf("said %d times:\n%s", n, text)
	}
}

// pair is a connection.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "an end of a connection")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1]
}
