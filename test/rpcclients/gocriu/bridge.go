// SPDX-License-Identifier: Apache-2.0

package gocriu

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// BridgeVariable makes a test binary that is called as "criu swrk FD" a bridge to
// the service at this socket: go-criu's client knows no other way to one.
const BridgeVariable = "CRIUHOOK_TEST_BRIDGE"

func bridgeMain() {
	socket := os.Getenv(BridgeVariable)
	if socket == "" || len(os.Args) != 3 || os.Args[1] != "swrk" {
		return
	}
	if err := bridge(os.Args[2], socket); err != nil {
		fmt.Fprintln(os.Stderr, "bridge:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// bridge lets messages pass, one by one, as the protocol has them.
func bridge(number, socket string) error {
	fd, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	service, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return err
	}
	defer service.Close()
	b := make([]byte, 1<<16)
	for {
		n, err := unix.Read(fd, b)
		if err != nil || n == 0 {
			return err // the client has what it wanted
		}
		req := &rpc.CriuReq{}
		if err := proto.Unmarshal(b[:n], req); err != nil {
			return err
		}
		if opts := req.GetOpts(); opts.GetImagesDirFd() > 0 {
			// The number is the client's: the service looks it up in us.
			dir, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", cred.Pid, opts.GetImagesDirFd()))
			if err != nil {
				return err
			}
			defer dir.Close()
			opts.ImagesDirFd = proto.Int32(int32(dir.Fd()))
		}
		out, err := proto.Marshal(req)
		if err != nil {
			return err
		}
		if _, err := service.Write(out); err != nil {
			return err
		}
		if n, err = service.Read(b); err != nil {
			return err
		}
		if _, err := unix.Write(fd, b[:n]); err != nil {
			return err
		}
	}
}
