// SPDX-License-Identifier: Apache-2.0

package dropin_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"criuhook/criuhook/dropin"
)

var releaseModes = []struct {
	name     string
	args     []string
	detached bool
	sibling  bool
}{
	{name: "stays"},
	{name: "exec-cmd", args: []string{"--exec-cmd", "--", "sleep", "1000"}},
	{name: "detached", args: []string{"-d"}, detached: true},
	{name: "sibling", args: []string{"-d", "-S"}, detached: true, sibling: true},
}

func TestRelease(t *testing.T) {
	for _, children := range []int{0, 4} {
		t.Run(fmt.Sprint(1+children), func(t *testing.T) {
			r := newReleaseTree(t, children)
			for _, m := range releaseModes {
				t.Run(m.name, func(t *testing.T) {
					x := r.restore(t, m.args...)
					defer x.end(m.sibling)
					start := time.Now()
					x.release()
					t.Logf("released after %v", time.Since(start))
					if !x.over() {
						t.Errorf("released before the restore was over\n%s", x.log(x.restoreLog()))
					}
					x.closeSocket()
					if !x.eof(releasePatience) {
						t.Errorf("no EOF\n%s", x.log(x.restoreLog()))
					}
				})
				if m.detached {
					continue
				}
				// Without Release there is no EOF, and it is never too late for it.
				t.Run(m.name+", late", func(t *testing.T) {
					x := r.restore(t, m.args...)
					defer x.end(m.sibling)
					x.closeSocket()
					if len(m.args) > 0 {
						x.eventually("the command runs", func() bool {
							b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", x.cmd.Process.Pid))
							return string(b) == "sleep\n"
						})
					}
					if x.eof(100 * time.Millisecond) {
						t.Error("EOF without Release")
					}
					start := time.Now()
					x.release()
					t.Logf("released within %v", time.Since(start))
					if !x.eof(releasePatience) {
						t.Error("no EOF")
					}
				})
			}
		})
	}
}

// TestReleaseFailed: a restore that fails, as its pid is taken.
func TestReleaseFailed(t *testing.T) {
	r := newReleaseTree(t, 0)
	first := r.restore(t)
	defer first.end(false)
	first.release()
	second := r.restore(t)
	second.release()
	if err := second.cmd.Wait(); err == nil {
		t.Errorf("the second restore succeeded\n%s", second.log(second.restoreLog()))
	}
	first.closeSocket()
	if !first.eof(releasePatience) || !second.eof(releasePatience) {
		t.Error("no EOF")
	}
	second.release() // no such process
}

// TestReleaseWaits: a script holds CRIU up after the tasks have let go of the
// store; nothing is taken from CRIU then, however its end comes.
func TestReleaseWaits(t *testing.T) {
	cause := errors.New("enough")
	for _, c := range []struct {
		name string
		act  func(x *releaseRestore, goOn func(), cancel func())
		want error
	}{
		{"goes on", func(_ *releaseRestore, goOn, _ func()) { goOn() }, nil},
		{"killed", func(x *releaseRestore, _, _ func()) { x.ok(x.cmd.Process.Kill()) }, nil},
		{"cancelled", func(_ *releaseRestore, _, cancel func()) { cancel() }, cause},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newReleaseTree(t, 0)
			script, reached, goOn := r.dir+"/script", r.dir+"/reached", r.dir+"/go-on"
			r.ok(os.WriteFile(script, fmt.Appendf(nil, `#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0
echo $$ >%[1]s.new; mv %[1]s.new %[1]s
until [ -e %s ]; do sleep 0.01; done
`, reached, goOn), 0o755))
			x := r.restore(t, "--action-script", script)
			defer x.end(false)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			done := make(chan error, 1)
			go func() { done <- dropin.Release(ctx, x.cmd.Process.Pid) }()
			x.eventually("post-restore", func() bool { _, err := os.Stat(reached); return err == nil })
			write := func() { x.ok(os.WriteFile(goOn, nil, 0o644)) }
			defer write()
			select {
			case err := <-done:
				t.Fatalf("Release has returned: %v", err)
			case <-time.After(200 * time.Millisecond): // several looks
			}
			c.act(x, write, func() { cancel(cause) })
			select {
			case err := <-done:
				if !errors.Is(err, c.want) {
					t.Errorf("Release: %v", err)
				}
			case <-time.After(releasePatience):
				t.Fatal("Release hangs")
			}
			if c.name == "goes on" {
				x.closeSocket()
				if !x.eof(releasePatience) {
					t.Error("no EOF")
				}
			}
		})
	}
}
