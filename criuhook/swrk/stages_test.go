// SPDX-License-Identifier: Apache-2.0

package swrk_test

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
)

// hangTime is after what a test takes a call for one that never returns.
const hangTime = 20 * time.Second

// hanging is a file system that hangs from when it is told to until the test
// lets it go on.
type hanging struct {
	on   bool
	over chan struct{}
}

func (h *hanging) do(fn func() error) error {
	if h.on {
		<-h.over
	}
	return fn()
}

// inTime runs what must not hang.
func inTime(t *testing.T, what string, do func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-time.After(hangTime):
		t.Fatalf("%s hangs", what)
		return nil
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// decided is a dump of a process without connections about which has been decided,
// in a file system that hangs when it is told to.
func decided(t *testing.T) (*swrk.Stages, *hanging, string) {
	t.Helper()
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	})
	log := logrus.New()
	log.SetOutput(io.Discard)
	fs := &hanging{over: make(chan struct{})}
	dir := t.TempDir()
	s := swrk.NewStages(&dump.Dump{Root: child.Process.Pid, Rules: &rule.Set{}, Log: log, ID: "this one", Files: fs.do}, dir)
	if _, err := s.Decide(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); got != "criuhook.plan" {
		t.Fatalf("in the directory: %s", got)
	}
	return s, fs, dir
}

func TestFinishHangs(t *testing.T) {
	s, fs, dir := decided(t)
	// CRIU has written something, or there is nothing to remove.
	if err := os.WriteFile(dir+"/files.img", []byte("an image"), 0o600); err != nil {
		t.Fatal(err)
	}
	fs.on = true
	s.SetLimit(time.Millisecond)
	err := inTime(t, "Finish", s.Finish)
	if err == nil || !strings.Contains(err.Error(), "finish the images of the tree of process") || !strings.Contains(err.Error(), "not done in 1ms") {
		t.Fatalf("Finish: %v", err)
	}
	if s.Settled() {
		t.Error("the images are said to have their form")
	}
	err = inTime(t, "Failed", s.Failed)
	if err == nil || !strings.Contains(err.Error(), "remove what is left of the dump") {
		t.Errorf("Failed: %v", err)
	}
	left := s.Left()
	if left == nil {
		t.Fatal("nothing is said to be left behind")
	}
	select {
	case <-left:
		t.Error("what hangs is said to have ended")
	default:
	}
	// Another dump, into the same directory, is done when the file system goes on.
	if err := os.WriteFile(dir+"/criuhook.img", []byte("another dump's"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := names(t, dir)
	close(fs.over)
	_ = inTime(t, "what was left behind", func() error { <-left; return nil })
	if got := names(t, dir); got != before {
		t.Errorf("what was left behind made of %q in the directory: %q", before, got)
	}
	if b, err := os.ReadFile(dir + "/criuhook.img"); err != nil || string(b) != "another dump's" {
		t.Errorf("what was left behind wrote: %q, %v", b, err)
	}
}

// TestDecideHangs: the same where it was always so.
func TestDecideHangs(t *testing.T) {
	s, fs, dir := decided(t)
	fs.on = true
	s.SetLimit(time.Millisecond)
	if err := os.Remove(dir + "/criuhook.plan"); err != nil {
		t.Fatal(err)
	}
	_, err := s.Decide()
	if err == nil || !strings.Contains(err.Error(), "decided about the connections of the tree of process") {
		t.Fatalf("Decide: %v", err)
	}
	close(fs.over)
	_ = inTime(t, "what was left behind", func() error { <-s.Left(); return nil })
	if got := names(t, dir); got != "" {
		t.Errorf("what was left behind wrote %s", got)
	}
}
