// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/relay"
	"criuhook/criuhook/rule"
)

// fakeRole is how the test binary is called to be a CRIU: "criu swrk FD". It is a
// fake: it dumps nothing, and does what the environment says.
const fakeRole = "CRIUHOOK_TEST_FAKE"

// What a fake CRIU does:
//
//	got FILE       all that it receives is added to FILE, in hexadecimal lines
//	notify A,B,…   the notifications of a DUMP and a RESTORE
//	answer FILE    the answer, in place of its own
//	file           its notifications carry its stdin
//	crash          it ends without an answer
//	hang           it answers only when it is hung up on
type fake struct {
	Got    string
	Notify []string
	Answer []byte
	File   bool
	Crash  bool
	Hang   bool
}

func (f fake) environ() []string {
	return []string{
		fakeRole + "=1", "FAKE_GOT=" + f.Got, "FAKE_NOTIFY=" + strings.Join(f.Notify, ","), "FAKE_ANSWER=" + f.Got + ".answer",
		"FAKE_FILE=" + strconv.FormatBool(f.File), "FAKE_CRASH=" + strconv.FormatBool(f.Crash), "FAKE_HANG=" + strconv.FormatBool(f.Hang),
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(fakeRole) != "" {
		fd, _ := strconv.Atoi(os.Args[len(os.Args)-1])
		if err := beCRIU(fd); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// beCRIU is cr_service_work, as far as order and ends go.
func beCRIU(fd int) error {
	recv := func() ([]byte, error) {
		b := make([]byte, 1<<20)
		n, err := unix.Read(fd, b)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(os.Getenv("FAKE_GOT"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		_, err = fmt.Fprintln(f, hex.EncodeToString(b[:n]))
		return b[:n], err
	}
	for {
		b, err := recv()
		if err != nil {
			return err
		}
		req := &rpc.CriuReq{}
		if err := proto.Unmarshal(b, req); err != nil {
			return err
		}
		ok := true
		if kind := req.GetType(); kind == rpc.CriuReqType_DUMP || kind == rpc.CriuReqType_RESTORE {
			for _, stage := range strings.Split(os.Getenv("FAKE_NOTIFY"), ",") {
				if stage == "" || !req.GetOpts().GetNotifyScripts() || !ok && stage != "network-unlock" {
					continue
				}
				n := &rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: &rpc.CriuNotify{Script: proto.String(stage)}}
				n.ProtoReflect().SetUnknown(unknown)
				out, err := proto.Marshal(n)
				if err != nil {
					return err
				}
				var rights []byte
				if os.Getenv("FAKE_FILE") == "true" {
					rights = unix.UnixRights(0)
				}
				if err := unix.Sendmsg(fd, out, rights, nil, unix.MSG_NOSIGNAL); err != nil {
					ok = false
					continue
				}
				reply, err := recv()
				answer := &rpc.CriuReq{}
				ok = ok && err == nil && proto.Unmarshal(reply, answer) == nil && answer.GetNotifySuccess()
			}
		}
		if os.Getenv("FAKE_CRASH") == "true" {
			return errors.New("a fake crash")
		}
		if os.Getenv("FAKE_HANG") == "true" {
			if _, err := recv(); err != nil {
				ok = false
			}
		}
		out, _ := os.ReadFile(os.Getenv("FAKE_ANSWER"))
		if len(out) == 0 {
			resp := &rpc.CriuResp{Type: req.Type, Success: &ok}
			if req.GetType() == rpc.CriuReqType_RESTORE {
				resp.Restore = &rpc.CriuRestoreResp{Pid: proto.Int32(1)}
			}
			if out, err = proto.Marshal(resp); err != nil {
				return err
			}
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
		if err := unix.Sendmsg(fd, out, nil, nil, unix.MSG_NOSIGNAL); err != nil {
			return err
		}
		if !req.GetKeepOpen() && req.GetType() != rpc.CriuReqType_PRE_DUMP {
			return nil
		}
	}
}

// unknown is a field that this program's rpc types do not have: number 900, of
// type string.
var unknown = []byte{0xa2, 0x38, 5, 'n', 'e', 'w', 'e', 'r'}

// session is a client, its end of the connection, and a Relay that serves it.
type session struct {
	t    *testing.T
	fd   int
	got  string // what CRIU got
	done chan error
	over []relay.Served
}

// serve starts a Relay to a fake CRIU. change may change it before.
func serve(t *testing.T, f fake, change func(*relay.Relay)) *session {
	t.Helper()
	return serveCtx(t, t.Context(), f, change)
}

func serveCtx(t *testing.T, ctx context.Context, f fake, change func(*relay.Relay)) *session {
	t.Helper()
	before := descriptors(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, fd: pair[0], got: filepath.Join(t.TempDir(), "got"), done: make(chan error, 1)}
	f.Got = s.got
	if len(f.Answer) > 0 {
		if err := os.WriteFile(s.got+".answer", f.Answer, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	log := logrus.New()
	log.SetOutput(t.Output())
	client := os.NewFile(uintptr(pair[1]), "client")
	r := &relay.Relay{
		Client: client, CRIU: "/proc/self/exe", Start: &relay.Child{Path: "/proc/self/exe", Env: f.environ(), Stderr: t.Output()},
		Rules: func() (*rule.Set, error) { return &rule.Set{}, nil }, Log: log, Version: "test",
		Served: func(d relay.Served) { s.over = append(s.over, d) },
	}
	if change != nil {
		change(r)
	}
	go func() {
		err := r.Run(ctx)
		client.Close()
		s.done <- err
		close(s.done)
	}()
	t.Cleanup(func() {
		s.hangUp()
		s.wait()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			now := descriptors(t)
			if now <= before { // sessions before this one may have ended meanwhile
				return
			}
			if time.Now().After(end) {
				t.Errorf("descriptors and children: %d, before: %d", now, before)
				return
			}
		}
	})
	return s
}

// descriptors counts those of this process, and its children.
func descriptors(t *testing.T) int {
	t.Helper()
	n := 0
	for _, pattern := range []string{"/proc/self/fd/*", "/proc/self/task/*/children"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if filepath.Base(name) != "children" {
				n++
			} else if b, err := os.ReadFile(name); err == nil {
				n += len(strings.Fields(string(b)))
			}
		}
	}
	return n
}

func (s *session) hangUp() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

func (s *session) wait() error {
	s.t.Helper()
	select {
	case err := <-s.done:
		return err
	case <-time.After(time.Minute):
		s.t.Fatal("the Relay does not end")
		return nil
	}
}

func (s *session) send(b []byte, fds ...int) {
	s.t.Helper()
	if err := unix.Sendmsg(s.fd, b, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL); err != nil {
		s.t.Fatal(err)
	}
}

func (s *session) request(req *rpc.CriuReq) []byte {
	s.t.Helper()
	b, err := proto.Marshal(req)
	if err != nil {
		s.t.Fatal(err)
	}
	s.send(b)
	return b
}

// receive returns nil at the end of the connection.
func (s *session) receive() (b []byte, fds []int) {
	s.t.Helper()
	fd := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
	for end := time.Now().Add(time.Minute); ; {
		if n, _ := unix.Poll(fd, 1000); n > 0 {
			break
		}
		if time.Now().After(end) {
			s.t.Fatal("no message comes")
		}
	}
	b, oob := make([]byte, 1<<20), make([]byte, 1024)
	n, oobn, _, _, err := unix.Recvmsg(s.fd, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n == 0 {
		return nil, nil
	}
	if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for i := range messages {
			some, _ := unix.ParseUnixRights(&messages[i])
			fds = append(fds, some...)
		}
	}
	return b[:n], fds
}

func (s *session) response() *rpc.CriuResp {
	s.t.Helper()
	b, fds := s.receive()
	for _, fd := range fds {
		unix.Close(fd)
	}
	if b == nil {
		return nil
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(b, resp); err != nil {
		s.t.Fatal(err)
	}
	return resp
}

// received are the messages that the fake got.
func (s *session) received() (all [][]byte) {
	s.t.Helper()
	b, err := os.ReadFile(s.got)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	for _, line := range strings.Fields(string(b)) {
		m, err := hex.DecodeString(line)
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, m)
	}
	return all
}
