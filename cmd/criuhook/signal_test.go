// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAwaitTree: the restored process gets our signals, and we end as it does.
func TestAwaitTree(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		send         os.Signal // nil: none
		code         int
	}{
		{"ends well", "exit 0", nil, 0},
		{"ends with a status", "exit 7", nil, 7},
		{"handles a signal", `trap "exit 9" TERM; echo ready; while :; do read x; done`, unix.SIGTERM, 9},
		{"is ended by a signal", "echo ready; read x", unix.SIGUSR1, 128 + int(unix.SIGUSR1)}, // nohup(1) ignores SIGHUP
		{"kills itself", "kill -9 $$", nil, 128 + 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command("/bin/sh", "-c", tt.script)
			keep, err := cmd.StdinPipe() // not to be read, nor at its end
			if err != nil {
				t.Fatal(err)
			}
			defer keep.Close()
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			signals := make(chan os.Signal, 1)
			defer close(signals)
			if tt.send != nil {
				if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
					t.Fatal(err)
				}
				signals <- tt.send
			}
			err = awaitTree(cmd.Process.Pid, signals)
			if got := exitCode(err); got != tt.code {
				t.Errorf("exit code %d (%v), want %d", got, err, tt.code)
			}
		})
	}
}

// TestDumpStopped: a signal does not end us before CRIU has given up.
func TestDumpStopped(t *testing.T) {
	dir := t.TempDir()
	started := filepath.Join(dir, "started")
	if err := unix.Mkfifo(started, 0o600); err != nil {
		t.Fatal(err)
	}
	// It ends when its socket, fd 3, does.
	criu := fakeCRIU(t, fmt.Sprintf(`echo >%s; cat <&3 >/dev/null`, started))
	go func() {
		if _, err := os.ReadFile(started); err == nil { // opened once CRIU runs
			_ = unix.Kill(os.Getpid(), unix.SIGINT)
		}
	}()
	code, stdout, stderr := invoke(t, "dump", "-t", strconv.Itoa(os.Getpid()), "-D", dir, "--criu", criu)
	if code != exitFailed || stdout != "" || !strings.Contains(stderr, fmt.Sprintf("dump of process %d: interrupt signal received", os.Getpid())) {
		t.Errorf("exit code %d, %q, %s", code, stdout, stderr)
	}
}

func TestCalledAsCRIU(t *testing.T) {
	for name, want := range map[string]bool{
		"criu": true, "/usr/sbin/criu": true, "./criu": true, "criuhook": false, "/opt/criu/criuhook": false, "criu.real": false, "": false,
	} {
		if calledAsCRIU(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}
