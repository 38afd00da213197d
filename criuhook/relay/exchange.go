// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// exchange is one request on its way.
type exchange struct {
	*session
	req     *rpc.CriuReq // nil: it could not be understood
	raw     message      // as the client sent it
	changed bool         // req differs from raw
	notify  bool         // the client wants notifications
	fresh   bool         // a CRIU will be started for it
	part    part         // ours in it; nil: none, or no more
	open    []*os.File   // that req names, until CRIU has answered
	dirs    dirs
	job     Job
	failed  error // on our side
	told    bool  // CRIU knows
}

// part is what we do in a dump or a restore. Before comes before the client hears
// of a notification, after when it has agreed; what that returns is external.
type part interface {
	before(ctx context.Context, resp *rpc.CriuResp) error
	after(ctx context.Context, resp *rpc.CriuResp) (external []string, err error)
	// started: that CRIU will have the request. ended: it has answered so, or not
	// at all.
	started(criu int) error
	ended(resp *rpc.CriuResp)
}

func (x *exchange) kind() rpc.CriuReqType { return x.req.GetType() } // EMPTY if there is none

func (x *exchange) close() {
	open := x.open
	x.open = nil
	if d, ok := x.part.(*dumping); ok {
		if left := d.stages.Left(); left != nil {
			go func() {
				<-left
				closeAll(open)
			}()
			return
		}
	}
	closeAll(open)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// admit asks who decides about requests.
func (x *exchange) admit() error {
	if x.req == nil {
		return nil
	}
	if x.Check != nil {
		before := proto.CloneOf(x.req)
		if err := x.Check(x.req); err != nil {
			return err
		}
		x.changed = !proto.Equal(before, x.req)
	}
	if !x.Standalone {
		return nil
	}
	// Of its own worker, CRIU's service says so itself.
	opts := x.req.GetOpts()
	switch {
	case opts.GetInheritFd() != nil:
		return &bad{"inherit_fd is not allowed in standalone service"}
	case opts != nil && opts.RstSibling != nil:
		return &bad{"rst_sibling is not allowed in standalone service"}
	case opts.GetPs() != nil && opts.GetPs().Fd != nil && !opts.GetLazyPages():
		return &bad{"ps.fd is not allowed in standalone service"}
	}
	return nil
}

// bad are options that CRIU does not accept: its errno for that is EBADRQC.
type bad struct{ text string }

func (e *bad) Error() string { return e.text }
func (e *bad) Unwrap() error { return unix.EBADRQC }

// prepare completes the request. What goes wrong is for the first notification to
// tell.
func (x *exchange) prepare() {
	opts := x.req.GetOpts()
	x.job.WorkDir = -1
	if opts == nil {
		return
	}
	x.notify = opts.GetNotifyScripts()
	switch x.kind() {
	case rpc.CriuReqType_DUMP, rpc.CriuReqType_PRE_DUMP, rpc.CriuReqType_SINGLE_PRE_DUMP:
		if opts.Pid == nil { // itself; CRIU would take it for us
			opts.Pid = proto.Int32(int32(x.Peer.PID))
			x.changed = true
		}
	}
	w := x.worker
	x.fresh = w == nil || w.probe && !x.probes() || x.InheritDirs
	x.translate(opts)
	for _, in := range opts.GetInheritFd() {
		x.job.Used = append(x.job.Used, int(in.GetFd()))
	}
	if ps := opts.GetPs(); ps != nil && ps.Fd != nil {
		x.job.Used = append(x.job.Used, int(ps.GetFd()))
	}
	x.job.ExecCmd = len(opts.GetExecCmd()) > 0
	switch {
	case x.kind() == rpc.CriuReqType_DUMP && opts.GetPid() != 0:
		x.part, x.failed = newDumping(x)
	case x.kind() == rpc.CriuReqType_RESTORE:
		x.part, x.failed = newRestoring(x)
	default:
		return
	}
	opts.NotifyScripts = proto.Bool(true)
	x.changed = true
}

// probes reports whether a request is one after which CRIU may be asked for
// something else, and that leaves nothing behind in it.
func (x *exchange) probes() bool {
	switch x.kind() {
	case rpc.CriuReqType_VERSION, rpc.CriuReqType_FEATURE_CHECK, rpc.CriuReqType_CPUINFO_CHECK, rpc.CriuReqType_CPUINFO_DUMP:
		return x.req.GetKeepOpen()
	}
	return false
}

// mayContinue: CRIU may take another request after this one (chk_keepopen_req and
// pre_dump_loop in criu/cr-service.c).
func (x *exchange) mayContinue() bool {
	return x.req.GetKeepOpen() || x.kind() == rpc.CriuReqType_PRE_DUMP
}

// hire sees to it that a CRIU has the request.
func (x *exchange) hire() (err error) {
	s := x.session
	if s.worker != nil && (x.fresh || s.worker.probe && !x.probes()) {
		if err := s.dismiss(); err != nil {
			x.Log.Debugf("a CRIU that was only asked about itself: %v", err)
		}
	}
	if s.worker == nil {
		start, probe := s.Start, false
		if s.Probe != nil && x.probes() {
			start, probe = s.Probe, true
		}
		if s.worker, err = s.hire(start, x.job); err != nil {
			return err
		}
		s.worker.probe = probe
	}
	x.named()
	if x.part != nil {
		if err := x.part.started(s.worker.PID()); err != nil && x.failed == nil {
			x.failed = err
		}
	}
	m := x.raw
	if x.changed {
		b, err := proto.Marshal(x.req)
		if err != nil {
			return fmt.Errorf("encode the request: %w", err)
		}
		m.data = b
	}
	s.worker.running, s.worker.restore = true, x.kind() == rpc.CriuReqType_RESTORE
	if err := s.toCRIU(m); err != nil && !isGone(err) { // a CRIU that is gone may have left a word
		return fmt.Errorf("send the request to CRIU: %w", err)
	}
	return nil
}

// converse lets pass what the two say, up to the answer.
func (x *exchange) converse() (*rpc.CriuResp, error) {
	for {
		m, err := x.fromCRIU()
		if err != nil {
			x.finish(nil)
			return nil, err
		}
		resp := &rpc.CriuResp{}
		if err := proto.Unmarshal(m.data, resp); err != nil {
			resp = &rpc.CriuResp{} // whatever it is, the client is to see it
		}
		if resp.GetType() == rpc.CriuReqType_NOTIFY {
			x.notification(m, resp)
			m.close()
			continue
		}
		x.worker.running = false
		x.finish(resp)
		_ = x.toClient(m) // gone: nobody wants to know
		m.close()
		return resp, nil
	}
}

// notification has one answered.
func (x *exchange) notification(m message, resp *rpc.CriuResp) {
	x.attachLog()
	if err := x.before(resp); err != nil {
		x.answer(nil, err)
		return
	}
	var theirs *message
	switch {
	case x.notify:
		got, err := x.ask(m)
		if err != nil { // CRIU finds nobody, as without us
			x.worker.hangUp()
			return
		}
		defer got.close()
		reply := &rpc.CriuReq{}
		if err := proto.Unmarshal(got.data, reply); err != nil || reply.GetType() != rpc.CriuReqType_NOTIFY || !reply.GetNotifySuccess() {
			_ = x.toCRIU(got)
			return
		}
		if x.PlainAnswers && reply.Opts != nil {
			reply.Opts = nil
			got.data, _ = proto.Marshal(reply) // it was just decoded
		}
		theirs = &got
	case len(m.fds) > 0: // as where nobody asked for it, CRIU goes on without
		x.answer(nil, errNobody)
		return
	}
	external, err := x.after(resp)
	switch {
	case err != nil:
		x.answer(nil, err)
	case theirs != nil && len(external) == 0:
		_ = x.toCRIU(*theirs) // gone: the next receive tells
	case theirs != nil:
		reply := &rpc.CriuReq{}
		_ = proto.Unmarshal(theirs.data, reply) // it was possible before
		x.answer(reply, nil, external...)
	default:
		x.answer(nil, nil, external...)
	}
}

// errNobody: a notification that the client has not asked for carries a file.
var errNobody = errors.New("nobody takes the file")

// before does our part before the client's. Once it has failed, CRIU cleans up,
// and what it tells then is the client's again.
func (x *exchange) before(resp *rpc.CriuResp) error {
	if x.told {
		return nil
	}
	if x.failed == nil && x.part != nil {
		x.failed = x.part.before(x.ctx, resp)
	}
	return x.tell()
}

func (x *exchange) after(resp *rpc.CriuResp) (external []string, err error) {
	if x.told || x.part == nil {
		return nil, nil
	}
	external, x.failed = x.part.after(x.ctx, resp)
	return external, x.tell()
}

// tell says what went wrong, where people look for it.
func (x *exchange) tell() error {
	if x.failed == nil {
		return nil
	}
	x.told = true
	if x.CRIULog.Attached() {
		fmt.Fprintln(x.CRIULog, "criuhook: Error:", x.failed)
	}
	return x.failed
}

// answer answers CRIU; base is the client's answer, nil: none.
func (x *exchange) answer(base *rpc.CriuReq, failed error, external ...string) {
	if base == nil {
		base = &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(failed == nil)}
	}
	if len(external) > 0 {
		if base.Opts == nil { // images_dir_fd is required
			base.Opts = &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1)}
		}
		base.Opts.External = append(base.Opts.External, external...)
	}
	b, err := proto.Marshal(base)
	if err == nil {
		err = x.toCRIU(message{data: b})
	}
	if err != nil && !isGone(err) {
		x.worker.hangUp() // which CRIU takes for a no
	}
}

