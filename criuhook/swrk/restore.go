// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/restore"
	"criuhook/criuhook/rule"
)

// Restore is a restore by RPC.
type Restore struct {
	Job
	// Rules reads the configuration, which images made without criuhook need.
	Rules func() (*rule.Set, error)
	// Detach makes the root task nobody's child, else it is ours.
	Detach bool
	// InPlace leaves all connections to be made when their processes exist:
	// these join namespaces that CRIU alone knows.
	InPlace bool
	// Leave are keys of sockets that CRIU's options give to it already.
	Leave []string
	// ExtUnixSk: CRIU's options tell it to connect external sockets.
	ExtUnixSk bool
	// Again executes this program anew, if it was not already; it is called while
	// nothing is done. nil: it is not to be.
	Again func() error
}

// Run restores and returns the pid of the root task. A signal stops it as long
// as nothing is restored; one that comes later stays in the channel.
func (r *Restore) Run(ctx context.Context, signals chan os.Signal) (pid int, err error) {
	f, err := r.open()
	if err != nil {
		return 0, err
	}
	defer f.close()
	h := &restoring{Restore: r, folders: f}
	if h.plan, err = restore.Open(f.imagesPath(), r.Log, r.Rules); err != nil {
		return 0, err
	}
	h.plan.StepAside(r.Again)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	go stopBy(signals, done, cancel)

	req := r.request(rpc.CriuReqType_RESTORE, f)
	req.Opts.RstSibling = proto.Bool(!r.Detach)
	files, err := h.inherit(ctx, req.Opts)
	defer closeAll(files) // after a failure; else it is done already
	if err != nil {
		return 0, err
	}
	handed := files
	if len(r.Keep) > 0 {
		handed = nil // they are among these
	}
	RaiseLimit(len(files))
	if h.criu, err = criurpc.Start(r.config(f, handed)); err != nil {
		return 0, err
	}
	defer h.criu.Close()
	defer r.CRIULog.Detach()
	closeAll(files) // ours would keep a connection open that the application closes
	resp, err := h.criu.Do(ctx, req, h)
	if resp.GetSuccess() {
		return int(resp.GetRestore().GetPid()), nil // what came too late to matter
	}
	return 0, err
}

// stopBy cancels at the first signal.
func stopBy(signals chan os.Signal, done <-chan struct{}, cancel context.CancelCauseFunc) {
	select {
	case sig := <-signals:
		cancel(fmt.Errorf("stopped by signal: %v", sig))
		signals <- sig // if the tree is there in spite of it, it is for the tree
	case <-done:
	}
}

// RaiseLimit lets CRIU open its libraries beside n inherited descriptors.
func RaiseLimit(n int) {
	var limit syscall.Rlimit
	if n == 0 || syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	limit.Cur = limit.Max
	// Go has done so for itself when it started. Set by the program, it is no
	// longer undone for children (origRlimitNofile in package syscall).
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// restoring answers CRIU.
type restoring struct {
	*Restore
	folders
	plan *restore.Restore
	criu *criurpc.Client
}

// inherit makes the sockets that CRIU is to use, and tells it of them.
func (h *restoring) inherit(ctx context.Context, opts *rpc.CriuOpts) (files []*os.File, err error) {
	if h.InPlace {
		return nil, nil
	}
	for _, key := range h.Leave {
		h.plan.Leave(key)
	}
	if h.ExtUnixSk {
		h.plan.LeaveDatagrams()
	}
	socks, err := h.plan.Inherit(ctx)
	if err != nil {
		return nil, err
	}
	// A duplicate, for the file to own. Beside descriptors that keep their numbers
	// in CRIU ours keep theirs, too, behind those.
	how, from, keeps := unix.F_DUPFD_CLOEXEC, 0, slices.Clone(h.Keep)
	if len(keeps) > 0 {
		how, from = unix.F_DUPFD, slices.Max(keeps)+1
	}
	var errs []error
	for _, s := range socks {
		fd, err := unix.FcntlInt(uintptr(s.Socket.FD()), how, from)
		s.Socket.Close()
		if err != nil {
			errs = append(errs, fmt.Errorf("duplicate %s: %w", s.Socket.Name(), err))
			continue
		}
		in := criurpc.InheritFd(len(files), s.Key)
		if len(keeps) > 0 {
			in.Fd = proto.Int32(int32(fd))
			keeps = append(keeps, fd)
			h.Keep = keeps
		}
		opts.InheritFd = append(opts.InheritFd, in)
		files = append(files, os.NewFile(uintptr(fd), s.Key))
	}
	return files, errors.Join(errs...)
}

// Notify connects what is still unconnected, before anything runs.
func (h *restoring) Notify(ctx context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
	h.CRIULog.Attach(h.criu.PID(), h.logPath(h.folders), false)
	if n.Stage != criurpc.StagePostRestore {
		return nil, nil
	}
	err := h.plan.Reconnect(ctx, n.PID)
	if err != nil && h.CRIULog != nil {
		fmt.Fprintln(h.CRIULog, "criuhook: Error:", err)
	}
	return nil, err
}
