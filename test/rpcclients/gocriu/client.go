// SPDX-License-Identifier: Apache-2.0

// Package gocriu is a client of CRIU's RPC on go-criu: it starts "criu swrk" and
// says what it is told and what comes back, so that two CRIUs can be compared.
package gocriu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	criu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// Role is the first argument that makes a test binary this client.
const Role = "criuhook-test-gocriu"

// Main runs the client if the process was started as one, and then does not
// return. Arguments: Role, the path of CRIU, and
//
//	version
//	dump DIR PID [leave] [notify] [fail=STAGE]
//	predump DIR PID
//	restore DIR [notify] [fail=STAGE]
func Main() {
	bridgeMain()
	if len(os.Args) < 4 || os.Args[1] != Role {
		return
	}
	if err := run(os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("done")
	os.Exit(0)
}

func run(path, verb string, args []string) error {
	c := criu.MakeCriu()
	c.SetCriuPath(path)
	if verb == "version" {
		v, err := c.GetCriuVersion()
		fmt.Println("version", v)
		return err
	}
	dir, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer dir.Close()
	opts := &rpc.CriuOpts{ImagesDirFd: proto.Int32(int32(dir.Fd())), LogLevel: proto.Int32(4), LogFile: proto.String("criu.log")}
	args = args[1:]
	if verb != "restore" {
		pid, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		opts.Pid = proto.Int32(int32(pid))
		args = args[1:]
	}
	var notify criu.Notify
	for _, a := range args {
		switch {
		case a == "leave":
			opts.LeaveRunning = proto.Bool(true)
		case a == "notify":
			notify = &told{}
		case strings.HasPrefix(a, "fail="):
			notify = &told{fail: strings.TrimPrefix(a, "fail=")}
		default:
			return fmt.Errorf("what is %q?", a)
		}
	}
	switch verb {
	case "dump":
		return c.Dump(opts, notify)
	case "predump":
		opts.TrackMem = proto.Bool(true)
		return c.PreDump(opts, notify)
	case "restore":
		return c.Restore(opts, notify)
	}
	return fmt.Errorf("what is %q?", verb)
}

// told prints notifications.
type told struct {
	fail string
}

func (n *told) say(stage string) error {
	fmt.Println("notify", stage)
	if n.fail == stage {
		return fmt.Errorf("%s fails, as it was told to", stage)
	}
	return nil
}

func (n *told) PreDump() error              { return n.say("pre-dump") }
func (n *told) PostDump() error             { return n.say("post-dump") }
func (n *told) PreRestore() error           { return n.say("pre-restore") }
func (n *told) PostRestore(int32) error     { return n.say("post-restore") }
func (n *told) NetworkLock() error          { return n.say("network-lock") }
func (n *told) NetworkUnlock() error        { return n.say("network-unlock") }
func (n *told) SetupNamespaces(int32) error { return n.say("setup-namespaces") }
func (n *told) PostSetupNamespaces() error  { return n.say("post-setup-namespaces") }
func (n *told) PostResume() error           { return n.say("post-resume") }
