// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"criuhook/proto"
	"criuhook/test/cracengine"
)

// TestCRaCBusy: a checkpoint while every thread waits for sssd. These lookups end
// at once when the virtual machine is back, and the next ones work.
func TestCRaCBusy(t *testing.T) {
	need(t)
	startDaemons(t)
	for _, s := range setups[:2] {
		t.Run(s.name, func(t *testing.T) {
			j := newJDK(t, "21", cracengine.Library)
			env, options := s.in(t, j)
			v := startJVM(t, root, j, env, append(slices.Clone(options), "-Downers.busy=true"))
			thaw := freezeAll(t, "sssd_nss")
			l := &Lookup{Process: v.Process}
			eventually(t, "all threads to wait for sssd", func() bool {
				n := 0
				for _, c := range l.connections(t) {
					n += len(c.Waiters)
				}
				return n == v.threads
			})
			v.Checkpoint(t)
			thaw()
			hungUp := 0
			for _, c := range record(t, v.dir).Connections {
				if c.Action == proto.Action_ACTION_HANGUP && c.Busy != "" {
					hungUp++
				}
			}
			if hungUp != v.threads {
				t.Errorf("%d busy connections are to be hung up, expected %d: %v", hungUp, v.threads, record(t, v.dir).Connections)
			}
			r := v.Restore(t, append(env, "CRACENGINE_VALUE=3"), options, v.dir)
			first := r.wantRestored(t, "3")
			t.Logf("first lookups: %v; the console says: %s", first, contentsOf(v.console))
			r.end(t)
			nothingLeft(t)
		})
	}
}

// TestCRaCLateWarning: CRIU is the virtual machine's child, and has its stderr,
// here a file, which is in the images. What we have to say once they are written
// must not go there: a restore refuses a file that has grown.
func TestCRaCLateWarning(t *testing.T) {
	need(t)
	startDaemons(t)
	const cache = "/var/lib/sss/mc/group"
	for _, s := range setups[:2] {
		t.Run(s.name, func(t *testing.T) {
			j := newJDK(t, "21", cracengine.Library)
			env, options := s.in(t, j)
			// Open and not mapped: there is a warning about it.
			v := startJVM(t, root, j, env, append(slices.Clone(options), "-Downers.open="+cache))
			v.Checkpoint(t)
			if !strings.Contains(v.dumpLog(), fmt.Sprintf("has the cache %s open and does not map it", cache)) {
				t.Errorf("no warning in CRIU's log\n%s", Result{Log: v.dumpLog()}.tail())
			}
			r := v.Restore(t, append(env, "CRACENGINE_VALUE=3"), options, v.dir)
			r.wantRestored(t, "3")
			if said := contentsOf(v.console); said != "" {
				t.Errorf("the console says: %s", said)
			}
			r.end(t)
			nothingLeft(t)
		})
	}
}
