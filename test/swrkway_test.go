// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dropin"
)

// swrkRole is how the test binary is called to be a client of "criu swrk":
//
//	swrkRole CRIU dump|restore OPTIONS…
//
// CRIU's options go to its command line, as "criu OPTIONS swrk FD" has them. Of
// notifications this client knows nothing.
const swrkRole = "criuhook-test-swrk"

// alsoSwrk are the tests that run by swrk, too: each kind of scenario once.
var alsoSwrk = []string{
	"TestRoundTrip", "TestTenCycles", "TestPairs", "TestOptions", "TestDatagram", "TestSeqpacket", "TestMixed", "TestManyConnections",
	"TestRefuse", "TestBadRules", "TestHangup", "TestBusyWait", "TestBlockedForAnswer", "TestUnreadBytes", "TestUnaccepted",
	"TestDumpFailsOtherwise", "TestFailedDumpSparesEarlierImages", "TestPeerPID", "TestPeerCredentials",
	"TestInheritedPID", "TestInheritedBySomebodyElse", "TestInheritedFewFiles", "TestInheritedJoinsNamespace",
	"TestOwnNetworkNamespace", "TestOwnNetworkNamespaceThrice", "TestOwnPIDNamespace", "TestElsewhere", "TestRestoreElsewhere",
	"TestCacheUnlinkedBeforeTheDump", "TestSSSDIdle", "TestNoRecord", "TestOldCRIU",
}

func init() {
	if len(os.Args) > 2 && os.Args[1] == swrkRole {
		if err := swrkClient(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// swrkClient does what CRIU's command line says, by RPC.
func swrkClient(criu string, args []string) error {
	line := dropin.Parse(args, dropin.System())
	if line.PassOn != "" {
		return errors.New(line.PassOn)
	}
	images, err := os.Open(line.ImagesDir)
	if err != nil {
		return err
	}
	work := images
	if line.WorkDir != "" {
		if work, err = os.Open(line.WorkDir); err != nil {
			return err
		}
	}
	req := &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{
		ImagesDirFd: proto.Int32(int32(images.Fd())),
		WorkDirFd:   proto.Int32(int32(work.Fd())),
		LogLevel:    proto.Int32(line.LogLevel),
	}}
	if line.Name == "restore" {
		req.Type = rpc.CriuReqType_RESTORE.Enum()
		req.Opts.RstSibling = proto.Bool(!line.Detach)
	} else {
		req.Opts.Pid = proto.Int32(int32(line.Tree))
	}
	resp, err := criurpc.Run(context.Background(), criurpc.Config{
		Path: criu, Arg0: "criu", Args: line.Options(), Keep: line.FDs,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	}, req, nil)
	if err != nil || line.Name != "restore" || line.Detach {
		return err
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(int(resp.GetRestore().GetPid()), &ws, 0, nil); err != nil {
		return fmt.Errorf("wait for the restored process: %w", err)
	}
	if ws.Signaled() {
		os.Exit(128 + int(ws.Signal()))
	}
	os.Exit(ws.ExitStatus())
	return nil
}

// swrk is the command of a client of our "criu swrk".
func swrk(args ...string) command {
	self, err := os.Executable()
	if err != nil {
		panic(err) // /proc is not mounted
	}
	return command{bySwrk, self, append([]string{self, swrkRole, criuhook}, args...)}
}

// bySwrkToo adds that way to the others, for the tests that are to have it.
func bySwrkToo(name string, of []way) []way {
	test, _, _ := strings.Cut(name, "/")
	if os.Getenv("CRIUHOOK_TEST_SWRK") == "all" && slices.Contains(of, byDropin) || slices.ContainsFunc(alsoSwrk, func(s string) bool { return s == test }) {
		return append(slices.Clone(of), bySwrk)
	}
	return of
}
