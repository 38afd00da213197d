// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// Do makes one request and waits for the answer. h answers the notifications;
// without one, each is answered as done, but for those that carry a file. For
// a dump or restore with a handler, or with a context that can end,
// notify_scripts is set.
//
// The answer is returned whenever CRIU gave one, also beside an error, which
// is an [*Error]. An error beside an answer with success tells that a
// notification failed at a stage where CRIU does not care.
//
// When ctx ends, CRIU is made to give up, see the package's comment, and Do
// returns when neither CRIU nor the socket is left.
//
// One request at a time: a second Do waits for the first. req is not changed.
func (c *Client) Do(ctx context.Context, req *rpc.CriuReq, h Handler) (*rpc.CriuResp, error) {
	r := &request{client: c, handler: h, op: describe(req)}
	if err := r.prepare(req, ctx.Done() != nil); err != nil {
		return nil, r.fail(err)
	}
	select {
	case c.busy <- struct{}{}:
		defer func() { <-c.busy }()
	case <-ctx.Done():
	}
	if ctx.Err() != nil { // also if both were ready
		return nil, r.fail(context.Cause(ctx))
	}
	log := c.findLog(r.req)
	if err := c.begin(r.req); err != nil {
		return nil, r.fail(err)
	}
	r.sent, r.log = true, log

	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.abort()
		close(aborted)
	})
	done := false
	defer func() {
		if !stop() {
			<-aborted
		}
		if !done { // the handler panicked, or ended its goroutine
			c.abort()
		}
		c.end()
	}()
	resp, err := r.converse(ctx)
	done = true
	return resp, err
}

// request is one request on its way.
type request struct {
	client  *Client
	req     *rpc.CriuReq
	handler Handler
	op      string
	sent    bool
	log     *logFile // nil if there is none
	stage   Stage    // that failed first
	failed  error    // why
}

// prepare completes a copy of the request.
func (r *request) prepare(req *rpc.CriuReq, cancellable bool) error {
	if req == nil || req.Type == nil {
		return errors.New("a request without a type")
	}
	r.req = proto.CloneOf(req)
	if r.req.Opts == nil {
		return nil
	}
	needDirFD(r.req.Opts)
	kind := req.GetType()
	// Without a handler too: CRIU notices a cancellation at notifications only.
	if (r.handler != nil || cancellable) && (kind == rpc.CriuReqType_DUMP || kind == rpc.CriuReqType_RESTORE) {
		r.req.Opts.NotifyScripts = proto.Bool(true)
	}
	// CRIU takes a dump without a pid for one of its client.
	if (kind == rpc.CriuReqType_DUMP || kind == rpc.CriuReqType_PRE_DUMP) && req.GetOpts().GetPid() == 0 {
		return errors.New("set the pid of the process to dump: this one cannot wait for its own dump")
	}
	return nil
}

// needDirFD: the field is required, although its default means that it is not set.
func needDirFD(opts *rpc.CriuOpts) {
	if opts.ImagesDirFd == nil {
		opts.ImagesDirFd = proto.Int32(-1)
	}
}

// begin sends the request.
func (c *Client) begin(req *rpc.CriuReq) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted || c.over || c.closed {
		return ErrClosed
	}
	c.running, c.restoring = true, req.GetType() == rpc.CriuReqType_RESTORE
	if err := c.conn.send(req); err != nil && !isGone(err) {
		c.running = false // CRIU knows nothing of it
		return err
	}
	// A CRIU that is gone may have left a word.
	c.over = !req.GetKeepOpen() && req.GetType() != rpc.CriuReqType_PRE_DUMP
	return nil
}

// end is the end of a request, however it went.
func (c *Client) end() {
	c.mu.Lock()
	aborted := c.aborted
	c.mu.Unlock()
	if aborted {
		_ = c.finish() // that it had to be killed is in the request's error
	}
}

// converse answers notifications until the answer to the request has come.
func (r *request) converse(ctx context.Context) (*rpc.CriuResp, error) {
	c := r.client
	for {
		resp, files, err := c.conn.receive()
		if err != nil {
			return nil, r.broken(ctx, err)
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			closeAll(files)
			return r.finish(ctx, resp)
		}
		n := &Notification{
			Stage:   Stage(resp.GetNotify().GetScript()),
			PID:     int(resp.GetNotify().GetPid()),
			Files:   files,
			Message: resp,
		}
		if err := r.notify(ctx, n); err != nil {
			return nil, r.broken(ctx, err)
		}
	}
}

