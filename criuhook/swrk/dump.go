// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/rule"
)

// Dump is a dump by RPC.
type Dump struct {
	Job
	Tree  int // the root task
	Rules *rule.Set
	// Signals are passed on to CRIU.
	Signals <-chan os.Signal
	// KilledBy is set by Run to the signal that ended CRIU, if one did.
	KilledBy syscall.Signal
	// Started is set by Run once CRIU has been started.
	Started bool
	// Scripts: CRIU's options have action scripts.
	Scripts bool
}

// Run dumps. A dump that fails leaves the application as it was. The error
// wraps a [*dump.RefusedError] if a rule is the reason, else it is mostly a
// [*criurpc.Error]. Exit is what CRIU's own command line would end with.
func (d *Dump) Run(ctx context.Context) (exit int, err error) {
	f, err := d.open()
	if err != nil {
		return 1, err
	}
	defer f.close()
	defer d.CRIULog.Detach()
	start := time.Now()
	asks, known := Asks(d.CRIU)
	for inAdvance := known && !asks; ; {
		base := &dump.Dump{Root: d.Tree, Rules: d.Rules, Log: d.Log, Version: d.Version}
		a := &attempt{Dump: d, folders: f, Stages: NewStages(base, f.imagesPath()), inAdvance: inAdvance}
		exit, err := a.run(ctx, start)
		var busy *dump.BusyError
		switch {
		case err == nil:
			return exit, nil
		case errors.As(err, &busy) && time.Since(start) < busy.Patience:
			continue // the tree runs again, so it may become idle
		case inAdvance || a.Asked() || !a.Begun() || d.KilledBy != 0 || ctx.Err() != nil:
			return exit, err
		}
		// An older CRIU, which does not ask: tell it before.
		d.Log.Debugf("CRIU did not ask for external files, so it is told of them in advance: %v", err)
		inAdvance = true
	}
}

// attempt is one run of CRIU.
type attempt struct {
	*Dump
	folders
	*Stages
	criu *criurpc.Client

	inAdvance bool
}

func (a *attempt) run(ctx context.Context, start time.Time) (exit int, err error) {
	if err := a.Base.AwaitIdle(ctx, start, func() {}); err != nil {
		return 1, err
	}
	req := a.request(rpc.CriuReqType_DUMP, a.folders)
	req.Opts.Pid = proto.Int32(int32(a.Tree))
	if a.inAdvance {
		if req.Opts.External, err = a.Declare(); err != nil {
			a.logError(err)
			return 1, err
		}
	}
	a.CRIULog.Detach() // from the log of an attempt before this one
	if a.criu, err = criurpc.Start(a.config(a.folders, nil)); err != nil {
		return 1, err
	}
	defer a.criu.Close()
	a.Started = true
	// A CRIU that has ended already: Do tells what it said.
	if err = a.By(a.criu.PID()); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return 1, err
	}
	done := make(chan struct{})
	go a.passSignals(done)
	_, err = a.criu.Do(ctx, req, a)
	close(done)
	if err == nil {
		return 0, nil
	}
	if e := a.Failed(); e != nil {
		err = errors.Join(err, e)
	}
	if a.inAdvance {
		err = a.explain(err)
	}
	return a.exitCode(err), err
}

func (a *attempt) passSignals(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case sig := <-a.Signals:
			_ = a.criu.Signal(sig) // it may have ended
		}
	}
}

// exitCode is CRIU's, if it ended before it answered.
func (a *attempt) exitCode(err error) int {
	var e *criurpc.Error
	switch {
	case a.Settled() && a.Scripts:
		return 255 // of a post-dump script that fails
	case !errors.As(err, &e) || e.Response != nil:
		return 1
	}
	_ = a.criu.Close()
	state := a.criu.Wait()
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		a.KilledBy = status.Signal()
		return 128 + int(status.Signal())
	}
	return max(state.ExitCode(), 1)
}

// Notify answers CRIU. Whatever fails fails the dump.
func (a *attempt) Notify(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
	a.CRIULog.Attach(a.criu.PID(), a.logPath(a.folders), false)
	var opts *rpc.CriuOpts
	var err error
	switch n.Stage {
	case criurpc.StageQueryExtFiles:
		var keys []string
		if keys, err = a.Decide(); err == nil {
			opts = criurpc.External(keys...)
		}
	case criurpc.StagePostDump:
		err = a.Finish()
	}
	if err != nil {
		a.logError(err)
	}
	return opts, err
}

// logError is for whoever reads CRIU's log; the error goes to the caller, too.
func (a *attempt) logError(err error) {
	if a.CRIULog.Attached() {
		fmt.Fprintln(a.CRIULog, "criuhook: Error:", err)
	}
}

// explain names the connections that came after CRIU was told of the others,
// which CRIU's own message does not.
func (a *attempt) explain(err error) error {
	var e *criurpc.Error
	if !errors.As(err, &e) || e.Err != nil {
		return err // known already
	}
	if why := a.Appeared(); why != nil {
		e.Err = why
		a.logError(e.Err)
	}
	return err
}
