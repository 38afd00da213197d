// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// Dump a process and let it run on, with one unix socket declared external
// while the process is frozen. Ctrl-C stops the dump without harm to it.
func Example() {
	const pid, inode = 4711, 123456
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	images, err := os.Open("/var/lib/checkpoints/4711")
	if err != nil {
		log.Fatal(err)
	}
	defer images.Close() // CRIU opens it by its number here: not before the end

	_, err = criurpc.Run(ctx, criurpc.Config{}, &rpc.CriuReq{
		Type: rpc.CriuReqType_DUMP.Enum(),
		Opts: &rpc.CriuOpts{
			Pid:          proto.Int32(pid),
			ImagesDirFd:  proto.Int32(int32(images.Fd())),
			LogFile:      proto.String("dump.log"),
			LogLevel:     proto.Int32(4),
			LeaveRunning: proto.Bool(true),
		},
	}, criurpc.HandlerFunc(func(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
		if n.Stage == criurpc.StageQueryExtFiles {
			return criurpc.External(fmt.Sprintf("unix[%d]", inode)), nil
		}
		return nil, nil
	}))
	if err != nil {
		log.Fatalf("%+v", err) // with CRIU's last errors
	}
}

// Restore with a socket of ours in place of a dumped one.
func ExampleInheritFd() {
	const inode = 123456
	images, err := os.Open("/var/lib/checkpoints/4711")
	if err != nil {
		log.Fatal(err)
	}
	defer images.Close()
	socket := os.NewFile(9, "a connected socket")

	resp, err := criurpc.Run(context.Background(), criurpc.Config{Files: []*os.File{socket}}, &rpc.CriuReq{
		Type: rpc.CriuReqType_RESTORE.Enum(),
		Opts: &rpc.CriuOpts{
			ImagesDirFd: proto.Int32(int32(images.Fd())),
			LogFile:     proto.String("restore.log"),
			InheritFd:   []*rpc.InheritFd{criurpc.InheritFd(0, fmt.Sprintf("socket:[%d]", inode))},
		},
	}, nil)
	if err != nil {
		log.Fatalf("%+v", err)
	}
	fmt.Println("restored as process", resp.GetRestore().GetPid())
}

// Ask CRIU what it is.
func ExampleClient_Version() {
	criu, err := criurpc.Start(criurpc.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer criu.Close()
	v, err := criu.Version(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("CRIU %d.%d\n", v.GetMajorNumber(), v.GetMinorNumber())
}
