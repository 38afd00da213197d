// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// A FAKE of "criu swrk": this test's own binary, started again. It is for what
// the real one cannot be made to do.
const fakeVariable = "CRIURPC_TEST_FAKE"

func TestMain(m *testing.M) {
	if play := os.Getenv(fakeVariable); play != "" {
		fd, err := strconv.Atoi(os.Args[len(os.Args)-1])
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake: no fd at the end of", os.Args)
			os.Exit(99)
		}
		f := &fake{fd: fd}
		plays[play](f)
		os.Exit(f.status)
	}
	os.Exit(m.Run())
}

type fake struct{ fd, status int }

// recv is nil when the client is gone, as with CRIU.
func (f *fake) recv() *rpc.CriuReq {
	size, _, err := unix.Recvfrom(f.fd, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
	if err != nil || size == 0 {
		return nil
	}
	b := make([]byte, size)
	if _, _, err := unix.Recvfrom(f.fd, b, 0); err != nil {
		return nil
	}
	req := &rpc.CriuReq{}
	if proto.Unmarshal(b, req) != nil {
		os.Exit(98)
	}
	return req
}

func (f *fake) sendRaw(b []byte, fds ...int) {
	_ = unix.SetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(b)+1<<17)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(f.fd, b, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		f.status = 97
	}
}

func (f *fake) send(resp *rpc.CriuResp, fds ...int) {
	b, err := proto.Marshal(resp)
	if err != nil {
		os.Exit(96)
	}
	f.sendRaw(b, fds...)
}

// notify reports whether the client agreed.
func (f *fake) notify(stage criurpc.Stage, fds ...int) bool {
	f.send(&rpc.CriuResp{
		Type:    rpc.CriuReqType_NOTIFY.Enum(),
		Success: proto.Bool(true),
		Notify:  &rpc.CriuNotify{Script: proto.String(string(stage))},
	}, fds...)
	return f.recv().GetNotifySuccess()
}

func (f *fake) answer(kind rpc.CriuReqType, success bool) {
	resp := &rpc.CriuResp{Type: &kind, Success: &success}
	if !success {
		resp.CrErrmsg = proto.String("Error (criu/fake.c:1): fake: the first error\n")
		resp.CrErrno = proto.Int32(int32(unix.ESRCH))
		f.status = 1
	}
	f.send(resp)
}

// unknown is a field that no version of rpc.proto has.
func unknown(b []byte) []byte {
	b = protowire.AppendTag(b, 9999, protowire.BytesType)
	return protowire.AppendString(b, "from the future")
}

const dump = rpc.CriuReqType_DUMP

var plays = map[string]func(f *fake){
	"dump": func(f *fake) {
		f.recv()
		ok := f.notify(criurpc.StagePreDump) && f.notify(criurpc.StageQueryExtFiles) && f.notify(criurpc.StagePostDump)
		f.answer(dump, ok)
	},
	// Answers with as many bytes as log_level says, and the length of the request.
	"big": func(f *fake) {
		req := f.recv()
		b, _ := proto.Marshal(&rpc.CriuResp{
			Type: dump.Enum(), Success: proto.Bool(true),
			Status:   proto.Int32(int32(proto.Size(req))),
			CrErrmsg: proto.String(strings.Repeat("x", int(req.GetOpts().GetLogLevel()))),
		})
		f.sendRaw(unknown(b))
	},
	// Sends back the request's unknown fields as its own.
	"echo-unknown": func(f *fake) {
		req := f.recv()
		resp := &rpc.CriuResp{Type: dump.Enum(), Success: proto.Bool(true)}
		resp.ProtoReflect().SetUnknown(req.ProtoReflect().GetUnknown())
		f.send(resp)
	},
	"many-files": func(f *fake) {
		f.recv()
		r, w, err := os.Pipe()
		if err != nil {
			os.Exit(95)
		}
		_, _ = w.WriteString("through the pipe")
		w.Close()
		null, _ := os.Open(os.DevNull)
		fds := []int{int(r.Fd())}
		for len(fds) < 253 {
			fds = append(fds, int(null.Fd()))
		}
		f.answer(dump, f.notify(criurpc.StageOrphanPTSMaster, fds...))
	},
	"die":         func(f *fake) { f.recv(); fmt.Fprintln(os.Stderr, "fake: killed by a \x1b[31mbug"); f.status = 7 },
	"die-at-once": func(f *fake) { f.status = 6 },
	"last-words":  func(f *fake) { f.answer(dump, false) }, // and reads nothing
	"die-in-notification": func(f *fake) {
		f.recv()
		f.send(&rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true),
			Notify: &rpc.CriuNotify{Script: proto.String("pre-dump")}})
	},
	// Dies; a child of its keeps the socket open.
	"leave-child": func(f *fake) {
		f.recv()
		cmd := exec.Command("/bin/cat") // until the test closes its stdin
		cmd.Stdin = os.Stdin
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(f.fd), "sk")}
		if cmd.Start() != nil {
			os.Exit(94)
		}
		f.status = 5
	},
	"garbage":      func(f *fake) { f.recv(); f.sendRaw([]byte("\xff\xff\xff no protobuf")); f.recv() },
	"wrong-type":   func(f *fake) { f.recv(); f.answer(rpc.CriuReqType_RESTORE, true); f.recv() },
	"nameless":     func(f *fake) { f.recv(); f.notify("") },
	"incomplete":   func(f *fake) { f.recv(); f.sendRaw([]byte{8, 1}); f.recv() }, // no success
	"empty":        func(f *fake) { f.recv(); f.sendRaw(nil); f.recv() },
	"refused":      func(f *fake) { f.recv(); f.answer(rpc.CriuReqType_EMPTY, false) },
	"go-on":        func(f *fake) { f.recv(); f.notify(criurpc.StagePostResume); f.answer(rpc.CriuReqType_RESTORE, true) },
	"too-long-yes": func(f *fake) { f.recv(); f.answer(dump, f.notify(criurpc.StageQueryExtFiles)) },
	"versions": func(f *fake) {
		for req := f.recv(); req != nil; req = f.recv() {
			f.send(&rpc.CriuResp{Type: req.Type, Success: proto.Bool(true),
				Version: &rpc.CriuVersion{MajorNumber: proto.Int32(4), MinorNumber: proto.Int32(99)}})
			if !req.GetKeepOpen() {
				return
			}
		}
	},
	// A CRIU without query-ext-files: begins the images and fails.
	"old": func(f *fake) { probed(f, true) },
	// A CRIU that may not dump.
	"unable": func(f *fake) { probed(f, false) },
	// Never looks at its socket again, and has a child.
	"hang": func(f *fake) {
		signal.Ignore(unix.SIGTERM, unix.SIGHUP)
		req := f.recv()
		child := exec.Command("/bin/cat")
		child.Stdin = os.Stdin
		if child.Start() != nil {
			os.Exit(93)
		}
		up(req, strconv.Itoa(child.Process.Pid))
		for {
			time.Sleep(time.Hour)
		}
	},
	// At work until the client is gone; then it cleans up and reports.
	"long": func(f *fake) {
		req := f.recv()
		up(req, "")
		f.recv()
		_ = os.WriteFile(filepath.Join(req.GetOpts().GetImagesDir(), "clean"), nil, 0o600)
		f.answer(dump, false)
	},
	// The same, but it was too late to give up.
	"late": func(f *fake) {
		req := f.recv()
		up(req, "")
		f.recv()
		f.answer(dump, true)
	},
	// Becomes something else, as with exec_cmd.
	"exec": func(f *fake) {
		f.recv()
		f.answer(rpc.CriuReqType_RESTORE, true)
		_ = unix.Exec("/bin/sh", []string{"sh", "-c", "exit 3"}, nil)
	},
}

