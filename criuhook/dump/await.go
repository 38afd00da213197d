// SPDX-License-Identifier: Apache-2.0

package dump

import (
	"context"
	"fmt"
	"time"
)

// busyInterval is how often a connection is looked at that a rule waits for.
// The kernel has no event for it.
const busyInterval = 10 * time.Millisecond

// AwaitIdle lets the application run on while a rule waits for a busy
// connection, at most for the patience that is left of a wait that began at
// start. The tasks run, so the decision that counts is made later, of the
// frozen tree. alive is called now and then.
func (d *Dump) AwaitIdle(ctx context.Context, start time.Time, alive func()) error {
	if !d.Rules.Waits() {
		return nil
	}
	tick := time.NewTicker(busyInterval)
	defer tick.Stop()
	for {
		p, _, err := d.Plan()
		if err != nil {
			return err
		}
		if len(p.Waiting()) == 0 {
			return nil
		}
		p.Expire(time.Since(start))
		if len(p.Waiting()) == 0 {
			return &RefusedError{p.Explain()}
		}
		alive()
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for busy connections of process %d: %w", d.Root, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
