// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/restore"
)

// restoring is our part in a restore.
type restoring struct {
	x     *exchange
	plan  *restore.Restore
	first int        // place of the first socket in Job.Files
	keys  []string   // CRIU's names of the sockets
	files []*os.File // the sockets, until CRIU has them
}

// newRestoring makes the sockets that are inherited, if CRIU can be given any. The
// error is for the first notification to tell.
func newRestoring(x *exchange) (part, error) {
	if x.dirs.images == nil {
		return nil, fmt.Errorf("open the images directory that process %d asks to restore: %w", x.Peer.PID, x.dirs.err)
	}
	r := &restoring{x: x}
	if err := x.files(func() (err error) {
		r.plan, err = restore.Open(path(x.dirs.images), x.Log, x.Rules)
		return err
	}); err != nil {
		return nil, err
	}
	r.plan.StepAside(nil)
	opts := x.req.GetOpts()
	for _, key := range x.Inherits {
		r.plan.Leave(key)
	}
	for _, in := range opts.GetInheritFd() {
		r.plan.Leave(in.GetKey())
	}
	if x.ExtUnixSk || opts.GetExtUnixSk() {
		r.plan.LeaveDatagrams()
	}
	if !x.fresh || x.JoinsNS || len(opts.GetJoinNs()) > 0 {
		return r, nil // at post-restore, all of them
	}
	return r, r.inherit()
}

func (r *restoring) inherit() error {
	socks, err := r.plan.Inherit(r.x.ctx)
	if err != nil {
		return err
	}
	r.first = len(r.x.job.Files)
	var errs []error
	for _, s := range socks {
		// A duplicate, for the file to own.
		fd, err := unix.FcntlInt(uintptr(s.Socket.FD()), unix.F_DUPFD_CLOEXEC, 0)
		s.Socket.Close()
		if err != nil {
			errs = append(errs, fmt.Errorf("duplicate %s: %w", s.Socket.Name(), err))
			continue
		}
		r.keys = append(r.keys, s.Key)
		r.files = append(r.files, os.NewFile(uintptr(fd), s.Key))
	}
	r.x.job.Files = append(r.x.job.Files, r.files...)
	return errors.Join(errs...)
}

func (r *restoring) started(int) error {
	opts := r.x.req.GetOpts()
	for i, key := range r.keys {
		n := int32(r.x.worker.FD(r.first + i))
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: proto.String(key), Fd: proto.Int32(n)})
	}
	r.close() // ours would keep a connection open that the application closes
	return nil
}

func (r *restoring) close() {
	closeAll(r.files)
	r.files = nil
}

func (r *restoring) before(ctx context.Context, resp *rpc.CriuResp) error {
	if criurpc.Stage(resp.GetNotify().GetScript()) != criurpc.StagePostRestore {
		return nil
	}
	if err := r.x.inPlace(); err != nil {
		return err
	}
	return r.plan.Reconnect(ctx, int(resp.GetNotify().GetPid()))
}

func (r *restoring) after(context.Context, *rpc.CriuResp) ([]string, error) { return nil, nil }

func (r *restoring) ended(*rpc.CriuResp) { r.close() }