func probed(f *fake, begin bool) {
	for req := f.recv(); req != nil; req = f.recv() {
		if req.GetType() == rpc.CriuReqType_VERSION {
			f.send(&rpc.CriuResp{Type: req.Type, Success: proto.Bool(true), Version: &rpc.CriuVersion{
				MajorNumber: proto.Int32(3), MinorNumber: proto.Int32(17)}})
			continue
		}
		f.notify(criurpc.StagePreDump)
		name := fmt.Sprintf("/proc/%d/fd/%d/files.img", os.Getppid(), req.GetOpts().GetImagesDirFd())
		if begin && os.WriteFile(name, nil, 0o600) != nil {
			os.Exit(91)
		}
		f.answer(dump, false)
		return
	}
}

// up tells the test that the request has come.
func up(req *rpc.CriuReq, text string) {
	name := filepath.Join(req.GetOpts().GetImagesDir(), "up")
	if os.WriteFile(name+".new", []byte(text), 0o600) != nil || os.Rename(name+".new", name) != nil {
		os.Exit(92)
	}
}

// holdStdin gives CRIU a stdin that ends with the test, and with it all that
// reads it.
func holdStdin(t *testing.T, config *criurpc.Config) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	config.Stdin = r
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
}

// pretend is a Config of a fake.
func pretend(play string) criurpc.Config {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return criurpc.Config{
		Path: self,
		// The race detector would let each fake sleep for a second at its end.
		Env:   append(os.Environ(), fakeVariable+"="+play, "GORACE=atexit_sleep_ms=0"),
		Grace: patience,
	}
}

// patience is for conditions that come within milliseconds unless something is
// broken.
const patience = 20 * time.Second

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("waited %v for: %s", patience, what)
}

// nothingLeft checks, at the end of a test, that it left no fd and no child.
func nothingLeft(t *testing.T) {
	t.Helper()
	before := fds(t)
	t.Cleanup(func() {
		if after := fds(t); len(after) > len(before) {
			t.Errorf("open files: %q before, %q after", before, after)
		}
		if left := childrenOf(os.Getpid()); len(left) > 0 {
			t.Errorf("processes left: %v", left)
		}
	})
}

func fds(t testing.TB) []string {
	t.Helper()
	// The runtime opens its poller once.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, name)
		}
	}
	return out
}

func childrenOf(pid int) []string {
	var out []string
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		out = append(out, strings.Fields(string(b))...)
	}
	return out
}

// dumpRequest is for fakes.
func dumpRequest(dir string) *rpc.CriuReq {
	return &rpc.CriuReq{
		Type: dump.Enum(),
		Opts: &rpc.CriuOpts{Pid: proto.Int32(1234567), ImagesDir: &dir, LogToStderr: proto.Bool(true)},
	}
}

// yes is a handler that agrees, and remembers what to.
type yes struct{ stages []criurpc.Stage }

func (y *yes) Notify(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
	y.stages = append(y.stages, n.Stage)
	return nil, nil
}
