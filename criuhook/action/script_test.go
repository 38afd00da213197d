// SPDX-License-Identifier: Apache-2.0

package action_test

import (
	"os"
	"strings"
	"testing"

	"criuhook/criuhook/action"
)

func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestFromEnvironment(t *testing.T) {
	for _, c := range []struct {
		what, dir, init string
		criu, root      int
	}{
		{"as CRIU calls a script", "/proc/4242/fd/7", "99", 4242, 99},
		{"before there is a root task", "/proc/4242/fd/7", "", 4242, 0},
		{"a wrapper that shows the directory itself", "/var/lib/images", "99", os.Getppid(), 99},
		{"proc of ourselves", "/proc/self/fd/7", "99", os.Getppid(), 99},
		{"a directory that begins alike", "/procession/12/fd", "99", os.Getppid(), 99},
		{"no directory", "", "99", os.Getppid(), 99},
	} {
		s, err := action.FromEnvironment(env(action.StageVariable, "pre-dump", "CRTOOLS_IMAGE_DIR", c.dir, "CRTOOLS_INIT_PID", c.init))
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		if s.Stage != "pre-dump" || s.ImagesDir != c.dir || s.CRIU != c.criu || s.Root != c.root {
			t.Errorf("%s: %+v", c.what, s)
		}
	}
	for _, bad := range []string{"x", "0", "-1", "1 ", "99999999999999999999"} {
		if s, err := action.FromEnvironment(env("CRTOOLS_INIT_PID", bad)); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("CRTOOLS_INIT_PID=%s: %+v, %v", bad, s, err)
		}
	}
}

func TestIdle(t *testing.T) {
	busy := map[string]bool{"pre-dump": true, "post-dump": true, "post-restore": true}
	for _, stage := range []string{
		"pre-stream", "pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume",
		"network-lock", "network-unlock", "setup-namespaces", "post-setup-namespaces", "orphan-pts-master", "query-ext-files", "", "PRE-DUMP",
	} {
		s := action.Script{Stage: stage}
		if s.Idle() == busy[stage] {
			t.Errorf("%q: idle %v", stage, s.Idle())
		}
		// Without the variables an idle stage needs none, and the others say which.
		err := s.Run(t.Context())
		if !busy[stage] && err != nil {
			t.Errorf("%q: %v", stage, err)
		}
		if busy[stage] && (err == nil || !strings.Contains(err.Error(), "CRTOOLS_IMAGE_DIR") || !strings.Contains(err.Error(), stage)) {
			t.Errorf("%q: %v", stage, err)
		}
	}
	for _, s := range []action.Script{{Stage: "post-dump", Root: 1}, {Stage: "post-dump", ImagesDir: "/tmp"}} {
		if err := s.Run(t.Context()); err == nil {
			t.Errorf("%+v: no error", s)
		}
	}
}
