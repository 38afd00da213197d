// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"criuhook/criuhook/image"
)

// ending ends when it has been asked so often whether it has.
type ending struct {
	context.Context
	left *int
}

func (e ending) Err() error {
	if *e.left == 0 {
		return context.Canceled
	}
	*e.left--
	return nil
}

// Once the context has ended nothing in the directory changes, whatever has been
// begun: it may be another dump's by then.
func TestTooLate(t *testing.T) {
	for name, change := range map[string]func(context.Context, string) error{
		"Commit":      func(ctx context.Context, dir string) error { return image.Commit(ctx, dir, record()) },
		"WritePlan":   func(ctx context.Context, dir string) error { return image.WritePlan(ctx, dir, record()) },
		"RemoveStale": image.RemoveStale,
	} {
		t.Run(name, func(t *testing.T) {
			for checks := range 2 { // before the directory is opened, and after
				dir := t.TempDir()
				for _, n := range []string{image.RecordName, image.PlanName} {
					if err := os.WriteFile(filepath.Join(dir, n), []byte("another dump's"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				before := content(t, dir)
				if err := change(ending{t.Context(), &checks}, dir); !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
				unchanged(t, dir, before)
			}
		})
	}
	// The last moment: written, not yet in its place.
	dir, checks := t.TempDir(), 2
	if err := image.Commit(ending{t.Context(), &checks}, dir, record()); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit: %v", err)
	}
	if got := content(t, dir); len(got) != 0 {
		t.Errorf("Commit left %v", got)
	}
}
