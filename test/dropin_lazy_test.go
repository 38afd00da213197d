// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestDropinOutcome: what the comparisons with stock CRIU rest on is seen.
func TestDropinOutcome(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		line, exit, target, messages, files string
	}{
		{dumps, "exit status 0", "running", "images/log: says \"Dumping task", "images/stats-dump"},
		{dumps + "-s -W work", "exit status 0", "stopped", "work/log: says", "work/stats-dump"},
		{"dump -t PID -D images -o log", "exit status 0", "gone", "", "images/pages-1.img"},
		{dumps + "--action-script /tmp/trial/script", "exit status 0", "running", "", "stages\nscript pre-dump\nscript post-dump\n"},
		{dumps + "--lsm-profile x", "exit status 1", "running", "Error", ""},
		{restores + "-W work --pidfile r.pid", "exit status 0", "sleep in state S, child of init, stdout is its own", "", "r.pid\nPID"},
		{restores + "-S -s", "exit status 0", "sleep in state T, child of the caller, stdout is its own", "", ""},
		{"restore -D images -o log", "exit status 0", "sleep in state S, child of CRIU, stdout is its own", "", ""},
		{"restore -D images -o log --exec-cmd -- perl -e wait;exit($?)", "exit status 15", "sleep in state S, child of CRIU, stdout is its own", "", ""},
		{"restore -D images -o log --inherit-fd fd[3]:pipe:[INO]", "exit status 0", "sleep in state S, child of CRIU, stdout is fd 3", "", ""},
		{restores + "--lsm-profile x", "exit status 1", "none", "Error", ""},
	} {
		for _, w := range []way{byStock, byDropin} {
			o := b.try(t, w, trial{line: test.line, pipe: strings.Contains(test.line, "inherit")})
			if o.Exit != test.exit || o.Target != test.target || !strings.Contains(o.Messages, test.messages) || !strings.Contains(o.Files, test.files) {
				t.Errorf("by %v: criu %s: %+v", w, test.line, o)
			}
		}
	}
}

// TestDropinLazyPages: memory that is fetched from the dumped process only when
// the restored one needs it. CRIU 4.1 fails at that now and then (splice: Bad
// file descriptor), so that only what comes before is compared.
func TestDropinLazyPages(t *testing.T) {
	b := newBench(t)
	var outcomes []string
	for _, w := range []way{byStock, byDropin} {
		b.start(t)
		outcomes = append(outcomes, b.lazy(t, w))
	}
	if outcomes[0] != outcomes[1] {
		t.Errorf("the drop-in:\n%s\nstock CRIU:\n%s", outcomes[1], outcomes[0])
	}
	noCRIULeft(t)
	nothingLeft(t)
}

func (b *bench) lazy(t *testing.T, w way) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	dir, pid := images(t), b.target.PID
	status, err := os.Create(filepath.Join(t.TempDir(), "status"))
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	remote := []string{"--address", "127.0.0.1", "--port", "12347", "-v4"}
	c := w.dump(pid, dir, append(remote, "--lazy-pages", "--status-fd", "3", "-o", "dump.log")...)
	dump := c.as(ctx, root)
	dump.ExtraFiles = []*os.File{status}
	if err := dump.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = dump.Wait() // the state says it
		close(ended)
	}()
	eventually(t, "the dump is ready to serve pages, or has ended", func() bool {
		select {
		case <-ended:
			return true
		default:
			return contentsOf(status.Name()) != ""
		}
	})
	lazy := exec.CommandContext(ctx, "criu", append(remote, "lazy-pages", "--page-server", "-d", "-D", dir, "-o", "lazy.log", "--pidfile", "lazy.pid")...)
	lazyErr := lazy.Run()
	// The dumped process is there until all is fetched: so another pid namespace.
	c = w.restore(dir, true, "--lazy-pages", "-v4", "-o", "restore.log")
	restore := exec.CommandContext(ctx, "unshare", append([]string{"--pid", "--mount", "--mount-proc", "--kill-child", c.file}, c.args[1:]...)...)
	restoreErr := restore.Run() // which ends the namespace, too
	<-ended
	if server, err := strconv.Atoi(strings.TrimSpace(contentsOf(filepath.Join(dir, "lazy.pid")))); err == nil {
		eventually(t, "lazy-pages has ended", func() bool { return stateOf(server) == "" })
	}
	failed := strings.Contains(contentsOf(filepath.Join(dir, "dump.log")), "Dumping FAILED")
	// A restore whose pages do not come may be over before it sees that.
	return fmt.Sprintf("status %q, lazy-pages: %v, exit status as the log says: dump %v, restore %v", contentsOf(status.Name()), lazyErr,
		failed == (dump.ProcessState.ExitCode() != 0), failed || restoreErr == nil)
}
