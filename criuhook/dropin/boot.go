// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// order is what a Relay tells the process that is to become CRIU: with it come the
// socket for swrk and what CRIU is to inherit.
type order struct {
	Used []int  // numbers not to be given to what is inherited
	More bool   // another order follows, with more of that
	Over bool   // there will be none: the conversation is over
	Err  string // and this is what went wrong
}

// reply is the answer: which numbers they have, or why there is no CRIU. That it
// is there, the end of the connection tells.
type reply struct {
	FDs []int
	Err string
}

// Bounds of one message.
const (
	maxRights = 253      // SCM_MAX_FD of the kernel's include/net/scm.h
	maxOrder  = 64 << 10 // bytes
)

func sendTo(sock int, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	for {
		err := unix.Sendmsg(sock, b, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}

// receiveFrom fails with io.EOF when the other end is closed.
func receiveFrom(sock int, v any) (fds []int, err error) {
	b, oob := make([]byte, maxOrder), make([]byte, unix.CmsgSpace(maxRights*4))
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(sock, b, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	switch {
	case errors.Is(err, unix.ECONNRESET), err == nil && n == 0:
		return nil, io.EOF
	case err != nil:
		return nil, err
	}
	if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for i := range messages {
			some, _ := unix.ParseUnixRights(&messages[i]) // nothing else is sent
			fds = append(fds, some...)
		}
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fds, unix.EMSGSIZE
	}
	return fds, json.Unmarshal(b[:n], v)
}

// receiveOrder collects what the Relay sends. No descriptors: it has ended, if it is
// not Over, without a word.
func receiveOrder(sock int) (all order, fds []int, err error) {
	for more := true; more; {
		var o order
		some, err := receiveFrom(sock, &o)
		switch {
		case errors.Is(err, io.EOF):
			return order{}, nil, nil
		case err != nil:
			return order{}, nil, fmt.Errorf("hear from the process that relays: %w", err)
		}
		all.Used, fds, more = append(all.Used, o.Used...), append(fds, some...), o.More
		all.Over, all.Err = o.Over, o.Err
	}
	return all, fds, nil
}
