// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// errTooLarge: a message is larger than allowed. It has been taken off the queue.
var errTooLarge = errors.New("the message is too large")

// receive waits for one message. io.EOF: the client has closed its end. Files
// that come along are lost, as with CRIU.
func receive(c *net.UnixConn, limit int) ([]byte, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var b []byte
	var got error
	err = raw.Read(func(fd uintptr) bool {
		b, got = receiveNow(int(fd), limit)
		return !errors.Is(got, unix.EAGAIN)
	})
	if err != nil {
		return nil, err
	}
	return b, got
}

// receiveAtOnce is receive without waiting: os.ErrDeadlineExceeded if nothing is
// there.
func receiveAtOnce(c *net.UnixConn, limit int) (b []byte, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if failed := raw.Control(func(fd uintptr) { b, err = receiveNow(int(fd), limit) }); failed != nil {
		return nil, failed
	}
	if errors.Is(err, unix.EAGAIN) {
		return nil, os.ErrDeadlineExceeded
	}
	return b, err
}

func receiveNow(fd, limit int) ([]byte, error) {
	// Without a buffer for control data the kernel passes no files on.
	size, err := recv(fd, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
	switch {
	case err != nil:
		return nil, err
	case size == 0: // CRIU takes an empty message for the end, too
		return nil, io.EOF
	case size > limit:
		_, _ = recv(fd, nil, unix.MSG_TRUNC) // away with it
		return nil, fmt.Errorf("%w: %d bytes, at most %d are taken (service: message)", errTooLarge, size, limit)
	}
	b := make([]byte, size)
	n, err := recv(fd, b, unix.MSG_TRUNC)
	if err != nil {
		return nil, err
	}
	if n != size {
		return nil, fmt.Errorf("receive a message of %d bytes: got %d", size, n)
	}
	return b, nil
}

func recv(fd int, b []byte, flags int) (int, error) {
	for {
		n, _, _, _, err := unix.Recvmsg(fd, b, nil, flags|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if errors.Is(err, unix.ECONNRESET) {
			return 0, nil // closed, with something of ours unread
		}
		return n, err
	}
}

// send sends one message, and does not wait for a client that reads nothing.
func send(c *net.UnixConn, resp *rpc.CriuResp) error {
	b, err := proto.Marshal(resp)
	if err != nil {
		return fmt.Errorf("encode an answer: %w", err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		for {
			_, sent = unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if sent != unix.EINTR {
				return
			}
		}
	})
	if err = errors.Join(err, sent); err != nil {
		return fmt.Errorf("send an answer: %w", err)
	}
	return nil
}

// Decode reads a request. Fields that it does not know are kept. The error is
// for the client: CRIU itself closes the connection without a word.
func Decode(b []byte) (*rpc.CriuReq, error) {
	req := &rpc.CriuReq{}
	if err := proto.Unmarshal(b, req); err != nil {
		return nil, fmt.Errorf("%d bytes that are no request of CRIU's RPC: %w", len(b), err)
	}
	return req, nil
}

// Refusal is an answer to a request that is not carried out.
type Refusal struct {
	Errno syscall.Errno
	Text  string
}

func (e *Refusal) Error() string { return e.Text }

// Unwrap gives the errno.
func (e *Refusal) Unwrap() error { return e.Errno }

func refuse(errno syscall.Errno, format string, args ...any) *Refusal {
	return &Refusal{errno, fmt.Sprintf(format, args...)}
}

// Answer is the answer to a request of that type that failed.
func Answer(kind rpc.CriuReqType, err error) *rpc.CriuResp {
	errno := unix.EBADMSG
	var e syscall.Errno
	if errors.As(err, &e) && e != 0 {
		errno = e
	}
	return criurpc.Failure(kind, errno, "criuhook: "+err.Error())
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
