// SPDX-License-Identifier: Apache-2.0

package dropin_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/dropin"
	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
)

// relayRole tells the process of the Relay, which is this program, what to do.
const relayRole = "CRIUHOOK_TEST_RELAY"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == dropin.RelayVerb {
		switch os.Getenv(relayRole) {
		case "relay", "order": // with a CRIU that is not there, or only for those who look
			criu := "/nowhere/criu"
			if os.Getenv(relayRole) == "order" {
				criu = "/proc/self/exe"
			}
			log := logrus.New()
			log.SetOutput(io.Discard)
			r := dropin.Relay{PID: os.Getppid(), CRIU: criu, Log: log, Rules: func() (*rule.Set, error) { return &rule.Set{}, nil }}
			_ = r.Run(context.Background())
		case "die":
		}
		os.Exit(3)
	}
	os.Exit(m.Run())
}

// talk calls swrk for a client that makes one request, and hangs up.
func talk(t *testing.T, role string, req *rpc.CriuReq) (exit int, said string, answers []*rpc.CriuResp) {
	t.Helper()
	t.Setenv(relayRole, role)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(pair[0], b, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		t.Fatal(err)
	}
	if err := unix.Shutdown(pair[0], unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	log, criuLog := logrus.New(), &swrk.CRIULog{}
	log.SetOutput(io.MultiWriter(&out, criuLog))
	call := dropin.Call{Arg0: "criu", Args: []string{"swrk", strconv.Itoa(pair[1])}, CRIU: "/nowhere/criu", Log: log, CRIULog: criuLog}
	exit = call.Run(t.Context())
	unix.Close(pair[1])
	for {
		b := make([]byte, 1<<16)
		n, err := unix.Read(pair[0], b)
		if err != nil || n == 0 {
			return exit, out.String(), answers
		}
		resp := &rpc.CriuResp{}
		if err := proto.Unmarshal(b[:n], resp); err != nil {
			t.Fatal(err)
		}
		answers = append(answers, resp)
	}
}

// TestRelayDies: what is behind "criu swrk FD" ends before it wants a CRIU. That is
// said on stderr, in what would be CRIU's log, and to the client.
func TestRelayDies(t *testing.T) {
	images, work := t.TempDir(), t.TempDir()
	open := func(name string) *int32 {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return proto.Int32(int32(f.Fd()))
	}
	const why = "has ended without a word"
	for _, c := range []struct {
		name string
		opts *rpc.CriuOpts
		log  string // "": none
	}{
		{"work directory", &rpc.CriuOpts{ImagesDirFd: open(images), WorkDirFd: open(work), LogFile: proto.String("dump.log")}, work + "/dump.log"},
		{"images directory, no name", &rpc.CriuOpts{ImagesDirFd: open(images)}, images + "/criu.log"},
		{"named directory", &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), ImagesDir: proto.String(images), LogFile: proto.String("x")}, images + "/x"},
		{"stderr", &rpc.CriuOpts{ImagesDirFd: open(images), LogToStderr: proto.Bool(true)}, ""},
		{"elsewhere", &rpc.CriuOpts{ImagesDirFd: open(images), LogFile: proto.String("../x")}, ""},
		{"no such descriptor", &rpc.CriuOpts{ImagesDirFd: proto.Int32(1 << 20)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			exit, said, answers := talk(t, "die", &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: c.opts})
			if exit != 255 || strings.Count(said, why) != 1 || !strings.Contains(said, "/nowhere/criu") {
				t.Errorf("exit %d, said: %s", exit, said)
			}
			if len(answers) != 1 || answers[0].GetType() != rpc.CriuReqType_DUMP || answers[0].GetSuccess() || !strings.Contains(answers[0].GetCrErrmsg(), why) {
				t.Errorf("the client got %v", answers)
			}
			var logs []string
			for _, dir := range []string{images, work} {
				names, err := filepath.Glob(dir + "/*")
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range names {
					b, err := os.ReadFile(name)
					if err != nil || !strings.Contains(string(b), why) {
						t.Errorf("%s: %q, %v", name, b, err)
					}
					logs = append(logs, name)
					os.Remove(name)
				}
			}
			if got := strings.Join(logs, " "); got != c.log {
				t.Errorf("logs %q, expected %q", got, c.log)
			}
		})
	}
}

// TestRelayFails: what went wrong in that process is said, too; its client has had
// its answer.
func TestRelayFails(t *testing.T) {
	exit, said, answers := talk(t, "relay", &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)})
	if exit != 255 || strings.Count(said, "VERSION: start /nowhere/criu as CRIU") != 1 {
		t.Errorf("exit %d, said: %s", exit, said)
	}
	if len(answers) != 1 || answers[0].GetType() != rpc.CriuReqType_VERSION || answers[0].GetSuccess() {
		t.Errorf("the client got %v", answers)
	}
}

// TestCRIUDoesNotStart: the Relay wants a CRIU, and there is none. It has the client's
// connection then, and answers; stderr says it, too.
func TestCRIUDoesNotStart(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	exit, said, answers := talk(t, "order", &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{ImagesDirFd: proto.Int32(int32(dir.Fd()))}})
	if exit != 255 || strings.Count(said, "/nowhere/criu") != 1 {
		t.Errorf("exit %d, said: %s", exit, said)
	}
	if len(answers) != 1 || answers[0].GetSuccess() || !strings.Contains(answers[0].GetCrErrmsg(), "/nowhere/criu") {
		t.Errorf("the client got %v", answers)
	}
}
