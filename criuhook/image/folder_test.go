// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"criuhook/criuhook/image"
)

// A directory that is given by a descriptor is called by its name.
func TestErrorsNameDirectory(t *testing.T) {
	for _, self := range []string{"self", fmt.Sprint(os.Getpid())} {
		dir := t.TempDir()
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		link := fmt.Sprintf("/proc/%s/fd/%d", self, f.Fd())
		if err := os.MkdirAll(dir+"/"+image.PlanName+"/full", 0o700); err != nil {
			t.Fatal(err)
		}
		for name, do := range map[string]func() error{
			"Open":        func() error { _, err := image.Open(link); return err },
			"ReadRecord":  func() error { _, err := image.ReadRecord(link); return err },
			"ReadPlan":    func() error { _, err := image.ReadPlan(link); return err },
			"RemoveStale": func() error { return image.RemoveStale(t.Context(), link) },
			"WritePlan":   func() error { return image.WritePlan(t.Context(), link, record()) },
			"Normalize":   func() error { return image.Normalize(t.Context(), link, record()) },
		} {
			if err := do(); err == nil || !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "/proc/") {
				t.Errorf("%s: %v", name, err)
			}
		}
		// Without a name the descriptor is all there is.
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := image.Open(link); err == nil || !strings.Contains(err.Error(), link) {
			t.Errorf("removed: %v", err)
		}
	}
}