// ask passes a notification on and waits for the answer. It also ends when CRIU
// does.
func (x *exchange) ask(m message) (message, error) {
	if x.silent {
		return message{}, io.EOF
	}
	if err := x.toClient(m); err != nil {
		return message{}, err
	}
	for {
		fds := []unix.PollFd{{Fd: int32(x.fd), Events: unix.POLLIN}, {Fd: int32(x.worker.PIDFD()), Events: unix.POLLIN}, {Fd: int32(x.wake.fd), Events: unix.POLLIN}}
		if err := poll(fds, forever); err != nil {
			return message{}, err
		}
		got, err := receive(x.fd, x.most())
		switch {
		case err == nil:
			return got, nil
		case !errors.Is(err, unix.EAGAIN):
			x.silent = errors.Is(err, io.EOF)
			return message{}, err
		case fds[1].Revents != 0:
			return message{}, errEnded
		case x.ctx.Err() != nil:
			return message{}, context.Cause(x.ctx)
		case fds[2].Revents != 0:
			x.wake.heard()
		}
	}
}

// finish is the end of our part, before the client hears of it.
func (x *exchange) finish(resp *rpc.CriuResp) {
	if x.part != nil {
		x.part.ended(resp)
	}
}

// awaitEnd waits until CRIU has closed its end, or has ended: the client is to
// see that in this order, after the answer.
func (x *exchange) awaitEnd() {
	w := x.worker
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLRDHUP}, {Fd: int32(w.PIDFD()), Events: unix.POLLIN}}
	grace := x.Grace
	if grace <= 0 {
		grace = criurpc.DefaultGrace
	}
	_ = poll(fds, grace)
}

func (x *exchange) served(resp *rpc.CriuResp, err error) {
	if x.Served == nil {
		return
	}
	pid := int(x.req.GetOpts().GetPid())
	if resp.GetRestore() != nil {
		pid = int(resp.GetRestore().GetPid())
	}
	x.Served(Served{Type: x.kind(), PID: pid, Success: resp.GetSuccess(), Err: err})
}
