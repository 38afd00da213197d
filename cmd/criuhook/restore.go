// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dropin"
	"criuhook/criuhook/swrk"
)

const restoreLong = `Restore a process tree from images, and its connections: those that are to be
reconnected are made anew, with the rights of the application, before it runs.
The pid of the root of the tree is printed.

Without --detach criuhook stays as the parent of that process, passes SIGINT,
SIGTERM, SIGHUP and SIGQUIT on to it, and ends with its exit status, or with 128
and the number of the signal that ended it.

What follows "--" are options of CRIU. Unless they say otherwise, CRIU's log is
DIR/restore.log; -W or -o takes it elsewhere, for images that cannot be written
to. Nothing else is written to DIR.

Exit status: 0 restored, 1 failed, 2 wrong usage, 3 refused by a rule (images that
were made without criuhook); without --detach also that of the restored process.`

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
			switch {
			case err != nil:
				return err
			case len(line.ExecCmd) > 0:
				return usagef("restore: --exec-cmd is for CRIU's command line: criuhook criu restore …")
			case line.Sibling:
				return usagef("restore: --restore-sibling is for CRIU's command line: here, leave out --detach to have the process as a child of criuhook")
			case line.ImagesDir != dir:
				return usagef("restore: --images-dir is criuhook's: give it before --, not among CRIU's options")
			}
			return o.restore(cmd, line, detach || line.Detach)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&dir, "images-dir", "D", "", "`DIR` of the images")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait for the restored tree")
	o.criuFlag(cmd)
	_ = cmd.MarkFlagDirname("images-dir") // it fails only if there is no such option
	return cmd
}

func (o *options) restore(cmd *cobra.Command, line *dropin.Command, detach bool) error {
	o.logs = true
	r := swrk.Restore{Job: line.Job(), Rules: o.config.load, Detach: detach, InPlace: len(line.JoinNS) > 0, ExtUnixSk: line.ExtUnixSk}
	for _, given := range line.InheritFD {
		_, key, _ := strings.Cut(given, ":")
		r.Leave = append(r.Leave, key)
	}
	// CRIU says nothing helpful of that, and begins a log there.
	if _, err := os.Stat(filepath.Join(line.ImagesDir, "inventory.img")); errors.Is(err, os.ErrNotExist) && !line.Stream {
		return fmt.Errorf("restore: there are no images: %w", err)
	}
	if err := o.job(cmd.ErrOrStderr(), &r.Job); err != nil {
		return err
	}
	// Before the restore: the tree may be told to end as soon as it is there.
	signals := make(chan os.Signal, 4)
	listen := func() { signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT) }
	listen()
	defer signal.Stop(signals)
	if exec := again(); exec != nil {
		r.Again = func() error {
			signal.Stop(signals) // from now on a signal ends us, or is ignored as before
			defer listen()
			if len(signals) > 0 {
				return errors.New("stopped by a signal")
			}
			return exec()
		}
	}
	pid, err := r.Run(cmd.Context(), signals)
	var failed *criurpc.Error
	switch {
	case errors.As(err, &failed) && failed.Errno() == unix.EEXIST:
		return criuFailed(fmt.Errorf("%w; a pid of the images is taken here: end that process, or restore in another pid namespace", err))
	case err != nil:
		return criuFailed(err)
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), pid)
	switch {
	case err != nil && detach:
		return fmt.Errorf("process %d is restored and runs, but its pid could not be printed: %w", pid, err)
	case err != nil:
		r.Log.Warnf("process %d is restored and runs, but its pid could not be printed: %v", pid, err)
	case detach:
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
