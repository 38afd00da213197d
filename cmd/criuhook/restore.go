// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/dropin"
	"criuhook/criuhook/swrk"
)

const restoreLong = `Restore a process tree from images, and its connections: those that are to be
reconnected are made anew, with the rights of the application, before it runs.
The pid of the root of the tree is printed.

Without --detach criuhook stays as the parent of that process, passes SIGINT,
SIGTERM, SIGHUP and SIGQUIT on to it, and ends with its exit status, or with 128
and the number of the signal that ended it.

What follows "--" goes to CRIU. Unless it says otherwise, CRIU's log is
DIR/restore.log. Nothing else is written to DIR.`

func newRestore(o *options) *cobra.Command {
	var dir string
	var detach bool
	cmd := &cobra.Command{
		Use:   "restore --images-dir DIR [--detach] [-- CRIU OPTIONS…]",
		Short: "Restore a process tree with CRIU",
		Long:  restoreLong,
		Example: `  criuhook restore --images-dir /var/lib/checkpoints/4711
  criuhook restore --images-dir /var/lib/checkpoints/4711 --detach -- --shell-job --work-dir /tmp`,
		DisableFlagsInUseLine: true,
		Args:                  criuOptionsOnly,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" {
				return usagef("restore: --images-dir DIR has to be given")
			}
			words := append([]string{"restore", "--images-dir", dir}, logDefaults("restore.log")...)
			line, err := criuLine(append(words, args...))
			if err != nil {
				return err
			}
			if len(line.ExecCmd) > 0 {
				return usagef("restore: --exec-cmd is for CRIU's command line: criuhook criu restore …")
			}
			return o.restore(cmd, line, detach || line.Detach)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&dir, "images-dir", "D", "", "`DIR` of the images")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait for the restored tree")
	o.criuFlag(cmd)
	return cmd
}

func (o *options) restore(cmd *cobra.Command, line *dropin.Command, detach bool) error {
	r := swrk.Restore{Job: line.Job(), Rules: o.config.load, Detach: detach, InPlace: len(line.JoinNS) > 0}
	for _, given := range line.InheritFD {
		_, key, _ := strings.Cut(given, ":")
		r.Leave = append(r.Leave, key)
	}
	if err := o.job(cmd, &r.Job); err != nil {
		return err
	}
	// Before the restore: the tree may be told to end as soon as it is there.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)
	pid, err := r.Run(cmd.Context(), signals)
	if err != nil {
		return criuFailed(err)
	}
	if _, err := fmt.Fprintln(cmd.OutOrStdout(), pid); err != nil {
		return fmt.Errorf("print the pid %d of the restored process: %w", pid, err)
	}
	if detach {
		return nil
	}
	return awaitTree(pid, signals)
}

// awaitTree waits for a child that is not one of os/exec's, and ends as it
// did.
func awaitTree(pid int, signals <-chan os.Signal) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return fmt.Errorf("wait for the restored process %d: %w", pid, err)
	}
	go func() {
		for sig := range signals {
			_ = p.Signal(sig) // it may have ended
		}
	}()
	state, err := p.Wait()
	if err != nil {
		return fmt.Errorf("wait for the restored process %d: %w", pid, err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case ok && status.Signaled():
		return &exitError{code: 128 + int(status.Signal())}
	case state.ExitCode() != 0:
		return &exitError{code: state.ExitCode()}
	}
	return nil
}
