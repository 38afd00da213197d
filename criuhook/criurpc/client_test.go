// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// All in this file is against a FAKE criu, see fake_test.go.

func TestMessagesOfAnySize(t *testing.T) {
	for _, size := range []int{0, 8 << 10, 200 << 10, 1 << 20, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			nothingLeft(t)
			if size > 100<<10 && os.Getuid() != 0 {
				t.Skip("SKIP: a packet of that size needs CAP_NET_ADMIN")
			}
			req := dumpRequest(t.TempDir())
			req.Opts.LogLevel = proto.Int32(int32(size))
			req.Opts.External = []string{strings.Repeat("x", size)}
			resp, err := criurpc.Run(t.Context(), pretend("big"), req, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(resp.GetCrErrmsg()); got != size {
				t.Errorf("received %d bytes, want %d", got, size)
			}
			if got := int(resp.GetStatus()); got < size {
				t.Errorf("CRIU received %d bytes, want at least %d", got, size)
			}
			if got := resp.ProtoReflect().GetUnknown(); !bytes.Equal(got, unknown(nil)) {
				t.Errorf("unknown fields: %q", got)
			}
		})
	}
}

func TestUnknownFieldsOfRequest(t *testing.T) {
	nothingLeft(t)
	req := dumpRequest(t.TempDir())
	req.ProtoReflect().SetUnknown(unknown(nil))
	before := proto.CloneOf(req)
	resp, err := criurpc.Run(t.Context(), pretend("echo-unknown"), req, &yes{})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.ProtoReflect().GetUnknown(); !bytes.Equal(got, unknown(nil)) {
		t.Errorf("unknown fields: %q", got)
	}
	if !proto.Equal(req, before) {
		t.Errorf("Do changed the request: %v", req)
	}
}

func TestFilesOfNotification(t *testing.T) {
	nothingLeft(t)
	var mine *os.File
	var count int
	h := criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
		count = len(n.Files)
		mine, n.Files[0] = n.Files[0], nil
		for _, f := range n.Files[1:] {
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("received file has flags %#x, %v: not close-on-exec", flags, err)
			}
		}
		return nil, nil
	})
	if _, err := criurpc.Run(t.Context(), pretend("many-files"), dumpRequest(t.TempDir()), h); err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	if got, err := io.ReadAll(mine); string(got) != "through the pipe" || count != 253 {
		t.Errorf("%d files, read %q, %v", count, got, err)
	}
}

func TestFilesWithoutHandler(t *testing.T) {
	nothingLeft(t)
	_, err := criurpc.Run(t.Context(), pretend("many-files"), dumpRequest(t.TempDir()), nil)
	if err == nil || !strings.Contains(err.Error(), "give a Handler") {
		t.Errorf("error: %v", err)
	}
}

func TestNotifications(t *testing.T) {
	all := []criurpc.Stage{criurpc.StagePreDump, criurpc.StageQueryExtFiles, criurpc.StagePostDump}
	boom := errors.New("boom\nand more")
	for i, stage := range append(slices.Clone(all), "none") {
		t.Run(string(stage), func(t *testing.T) {
			nothingLeft(t)
			var seen []criurpc.Stage
			resp, err := criurpc.Run(t.Context(), pretend("dump"), dumpRequest(t.TempDir()),
				criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
					seen = append(seen, n.Stage)
					if n.Stage == stage {
						return nil, boom
					}
					return criurpc.External("unix[1]"), nil
				}))
			if want := all[:min(i+1, len(all))]; !slices.Equal(seen, want) {
				t.Errorf("notifications: %v, want %v", seen, want)
			}
			if stage == "none" {
				if err != nil || !resp.GetSuccess() {
					t.Errorf("answer %v, %v", resp, err)
				}
				return
			}
			var e *criurpc.Error
			if !errors.Is(err, boom) || !errors.As(err, &e) || e.Stage != stage || resp == nil || resp.GetSuccess() {
				t.Fatalf("answer %v, error %#v", resp, err)
			}
			want := "CRIU: dump of process 1234567: at " + string(stage) + ": boom; and more"
			if got := err.Error(); got != want {
				t.Errorf("error %q, want %q", got, want)
			}
		})
	}
}

func TestNotificationFailsWhereCRIUGoesOn(t *testing.T) {
	nothingLeft(t)
	boom := errors.New("boom")
	resp, err := criurpc.Run(t.Context(), pretend("go-on"),
		&rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: &rpc.CriuOpts{}},
		criurpc.HandlerFunc(func(context.Context, *criurpc.Notification) (*rpc.CriuOpts, error) { return nil, boom }))
	if !resp.GetSuccess() || !errors.Is(err, boom) || !strings.Contains(err.Error(), "went on") {
		t.Errorf("answer %v, error %v", resp, err)
	}
}

