// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// MaxMessage is the size in bytes of the largest message taken from CRIU.
const MaxMessage = 64 << 20

// maxFiles is SCM_MAX_FD of the kernel's include/net/scm.h.
const maxFiles = 253

// ErrProtocol: what was at the other end did not talk as CRIU does.
var ErrProtocol = errors.New("not CRIU's RPC protocol")

// errTimeout: no message came until the deadline.
var errTimeout = errors.New("no message came in time")

// conn is our end of the socketpair.
type conn struct {
	file *os.File
	raw  syscall.RawConn
}

// pair makes a socketpair: our end, and the one for CRIU.
func pair() (*conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "criu's end of its RPC socket")
	// Of our end only: CRIU reads its own blocking.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make a socket non-blocking: %w", err)
	}
	file := os.NewFile(uintptr(fds[0]), "criu RPC socket")
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		_ = theirs.Close()
		return nil, nil, err
	}
	return &conn{file: file, raw: raw}, theirs, nil
}

func (c *conn) close() error { return c.file.Close() }

// setDeadline is for receive; the past wakes one that waits.
func (c *conn) setDeadline(t time.Time) { _ = c.file.SetReadDeadline(t) }

// hangUp tells CRIU that nothing more will come; we can still receive.
func (c *conn) hangUp() {
	_ = c.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
}

// send sends one message. It never waits: CRIU has read the last one before
// it answered that, so the queue is empty.
func (c *conn) send(req *rpc.CriuReq) error {
	b, err := proto.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	var sendErr error
	err = c.raw.Control(func(fd uintptr) {
		sendErr = sendPacket(int(fd), b)
		if errors.Is(sendErr, unix.EMSGSIZE) && Enlarge(int(fd), len(b)) {
			sendErr = sendPacket(int(fd), b)
		}
	})
	if err = errors.Join(err, sendErr); errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		return fmt.Errorf("send %d bytes to CRIU: %w: give CAP_NET_ADMIN, raise net.core.wmem_max, or send less",
			len(b), err)
	} else if err != nil {
		return fmt.Errorf("send to CRIU: %w", err)
	}
	return nil
}

func sendPacket(fd int, b []byte) error {
	for {
		_, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err
		}
	}
}

// Enlarge raises a socket's send buffer for a packet of size bytes, for which
// sendmsg(2) has failed with EMSGSIZE; the kernel counts its own overhead too. It
// reports whether it could.
func Enlarge(fd, size int) bool {
	size += size/4 + 64<<10
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size) == nil ||
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size) == nil
}

// receive waits for one message. The errors are io.EOF when CRIU has closed
// its end, errTimeout, ErrProtocol, or of the kernel.
func (c *conn) receive() (*rpc.CriuResp, []*os.File, error) {
	var b []byte
	var files []*os.File
	var err error
	ready := func(fd uintptr) bool {
		b, files, err = receivePacket(int(fd))
		return err != unix.EAGAIN
	}
	if waitErr := c.raw.Read(ready); errors.Is(waitErr, os.ErrDeadlineExceeded) {
		// Go looks at the deadline first: what has come already still counts.
		taken := false
		waitErr = c.raw.Control(func(fd uintptr) { taken = ready(fd) })
		if waitErr == nil && !taken {
			return nil, nil, errTimeout
		}
		err = errors.Join(waitErr, err)
	} else if waitErr != nil {
		err = waitErr
	}
	if err != nil {
		return nil, nil, err
	}
	resp, err := decode(b)
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return resp, files, nil
}

func receivePacket(fd int) ([]byte, []*os.File, error) {
	size, _, _, err := recvmsg(fd, nil, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
	if err != nil {
		return nil, nil, err
	}
	if size == 0 { // CRIU has no empty message: it takes one for the end, too
		return nil, nil, io.EOF
	}
	if size > MaxMessage {
		return nil, nil, fmt.Errorf("%w: a message of %d bytes, more than %d", ErrProtocol, size, MaxMessage)
	}
	b := make([]byte, size)
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, err := recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	files, err := filesOf(oob[:oobn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("%w: a truncated message", ErrProtocol)
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return b[:n], files, nil
}

func recvmsg(fd int, b, oob []byte, flags int) (n, oobn, got int, err error) {
	for {
		n, oobn, got, _, err = unix.Recvmsg(fd, b, oob, flags|unix.MSG_DONTWAIT)
		// ECONNRESET: CRIU has closed its end and left something of ours unread.
		// The kernel says so once; its last words may still come.
		if err != unix.EINTR && err != unix.ECONNRESET {
			return n, oobn, got, err
		}
	}
}

// filesOf takes the files out of control data. What it returns with an error
// is open, too.
func filesOf(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: control data: %w", ErrProtocol, err)
	}
	var files []*os.File
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(m)
		if err != nil {
			return files, fmt.Errorf("%w: control data: %w", ErrProtocol, err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received from CRIU"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// decode reads a message of CRIU's. Fields it does not know are kept.
func decode(b []byte) (*rpc.CriuResp, error) {
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(b, resp); err != nil {
		return nil, fmt.Errorf("%w: %d bytes that are no CriuResp: %w", ErrProtocol, len(b), err)
	}
	if resp.GetType() == rpc.CriuReqType_NOTIFY && resp.GetNotify().GetScript() == "" {
		return nil, fmt.Errorf("%w: a notification without a name", ErrProtocol)
	}
	return resp, nil
}
