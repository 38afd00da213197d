// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/relay"
)

// errNoRelay: what a client asks of CRIU cannot be passed on.
var errNoRelay = errors.New("take part in what CRIU's RPC is asked for")

// refuse says why there will be no CRIU for a client of swrk: on stderr, where its log
// was to be, and to the client, if it waits for an answer.
func (c *Call) refuse(cmd *Command, first *rpc.CriuReq, why error) {
	name, done := cmd.logOf(first.GetOpts())
	defer done()
	c.failAt(name, why)
	if req, ok := peek(cmd.SwrkFD, unix.MSG_DONTWAIT); ok {
		answerFailure(cmd.SwrkFD, req.GetType(), why)
	}
}

// logOf is where CRIU would log what it does for a client of swrk
// (setup_opts_from_req in criu/cr-service.c); "": that is not known. done lets go of
// the directory.
func (c *Command) logOf(opts *rpc.CriuOpts) (name string, done func()) {
	none := func() {}
	name = cmp.Or(opts.GetLogFile(), c.LogFile)
	switch {
	case opts == nil, opts.ConfigFile != nil, name == "-",
		opts.GetLogFile() == "" && opts.GetLogToStderr(), strings.Contains(opts.GetLogFile(), "/"):
		return "", none
	case filepath.IsAbs(name):
		return name, none
	}
	name = cmp.Or(name, "criu.log") // DEFAULT_LOG_FILENAME
	theirs := opts.WorkDirFd
	switch {
	case theirs != nil:
	case c.WorkDir != "":
		return filepath.Join(c.WorkDir, name), none
	case opts.GetImagesDirFd() != -1:
		theirs = opts.ImagesDirFd
	case opts.GetImagesDir() != "":
		return filepath.Join(opts.GetImagesDir(), name), none
	}
	if theirs == nil {
		return "", none
	}
	fd, err := unix.FcntlInt(uintptr(c.SwrkFD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return "", none
	}
	client := os.NewFile(uintptr(fd), "the client's connection")
	defer client.Close()
	peer, forget, err := relay.NewPeer(client)
	if err != nil {
		return "", none
	}
	defer forget()
	dir, err := peer.Open(int(*theirs))
	if err != nil {
		return "", none
	}
	return filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), name), func() { dir.Close() }
}

// answerFailure answers in the place of a CRIU that there will not be.
func answerFailure(fd int, kind rpc.CriuReqType, why error) {
	errno := unix.EIO
	errors.As(why, &errno)
	if b, err := proto.Marshal(criurpc.Failure(kind, errno, "criuhook: "+why.Error())); err == nil {
		// The request is taken, or the client finds ECONNRESET in place of the answer.
		_, _, _, _, _ = unix.Recvmsg(fd, make([]byte, 1), nil, unix.MSG_DONTWAIT)
		_ = unix.Sendmsg(fd, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	}
}