func TestAnswerTooLong(t *testing.T) {
	nothingLeft(t)
	_, err := criurpc.Run(t.Context(), pretend("too-long-yes"), dumpRequest(t.TempDir()),
		criurpc.HandlerFunc(func(context.Context, *criurpc.Notification) (*rpc.CriuOpts, error) {
			return criurpc.External(strings.Repeat("x", 256<<20)), nil
		}))
	if err == nil || !strings.Contains(err.Error(), "send less") {
		t.Errorf("error: %.300v", err)
	}
}

func TestHandlerPanics(t *testing.T) {
	nothingLeft(t)
	c, err := criurpc.Start(pretend("dump"))
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic did not come through")
			}
		}()
		_, _ = c.Do(t.Context(), dumpRequest(t.TempDir()),
			criurpc.HandlerFunc(func(context.Context, *criurpc.Notification) (*rpc.CriuOpts, error) { panic("boom") }))
	}()
	// The fake has heard the no: 1 is its status for a failed dump.
	if got := c.Wait().ExitCode(); got != 1 {
		t.Errorf("exit code %d, want 1", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoAnswer(t *testing.T) {
	for _, c := range []struct {
		play, want string
		protocol   bool
	}{
		{play: "die", want: "ended without an answer: exit status 7: fake: killed by a ?[31mbug"},
		{play: "die-at-once", want: "ended without an answer: exit status 6"},
		{play: "die-in-notification", want: "ended without an answer: exit status 0"},
		{play: "leave-child", want: "ended without an answer: exit status 5"},
		{play: "empty", want: "ended without an answer: exit status 0"},
		{play: "last-words", want: "failed (errno 3, no such process): fake: the first error"},
		{play: "refused", want: "failed (errno 3, no such process): fake: the first error"},
		{play: "garbage", want: "no CriuResp", protocol: true},
		{play: "incomplete", want: "no CriuResp", protocol: true},
		{play: "wrong-type", want: "an answer to RESTORE", protocol: true},
		{play: "nameless", want: "without a name", protocol: true},
	} {
		t.Run(c.play, func(t *testing.T) {
			nothingLeft(t)
			config := pretend(c.play)
			holdStdin(t, &config)
			_, err := criurpc.Run(t.Context(), config, dumpRequest(t.TempDir()), &yes{})
			var e *criurpc.Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q, want %q", err, c.want)
			}
			if got := errors.Is(err, criurpc.ErrProtocol); got != c.protocol {
				t.Errorf("ErrProtocol: %v, want %v", got, c.protocol)
			}
			if e != nil && e.Response != nil && !errors.Is(err, unix.ESRCH) {
				t.Errorf("CRIU's errno is not found in %v", err)
			}
		})
	}
}

func TestSeveralRequests(t *testing.T) {
	nothingLeft(t)
	c, err := criurpc.Start(pretend("versions"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 {
		v, err := c.Version(t.Context())
		if err != nil || v.GetMinorNumber() != 99 {
			t.Fatalf("version %v, %v", v, err)
		}
	}
	version := &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()}
	if _, err := c.Do(t.Context(), version, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Do(t.Context(), version, nil); !errors.Is(err, criurpc.ErrClosed) {
		t.Errorf("after the last request: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Version(t.Context()); !errors.Is(err, criurpc.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestExecCommand(t *testing.T) {
	nothingLeft(t)
	c, err := criurpc.Start(pretend("exec"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Do(t.Context(), &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum()}, nil); err != nil {
		t.Fatal(err)
	}
	if got := c.Wait().ExitCode(); got != 3 {
		t.Errorf("exit code %d, want 3", got)
	}
}

func TestBadRequests(t *testing.T) {
	for name, req := range map[string]*rpc.CriuReq{
		"nil":     nil,
		"no type": {},
		"no pid":  {Type: dump.Enum(), Opts: &rpc.CriuOpts{}},
	} {
		t.Run(name, func(t *testing.T) {
			nothingLeft(t)
			if _, err := criurpc.Run(t.Context(), pretend("dump"), req, nil); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestNoCRIU(t *testing.T) {
	nothingLeft(t)
	_, err := criurpc.Run(t.Context(), criurpc.Config{Path: filepath.Join(t.TempDir(), "criu")}, dumpRequest("/"), nil)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error: %v", err)
	}
}

func TestQueriesExtFilesNot(t *testing.T) {
	nothingLeft(t)
	if got, err := criurpc.QueriesExtFiles(t.Context(), pretend("old")); got || err != nil {
		t.Errorf("a CRIU that does not ask: %v, %v", got, err)
	}
	if got, err := criurpc.QueriesExtFiles(t.Context(), pretend("unable")); got || !errors.Is(err, unix.ESRCH) {
		t.Errorf("a CRIU that cannot dump: %v, %v", got, err)
	}
}
