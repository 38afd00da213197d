// SPDX-License-Identifier: Apache-2.0

package action

import (
	"cmp"
	"context"
	"errors"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
)

// postDump finishes the images.
func (s *Script) postDump() error {
	d := &dump.Dump{Root: s.Root, Log: s.Log}
	limit := cmp.Or(s.limit, dump.WriteTime)
	left, err := d.Within(limit, "finish the images", func(ctx context.Context) error { return s.finish(ctx, d) })
	if left == nil {
		return err
	}
	// It may have got as far as to the record. The tree is still frozen.
	_, e := d.Within(min(limit, dump.LookTime), "remove what is left of the dump", func(ctx context.Context) error {
		return image.RemoveStale(ctx, s.ImagesDir)
	})
	return errors.Join(err, e)
}

func (s *Script) finish(ctx context.Context, d *dump.Dump) error {
	id, err := dump.ID(s.CRIU)
	if err != nil {
		return err
	}
	rec, err := image.ReadPlan(s.ImagesDir)
	if err != nil && !errors.Is(err, image.ErrNoRecord) {
		return err
	}
	if rec == nil || rec.DumpId != id {
		if done, e := image.ReadRecord(s.ImagesDir); e == nil && done.DumpId == id {
			return nil // an earlier run of this script
		}
		// A record of an earlier dump must not stand beside these images.
		return errors.Join(image.RemoveStale(ctx, s.ImagesDir), errors.New("the connections that leave the tree were not settled when CRIU froze it: "+
			"a rule refused one, or the process that followed CRIU was killed; the messages of criuhook above say which. "+
			"The application runs on, and these images must not be used"))
	}
	return d.Settle(ctx, s.ImagesDir, rec)
}
