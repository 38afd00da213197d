// SPDX-License-Identifier: Apache-2.0

package dump

import (
	"context"
	"fmt"
	"time"
)

// How long one step may take while the tree is frozen.
const (
	// LookTime is for one that looks at processes.
	LookTime = 30 * time.Second
	// WriteTime is for one that writes into the images: fsync(2) there may wait for
	// all that CRIU has written before, the pages too, also those of pre-dumps.
	WriteTime = 10 * time.Minute
)

// Within does a step, named by what, in at most that time. What hangs, in a file
// system or in a process that nobody can stop, is left behind with its context
// ended: then the dump is to fail, so that the tree runs on. left is closed when it
// has come to its end after all; nil: nothing was left behind, and what do has
// written is the caller's. Who has to be waited for by CRIU, as an action script has,
// must not rely on it for what no signal ends, such as fsync(2): it is no zombie that
// can be reaped until that is over.
func (d *Dump) Within(limit time.Duration, what string, do func(context.Context) error) (left <-chan struct{}, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	done, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		defer cancel()
		done <- do(ctx)
	}()
	select {
	case err := <-done:
		return nil, err
	case <-ctx.Done():
	}
	select { // cancelled because it has ended, or in the last moment
	case err := <-done:
		return nil, err
	default:
	}
	return ended, fmt.Errorf("%s of the tree of process %d: not done in %v, so it is given up, and the tree runs on: look what hangs in /proc/%d, or in the file system of the images", what, d.Root, limit, d.Root)
}
