// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/swrk"
)

// dumping is our part in a dump.
type dumping struct {
	x      *exchange
	stages *swrk.Stages
	start  time.Time
	unsaid error // why a CRIU that may not ask was told of nothing
	agreed bool  // all have agreed to what is written: now CRIU ends the tree
}

// newDumping prepares it. The error is for the first notification to tell; CRIU
// says itself what is wrong with the process and the directory.
func newDumping(x *exchange) (part, error) {
	if x.dirs.images == nil {
		return nil, fmt.Errorf("open the images directory of process %d, which asks for this dump: %w", x.Peer.PID, x.dirs.err)
	}
	rules, err := x.Rules()
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(x.fd, &st); err != nil {
		return nil, fmt.Errorf("look at the RPC socket: %w", err)
	}
	opts := x.req.GetOpts()
	base := &dump.Dump{
		Root: int(opts.GetPid()), Rules: rules, Log: x.Log, Version: x.Version,
		Service: uint32(st.Ino), Files: x.Files,
	}
	d := &dumping{x: x, start: time.Now()}
	err = x.files(func() error {
		d.stages = swrk.NewStages(base, path(x.dirs.images))
		return nil
	})
	if err != nil {
		return nil, err
	}
	// One that asks is asked again with the tree frozen, so that nothing is wrong with
	// telling what is there now.
	asks, known := swrk.Asks(x.CRIU)
	if known && asks {
		return d, nil
	}
	keys, err := d.stages.Declare()
	if err != nil && !known {
		d.unsaid, err = err, nil
	}
	opts.External = append(opts.External, keys...)
	return d, err
}

func (d *dumping) started(criu int) error {
	// A CRIU that has ended already has left a word.
	if err := d.stages.By(criu); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (d *dumping) before(_ context.Context, resp *rpc.CriuResp) error {
	if criurpc.Stage(resp.GetNotify().GetScript()) == criurpc.StagePostDump {
		return d.stages.Finish()
	}
	return nil
}

func (d *dumping) after(ctx context.Context, resp *rpc.CriuResp) ([]string, error) {
	switch criurpc.Stage(resp.GetNotify().GetScript()) {
	case criurpc.StagePreDump:
		err := d.stages.Base.AwaitIdle(ctx, d.start, func() {})
		if errors.Is(err, unix.ESRCH) {
			return nil, nil // CRIU has a word, and an errno, of its own for that
		}
		return nil, err
	case criurpc.StageQueryExtFiles:
		if err := d.x.inPlace(); err != nil {
			return nil, err
		}
		return d.stages.Decide()
	case criurpc.StagePostDump:
		if d.x.notify { // that may have taken a while
			if err := d.stages.Unchanged(); err != nil {
				return nil, err
			}
		}
		d.agreed = true
	}
	return nil, nil
}

func (d *dumping) ended(resp *rpc.CriuResp) {
	// A CRIU that ends without an answer after all have agreed may have ended the tree:
	// what it wrote is complete, and may be all that is left.
	if resp.GetSuccess() || resp == nil && d.agreed {
		return
	}
	if err := d.stages.Failed(); err != nil {
		d.x.Log.Error(err)
	}
	if d.x.failed != nil || d.stages.Asked() {
		return
	}
	if d.x.failed = d.unsaid; d.x.failed == nil {
		d.x.failed = d.stages.Appeared()
	}
	_ = d.x.tell() // CRIU has ended: only its log is to have it
}

// inPlace checks that CRIU uses the directory that we know of: a configuration
// file can name another (config_file).
func (x *exchange) inPlace() error {
	if x.req.GetOpts().ConfigFile == nil {
		return nil
	}
	if swrk.Has(x.worker.PID(), path(x.dirs.images)) {
		return nil
	}
	return fmt.Errorf("CRIU does not use the images directory that the request names: take images-dir out of %s, or leave criuhook out", x.req.GetOpts().GetConfigFile())
}
