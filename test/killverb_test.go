// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/test/app"
)

// TestKillVerb kills who has asked CRIU for a dump, at different moments of it.
// CRIU then fails at its next question at the latest, and the application goes
// on. (CRIU itself is not killed: see TestKillCRIUFromScript.)
func TestKillVerb(t *testing.T) {
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) {
		a, srv := hammered(t, alice)
		failures := 0
		for i := range 2 * rounds {
			dir := images(t)
			r := during(func() Result { return a.TryDump(t, dir, "--leave-running") }, func(done <-chan struct{}) {
				if pid := catchVerb(done); pid != 0 {
					time.Sleep(time.Duration(i) * step)
					_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
				}
			})
			eventually(t, "the end of CRIU", func() bool { return len(running("criu")) == 0 })
			if r.Code == 0 {
				wantRecorded(t, dir, threads)
			} else {
				failures++
				if _, err := image.ReadRecord(dir); err == nil {
					t.Logf("round %d: killed after its last step", i)
				} else {
					noRecord(t, dir)
				}
			}
			a.unharmed(t, srv)
		}
		if failures == 0 {
			t.Errorf("none of %d dumps failed: the kills came too late", 2*rounds)
		}
		t.Logf("%d of %d dumps failed", failures, 2*rounds)
		a.restoresAtLast(t, srv)
	})
}

// TestKillVerbWhileWaiting: nobody waits for a verb that is gone.
func TestKillVerbWhileWaiting(t *testing.T) {
	eachWay(t, []way{byRPC, byDropin}, func(t *testing.T) {
		install(t, "rules:\n  - {name: t-long, path: /tmp/*/*/long*, idle: reconnect, busy: wait, patience: 5m}\n")
		a, srv := awaiting(t, waysToWait[0], "long")
		before := a.Details(t, "c")
		dir := images(t)
		r := during(func() Result { return a.TryDump(t, dir) }, func(done <-chan struct{}) {
			a.eventuallyWaiting(t)
			time.Sleep(300 * time.Millisecond) // it may still look first
			if pid := catchVerb(done); pid != 0 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		})
		r.want(t, "dump by a verb that was killed", -1)
		eventually(t, "the end of CRIU", func() bool { return len(running("criu")) == 0 })
		noRecord(t, dir)
		srv.Release()
		a.answered(t, "")
		a.untouched(t, srv, "c", before)
	})
}

// TestKillVerbOfRestore: what was half restored is gone, and the images are good
// as before.
func TestKillVerbOfRestore(t *testing.T) {
	eachWay(t, []way{byRPC}, func(t *testing.T) {
		_, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		dir := a.Dump(t)
		failures := 0
		for i := range rounds {
			r := during(func() Result { return a.TryRestore(t, dir) }, func(done <-chan struct{}) {
				if pid := catchVerb(done); pid != 0 {
					time.Sleep(time.Duration(i) * 2 * step)
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			})
			eventually(t, "the end of CRIU", func() bool { return len(running("criu")) == 0 })
			if r.Code != 0 {
				failures++
			}
			// Killed after CRIU's last question, what was restored runs.
			eventually(t, "the end of what was not restored", func() bool { return !strings.Contains("ZX", stateOf(a.PID)) || isFree(a.PID) })
			if stateOf(a.PID) != "" {
				if _, err := a.Try(app.Command{Op: "request", Conn: "c"}); err != nil {
					// It was being killed.
					eventually(t, fmt.Sprintf("the end of process %d, which does not work: %v", a.PID, err), func() bool { return isFree(a.PID) })
				}
			} else if r.Code == 0 {
				t.Errorf("round %d: the restore succeeded, but nothing runs", i)
			}
			a.Kill(t)
			nothingLeft(t)
		}
		if failures == 0 {
			t.Errorf("none of %d restores failed: the kills came too late", rounds)
		}
		t.Logf("%d of %d restores failed", failures, rounds)
		a.Restore(t, dir)
		a.Request(t, "c")
		nothingLeft(t)
	})
}

// catchVerb waits for a process of ours, the parent of others if there are more; 0: done was closed
// before.
func catchVerb(done <-chan struct{}) int {
	for {
		select {
		case <-done:
			return 0
		default:
		}
		first := 0
		left, _ := ours()
		for _, l := range left {
			number, _, _ := strings.Cut(l, " ")
			if pid, _ := strconv.Atoi(number); first == 0 || pid < first {
				first = pid
			}
		}
		if first != 0 {
			return first
		}
	}
}
