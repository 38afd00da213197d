// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/restore"
	"criuhook/criuhook/swrk"
	"criuhook/sockpeer"
	"criuhook/sockpeer/child"
)

// RelayVerb is the hidden verb of this program that runs a [Relay].
const RelayVerb = "relay"

// Descriptors that the process of a Relay has.
const (
	relayClient = 3 // the connection to the client
	relayBoot   = 4 // to the process that becomes CRIU
	relayPIDFD  = 5 // of that process
)

// swrk becomes CRIU that works for the client at a socket of ours. What takes
// part in the conversation is a process of its own, and not a child: CRIU keeps our
// pid and our parent, whose children it may restore (rst_sibling), and has no
// child that it does not know of. Requests that we have no part in go to CRIU at
// once.
func (c *Call) swrk(cmd *Command) (exit int) {
	first, ok := peek(cmd.SwrkFD, 0)
	if !ok || !takesPart(first) {
		c.refuse(cmd, first, c.become(c.Args))
		return exitFailed
	}
	if first.GetType() == rpc.CriuReqType_RESTORE {
		c.stepAside(cmd.SwrkFD, first.GetOpts())
	}
	boot, err := c.startRelay(cmd)
	if err == nil {
		err = c.turn(cmd, boot)
	}
	if errors.Is(err, errUnwanted) {
		return exitUnwanted
	}
	c.refuse(cmd, first, err)
	if errors.Is(err, errNoRelay) {
		return exitUnwanted
	}
	return exitFailed
}

// exitUnwanted is CRIU's exit status when its client has gone without another
// request.
const exitUnwanted = 255

// errUnwanted: the client has gone before it wanted a CRIU of its own.
var errUnwanted = errors.New("the client is gone")

// peek waits for the first request, as CRIU does, unless flags are MSG_DONTWAIT,
// and leaves it there.
func peek(fd, flags int) (*rpc.CriuReq, bool) {
	var size int
	for {
		var err error
		size, _, _, _, err = unix.Recvmsg(fd, nil, nil, flags|unix.MSG_PEEK|unix.MSG_TRUNC)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return nil, false
		}
	}
	b := make([]byte, size)
	n, _, _, _, err := unix.Recvmsg(fd, b, nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	req := &rpc.CriuReq{}
	if err != nil || proto.Unmarshal(b[:n], req) != nil {
		return nil, false
	}
	return req, true
}

// takesPart reports whether we have a part in a request, or in one that may follow
// it on the same connection (chk_keepopen_req and pre_dump_loop in
// criu/cr-service.c).
func takesPart(req *rpc.CriuReq) bool {
	switch req.GetType() {
	case rpc.CriuReqType_DUMP, rpc.CriuReqType_RESTORE, rpc.CriuReqType_PRE_DUMP:
		return true
	}
	return req.GetKeepOpen()
}

// stepAside keeps processes of ours off the pids that are to be restored.
func (c *Call) stepAside(fd int, opts *rpc.CriuOpts) {
	dir := opts.GetImagesDir()
	if n := opts.GetImagesDirFd(); n != -1 {
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		dir = fmt.Sprintf("/proc/%d/fd/%d", cred.Pid, n)
	}
	// What is wrong with the images is for the Relay to say.
	if r, err := restore.Open(dir, c.Log, nil); err == nil {
		r.StepAside(c.Again)
	}
}

// startRelay starts the process of the Relay and returns our end of a connection
// to it.
func (c *Call) startRelay(cmd *Command) (boot int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socketpair: %w", err)
	}
	defer unix.Close(pair[1])
	if err := c.startRelayAt(cmd, pair[1]); err != nil {
		unix.Close(pair[0])
		return -1, err
	}
	return pair[0], nil
}

func (c *Call) startRelayAt(cmd *Command, boot int) error {
	pid := os.Getpid()
	null, pidfd, err := openForOrphan(pid)
	if err != nil {
		return err
	}
	defer null.Close()
	defer unix.Close(pidfd)
	args := append([]string{"criuhook", RelayVerb, "--criu", c.CRIU, "--arg0", c.Arg0, "--criu-pid", strconv.Itoa(pid), "--"}, cmd.Options()...)
	env := os.Environ()
	if sockpeer.Elevated() {
		env = nil // it is somebody else's
	}
	fd := int(null.Fd())
	_, err = child.Orphan("/proc/self/exe", args, env, []int{fd, fd, fd, cmd.SwrkFD, boot, pidfd})
	return err
}

// turn waits until the Relay wants a CRIU, and becomes it.
func (c *Call) turn(cmd *Command, boot int) error {
	order, fds, err := receiveOrder(boot)
	if err != nil {
		return err
	}
	switch {
	case order.Err != "":
		return fmt.Errorf("%w: %s; see to that, and try again", errNoRelay, order.Err)
	case order.Over:
		return errUnwanted
	case len(fds) == 0:
		return fmt.Errorf("%w: the process that was to has ended without a word; look in the kernel's log whether it was killed, and try again, or let the client call %s itself", errNoRelay, c.CRIU)
	}
	// The client's connection is the Relay's alone from now on.
	if err := unix.Dup3(fds[0], cmd.SwrkFD, 0); err != nil {
		return c.failed(boot, fmt.Errorf("put CRIU's socket to fd %d: %w", cmd.SwrkFD, err))
	}
	used := slices.Concat(order.Used, cmd.FDs)
	var reply reply
	for _, fd := range fds[1:] {
		n, err := handOn(fd, used)
		if err != nil {
			return c.failed(boot, err)
		}
		reply.FDs = append(reply.FDs, n)
	}
	if err := sendTo(boot, &reply); err != nil { // and with it goes the client's connection
		c.Log.Errorf("%v: the process that does ended before there was a CRIU: %v", errNoRelay, err)
		return errUnwanted
	}
	swrk.RaiseLimit(len(reply.FDs))
	return c.failed(boot, c.become(c.Args)) // boot is closed when this succeeds
}

// failed tells the Relay, which has the client's connection and CRIU's log, and says
// it on stderr.
func (c *Call) failed(boot int, err error) error {
	c.Log.Error(err)
	_ = sendTo(boot, &reply{Err: err.Error()})
	return errUnwanted
}

// handOn gives a descriptor a number that survives exec, and that nobody uses.
func handOn(fd int, used []int) (int, error) {
	for from := fd; ; {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD, from)
		if err != nil {
			return 0, fmt.Errorf("hand a socket over to CRIU: %w", err)
		}
		if !slices.Contains(used, n) {
			return n, nil
		}
		unix.Close(n)
		from = n + 1
	}
}
