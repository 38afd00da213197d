// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"os"
	"slices"
	"testing"

	"criuhook/sockpeer"
)

// TestScanTellsMapped: of who holds a connection, in a tree and everywhere.
func TestScanTellsMapped(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	p := given(t, "hold", a)
	exe, err := os.Executable()
	check(t, err)
	all, err := sockpeer.ScanAll()
	check(t, err)
	for _, s := range []*sockpeer.Snapshot{scan(t, p.pid), all} {
		if got := s.Processes[p.pid].Mapped; !slices.Contains(got, exe) {
			t.Errorf("%s is not among %q", exe, got)
		}
	}
}
