// SPDX-License-Identifier: Apache-2.0

package child_test

import (
	"io"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer/child"
)

// TestOrphanBehind: the program runs when the gate lets it through, and never if
// the other process ends before.
func TestOrphanBehind(t *testing.T) {
	for _, c := range []struct {
		what string
		argv []string // of the other process
		is   bool     // it runs a program of the gate
		want string
	}{
		{"it runs something else", []string{"sleep", "1000"}, false, "through\n"},
		{"it ends", []string{"sh", "-c", "read line"}, true, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			cmd := exec.Command(c.argv[0], c.argv[1:]...)
			stdin, err := cmd.StdinPipe()
			check(t, err)
			check(t, cmd.Start())
			defer cmd.Wait()
			defer cmd.Process.Kill()
			pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
			check(t, err)
			defer unix.Close(pidfd)
			r, w, err := os.Pipe()
			check(t, err)
			defer r.Close()
			gate := child.Gate{PID: cmd.Process.Pid, PIDFD: 1}
			if c.is {
				gate.Files = []string{cmd.Path}
			}
			const least = 1 << 20 // hardly in use
			_, err = child.OrphanBehind(gate, least, "/bin/sh", []string{"sh", "-c", "echo through >&2"}, nil, []int{-1, pidfd, int(w.Fd())})
			w.Close()
			check(t, err)
			stdin.Close()
			b, err := io.ReadAll(r)
			check(t, err)
			if got := string(b); got != c.want {
				t.Errorf("it says %q, expected %q", got, c.want)
			}
		})
	}
}