// notify has one notification answered.
func (r *request) notify(ctx context.Context, n *Notification) error {
	c := r.client
	defer func() { closeAll(n.Files) }()
	c.mu.Lock()
	c.pending = true
	aborted := c.aborted
	if n.Stage == StagePostResume {
		c.running = false // what runs now is no longer CRIU's
	}
	c.mu.Unlock()
	if aborted {
		c.reply(nil, false)
		return nil // CRIU finds nobody to answer, and cleans up
	}

	opts, err := r.ask(ctx, n)
	if ctx.Err() != nil {
		c.abort() // may be on its way already: an answer must not overtake it
	}
	if err == nil && opts != nil {
		opts = proto.CloneOf(opts)
		needDirFD(opts)
	}
	if err != nil && r.failed == nil {
		r.stage, r.failed = n.Stage, err
	}
	if sendErr := c.reply(opts, err == nil); sendErr != nil && !isGone(sendErr) {
		if r.failed == nil {
			r.stage, r.failed = n.Stage, sendErr
		}
		// Such as options that are too large: there is always room for a no.
		if c.reply(nil, false) != nil {
			return sendErr
		}
	}
	return nil
}

func (r *request) ask(ctx context.Context, n *Notification) (*rpc.CriuOpts, error) {
	if r.handler != nil {
		return r.handler.Notify(ctx, n)
	}
	if len(n.Files) > 0 {
		return nil, errors.New("nobody takes the file that came with it: give a Handler")
	}
	return nil, nil
}

// reply answers the notification that waits, if one does.
func (c *Client) reply(opts *rpc.CriuOpts, success bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.replyLocked(opts, success)
}

func (c *Client) replyLocked(opts *rpc.CriuOpts, success bool) error {
	if !c.pending || c.aborted {
		return nil
	}
	err := c.conn.send(&rpc.CriuReq{
		Type:          rpc.CriuReqType_NOTIFY.Enum(),
		NotifySuccess: &success,
		Opts:          opts,
	})
	c.pending = err != nil
	return err
}

// finish makes the result of the answer.
func (r *request) finish(ctx context.Context, resp *rpc.CriuResp) (*rpc.CriuResp, error) {
	c := r.client
	c.mu.Lock()
	c.running = false
	c.mu.Unlock()
	if !answers(resp, r.req.GetType()) {
		err := fmt.Errorf("%w: an answer to %s", ErrProtocol, resp.GetType())
		return nil, r.broken(ctx, err)
	}
	if resp.GetSuccess() && r.failed == nil {
		return resp, nil
	}
	err := r.failed
	if !resp.GetSuccess() {
		err = r.why(ctx)
	}
	if !resp.GetSuccess() && !r.req.GetKeepOpen() {
		// It ends by itself now; then all of its stderr is here.
		err = errors.Join(err, c.finish())
	}
	e := r.fail(err)
	e.Response = resp
	return resp, e
}

// answers reports whether resp is an answer to a request of that type. EMPTY is
// for requests that CRIU does not know; PAGE_SERVER_CHLD is answered as
// PAGE_SERVER (start_page_server_req in criu/cr-service.c).
func answers(resp *rpc.CriuResp, kind rpc.CriuReqType) bool {
	switch got := resp.GetType(); got {
	case kind:
		return true
	case rpc.CriuReqType_EMPTY:
		return !resp.GetSuccess()
	case rpc.CriuReqType_PAGE_SERVER:
		return kind == rpc.CriuReqType_PAGE_SERVER_CHLD
	}
	return false
}

// broken is the end of a request that gets no answer any more, and of CRIU.
func (r *request) broken(ctx context.Context, err error) error {
	c := r.client
	c.abort()
	killed := c.finish()
	state := c.cmd.ProcessState
	switch {
	case errors.Is(err, errTimeout) && killed == nil, errors.Is(err, io.EOF), isGone(err):
		err = &EndedError{state}
	case errors.Is(err, errTimeout):
		err = nil
	}
	if why := r.why(ctx); why != nil {
		err = why
	}
	return r.fail(errors.Join(err, killed))
}

// why is the reason on our side for a request to fail, nil if there is none.
func (r *request) why(ctx context.Context) error {
	cause := context.Cause(ctx) // nil until it ends
	r.client.mu.Lock()
	if cause == nil && r.client.closing {
		cause = errClosing
	}
	r.client.mu.Unlock()
	if cause == nil || errors.Is(r.failed, cause) {
		return r.failed
	}
	return errors.Join(cause, r.failed)
}

// fail makes the error of the request, with what CRIU has said about it.
func (r *request) fail(err error) *Error {
	e := &Error{Op: r.op, Stage: r.stage, Err: err}
	if r.log != nil {
		e.Log, e.LogFile = r.log.errors()
	}
	if len(e.Log) == 0 && r.client.stderr != nil && r.sent {
		e.Log = r.client.stderr.lines()
	}
	return e
}

// describe tells what a request asks for.
func describe(req *rpc.CriuReq) string {
	opts := req.GetOpts()
	switch req.GetType() {
	case rpc.CriuReqType_DUMP:
		return fmt.Sprintf("dump of process %d", opts.GetPid())
	case rpc.CriuReqType_PRE_DUMP, rpc.CriuReqType_SINGLE_PRE_DUMP:
		return fmt.Sprintf("pre-dump of process %d", opts.GetPid())
	case rpc.CriuReqType_RESTORE:
		return "restore"
	case rpc.CriuReqType_EMPTY:
		return "request"
	}
	return "request " + req.GetType().String()
}
