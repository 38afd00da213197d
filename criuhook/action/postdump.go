// SPDX-License-Identifier: Apache-2.0

package action

import (
	"errors"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
)

// postDump finishes the images.
func (s *Script) postDump() error {
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
		return errors.Join(image.RemoveStale(s.ImagesDir), errors.New("the connections that leave the tree were not settled when CRIU froze it: "+
			"a rule refused one, or the process that followed CRIU was killed; the messages of criuhook above say which. "+
			"The application runs on, and these images must not be used"))
	}
	d := dump.Dump{Root: s.Root, Log: s.Log}
	return d.Settle(s.ImagesDir, rec)
}
