// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
)

// maxFiles is SCM_MAX_FD of the kernel's include/net/scm.h.
const maxFiles = 253

// Errors of a message that is not taken.
var (
	errTooLarge  = errors.New("the message is too large")
	errTruncated = errors.New("the message came truncated")
)

// message is one packet with the descriptors that came with it, which are ours
// to close.
type message struct {
	data []byte
	fds  []int
}

func (m *message) close() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.fds = nil
}

// receive takes a packet that is there. The errors are unix.EAGAIN, io.EOF when
// nothing more will come, those above, or of the kernel. An empty packet cannot
// be told from the end, and is taken for it by CRIU, too.
func receive(fd, most int) (message, error) {
	size, _, _, err := recvmsg(fd, nil, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
	switch {
	case err != nil:
		return message{}, err
	case size == 0:
		return message{}, io.EOF
	case size > most:
		// Taken, or the other end finds ECONNRESET in place of what it is answered.
		_, _, _, _ = recvmsg(fd, make([]byte, 1), nil, 0)
		return message{}, fmt.Errorf("%w: %d bytes, the most are %d", errTooLarge, size, most)
	}
	m := message{data: make([]byte, size)}
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, err := recvmsg(fd, m.data, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return message{}, err
	}
	m.data = m.data[:n]
	if m.fds, err = rights(oob[:oobn]); err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errTruncated
	}
	if err != nil {
		m.close()
		return message{}, err
	}
	return m, nil
}

func recvmsg(fd int, b, oob []byte, flags int) (n, oobn, got int, err error) {
	for {
		n, oobn, got, _, err = unix.Recvmsg(fd, b, oob, flags|unix.MSG_DONTWAIT)
		// ECONNRESET: the other end is closed and has left something of ours unread.
		// The kernel says so once; its last words may still come.
		if err != unix.EINTR && err != unix.ECONNRESET {
			return n, oobn, got, err
		}
	}
}

func rights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		some, err := unix.ParseUnixRights(m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, some...)
	}
	return fds, nil
}

// send sends a packet if there is room, else it fails with unix.EAGAIN.
func send(fd int, m message) error {
	var oob []byte
	if len(m.fds) > 0 {
		oob = unix.UnixRights(m.fds...)
	}
	err := sendmsg(fd, m.data, oob)
	if errors.Is(err, unix.EMSGSIZE) && criurpc.Enlarge(fd, len(m.data)) {
		err = sendmsg(fd, m.data, oob)
	}
	return err
}

func sendmsg(fd int, b, oob []byte) error {
	for {
		_, err := unix.SendmsgN(fd, b, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err
		}
	}
}

// isGone: the other end is closed.
func isGone(err error) bool {
	return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN)
}
