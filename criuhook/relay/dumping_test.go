// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/swrk"
)

// TestRecordAfterEnd: a dump that fails has no record; but a CRIU that ends without
// a word after all have agreed to what it wrote may have ended the tree.
func TestRecordAfterEnd(t *testing.T) {
	for _, tt := range []struct {
		name   string
		agreed bool
		resp   *rpc.CriuResp
		stays  bool
	}{
		{"success", true, &rpc.CriuResp{Success: proto.Bool(true)}, true},
		{"failure", true, &rpc.CriuResp{Success: proto.Bool(false)}, false},
		{"no answer", true, nil, true},
		{"no answer, not agreed", false, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			log := logrus.New()
			log.SetOutput(t.Output())
			d := &dumping{
				x:      &exchange{session: &session{Relay: &Relay{Log: log}}},
				stages: swrk.NewStages(&dump.Dump{Root: os.Getpid(), Log: log}, dir),
				agreed: tt.agreed,
			}
			record := filepath.Join(dir, "criuhook.img")
			for _, name := range []string{filepath.Join(dir, "files.img"), record} { // CRIU has begun
				if err := os.WriteFile(name, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			d.ended(tt.resp)
			_, err := os.Lstat(record)
			if stays := err == nil; stays != tt.stays || err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the record stays: %v, %v", stays, err)
			}
		})
	}
}
