// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// swrkConn talks to a "criu swrk", the real one or ours, as a program that
// knows nothing of us: bytes out, bytes in.
type swrkConn struct {
	t    testing.TB
	conn *net.UnixConn
	cmd  *exec.Cmd
	// files have come with messages.
	files []*os.File
}

// clientOf starts a "criu swrk 3": byStock the real one, bySwrk ours. files are
// inherited by it, from 4 on.
func clientOf(t testing.TB, w way, files ...*os.File) *swrkConn {
	t.Helper()
	return clientSaying(t, w, nil, files...)
}

// clientSaying is clientOf with a stderr of its own.
func clientSaying(t testing.TB, w way, stderr *os.File, files ...*os.File) *swrkConn {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "client"), os.NewFile(uintptr(pair[1]), "swrk")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	c := &swrkConn{t: t, conn: conn.(*net.UnixConn), cmd: exec.Command("criu")}
	if w == bySwrk {
		c.cmd.Path, c.cmd.Err = criuhook, nil
	}
	c.cmd.Args = []string{"criu", "swrk", "3"}
	c.cmd.Dir = "/tmp"
	if stderr != nil {
		c.cmd.Stderr = stderr
	}
	c.cmd.ExtraFiles = append([]*os.File{theirs}, files...)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.end() })
	return c
}

// end hangs up, waits for CRIU, and tells how it ended.
func (c *swrkConn) end() string {
	c.conn.Close()
	if c.cmd.ProcessState == nil {
		watchdog := time.AfterFunc(criuTime, func() { _ = c.cmd.Process.Kill() })
		_ = c.cmd.Wait() // told by the state
		watchdog.Stop()
	}
	return c.cmd.ProcessState.String()
}

func (c *swrkConn) send(req *rpc.CriuReq) {
	c.t.Helper()
	b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(req)
	if err != nil {
		c.t.Fatal(err)
	}
	c.sendBytes(b)
}

func (c *swrkConn) sendBytes(b []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(b); err != nil && !errors.Is(err, unix.EPIPE) {
		c.t.Fatal(err)
	}
}

// receive returns nil when the connection has ended.
func (c *swrkConn) receive() *rpc.CriuResp {
	c.t.Helper()
	_ = c.conn.SetReadDeadline(time.Now().Add(criuTime)) // it fails only on a closed one
	b, oob := make([]byte, 1<<20), make([]byte, 1024)
	n, oobn, _, _, err := c.conn.ReadMsgUnix(b, oob)
	if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for i := range messages {
			fds, _ := unix.ParseUnixRights(&messages[i]) // nothing else is sent
			for _, fd := range fds {
				c.files = append(c.files, os.NewFile(uintptr(fd), "from CRIU"))
			}
		}
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.t.Fatal("no answer comes")
	case err != nil || n == 0:
		return nil
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(b[:n], resp); err != nil {
		c.t.Fatalf("%d bytes that are no answer: %v", n, err)
	}
	return resp
}

// agree agrees to any notification.
func agree(string) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)}
}

// ask makes a request and answers notifications up to the answer. answer returns
// nil for none, which ends it.
func (c *swrkConn) ask(req *rpc.CriuReq, answer func(stage string) *rpc.CriuReq) (resp *rpc.CriuResp, stages []string) {
	c.t.Helper()
	c.send(req)
	for {
		resp := c.receive()
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			return resp, stages
		}
		stage := resp.GetNotify().GetScript()
		stages = append(stages, stage)
		reply := answer(stage)
		if reply == nil {
			return nil, stages
		}
		c.send(reply)
	}
}

// opened is a directory as a request names it.
func opened(t testing.TB, dir string) *int32 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return proto.Int32(int32(f.Fd()))
}

func (p *Process) dumpRequest(t testing.TB, dir string) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{
		Pid: proto.Int32(int32(p.PID)), ImagesDirFd: opened(t, dir), LogLevel: proto.Int32(4), LogFile: proto.String("dump.log"),
	}}
}

func restoreRequest(t testing.TB, dir string) *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: &rpc.CriuOpts{
		ImagesDirFd: opened(t, dir), LogLevel: proto.Int32(4), LogFile: proto.String("restore.log"),
	}}
}

func logOf(dir, name string) string {
	b, _ := os.ReadFile(filepath.Join(dir, name))
	return string(b)
}

// succeeded checks an answer, and prints CRIU's log if it is another.
func succeeded(t testing.TB, resp *rpc.CriuResp, log string) {
	t.Helper()
	if !resp.GetSuccess() {
		t.Fatalf("CRIU answered %v\n%s", resp, Result{Log: log}.tail())
	}
}

// alike makes texts of two runs comparable: numbers differ.
var digits = regexp.MustCompile(`[0-9]+`)

func alike(resp *rpc.CriuResp) string {
	if resp == nil {
		return "end"
	}
	if resp.Version != nil || resp.Features != nil {
		return resp.String()
	}
	return fmt.Sprintf("%v success=%v errno=%d dump=%v restore=%v status=%v %q", resp.GetType(), resp.GetSuccess(), resp.GetCrErrno(),
		resp.Dump, resp.GetRestore().GetPid(), resp.Status, digits.ReplaceAllString(strings.TrimSpace(resp.GetCrErrmsg()), "N"))
}
