// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/dropin"
	"criuhook/criuhook/swrk"
)

// logDefaults are CRIU's options before those of the user: a log beside the
// images, with what is needed to understand a failure.
func logDefaults(name string) []string { return []string{"-v4", "--log-file", name} }

const dumpLong = `Dump a process and its children, with all that CRIU can do, and with the
connections that leave the tree: what becomes of each is for the rules to say.
That is decided while CRIU has the tree frozen. If anything fails, is refused, or
is stopped by a signal, the application runs on as before.

What follows "--" are options of CRIU. Unless they say otherwise, CRIU's log is
DIR/dump.log. DIR is made if it does not exist.

Exit status: 0 dumped, 1 failed, 2 wrong usage, 3 refused by a rule.`

func newDump(o *options) *cobra.Command {
	var tree int
	var dir string
	var leaveRunning bool
	cmd := &cobra.Command{
		Use:   "dump --tree PID --images-dir DIR [--leave-running] [-- CRIU OPTIONS…]",
		Short: "Dump a process tree with CRIU",
		Long:  dumpLong,
		Example: `  criuhook dump --tree 4711 --images-dir /var/lib/checkpoints/4711
  criuhook dump -t 4711 -D /var/lib/checkpoints/4711 --leave-running -- --shell-job --tcp-close`,
		DisableFlagsInUseLine: true,
		Args:                  criuOptionsOnly,
		RunE: func(cmd *cobra.Command, args []string) error {
			if tree <= 0 || dir == "" {
				return usagef("dump: --tree PID and --images-dir DIR have to be given")
			}
			words := append([]string{"dump", "--tree", strconv.Itoa(tree), "--images-dir", dir}, logDefaults("dump.log")...)
			if leaveRunning {
				words = append(words, "--leave-running")
			}
			line, err := criuLine(append(words, args...))
			switch {
			case err != nil:
				return err
			case line.Tree != tree || line.ImagesDir != dir:
				return usagef("dump: --tree and --images-dir are criuhook's: give them before --, not among CRIU's options")
			}
			return o.dump(cmd, line)
		},
	}
	f := cmd.Flags()
	f.IntVarP(&tree, "tree", "t", 0, "`PID` of the root of the tree")
	f.StringVarP(&dir, "images-dir", "D", "", "`DIR` for the images")
	f.BoolVarP(&leaveRunning, "leave-running", "R", false, "let the tree run on after the dump")
	o.criuFlag(cmd)
	_ = cmd.MarkFlagDirname("images-dir") // it fails only if there is no such option
	_ = cmd.RegisterFlagCompletionFunc("tree", cobra.NoFileCompletions)
	return cmd
}

// criuFlag is --criu.
func (o *options) criuFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.criu, "criu", "", "`PATH` of the real CRIU (default: it is searched, see criuhook help criu)")
	_ = cmd.MarkFlagFilename("criu")
}

// criuOptionsOnly allows arguments after "--", for CRIU.
func criuOptionsOnly(cmd *cobra.Command, args []string) error {
	at := cmd.ArgsLenAtDash()
	if at < 0 {
		at = len(args)
	}
	if at > 0 {
		return fmt.Errorf("%s takes no arguments, got %q; CRIU's options follow after --", cmd.CommandPath(), args[0])
	}
	return nil
}

// criuLine understands a command line of CRIU.
func criuLine(words []string) (*dropin.Command, error) {
	line := dropin.Parse(words, dropin.System())
	if line.PassOn != "" {
		return nil, usagef("%s: among CRIU's options: %s; \"criuhook criu %s\" would hand them to CRIU as they are", words[0], line.PassOn, words[0])
	}
	return line, nil
}

func (o *options) dump(cmd *cobra.Command, line *dropin.Command) error {
	o.logs = true
	rules, err := o.config.load()
	if err != nil {
		return err
	}
	if err := unix.Kill(line.Tree, 0); errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("dump: there is no process %d", line.Tree)
	}
	progress := newProgress(cmd.ErrOrStderr(), line.ImagesDir)
	d := swrk.Dump{Job: line.Job(), Tree: line.Tree, Rules: rules}
	if err := o.job(progress, &d.Job); err != nil {
		return err
	}
	if err := os.Mkdir(line.ImagesDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make the images directory: %w", err)
	}
	d.Apart = true
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer stop()
	progress.start(line.Tree)
	_, err = d.Run(ctx)
	summary := progress.stop()
	switch {
	case err != nil && ctx.Err() != nil && gaveUp(err):
		return fmt.Errorf("dump of process %d: %w: it runs on as before; the images in %s are not complete", line.Tree, context.Cause(ctx), line.ImagesDir)
	case err != nil:
		return criuFailed(err)
	}
	d.Log.Infof("process %d is dumped to %s: %s", line.Tree, line.ImagesDir, summary)
	return nil
}

// job is what dump and restore have in common. Messages go to stderr and to
// CRIU's log.
func (o *options) job(stderr io.Writer, j *swrk.Job) (err error) {
	if j.Log, err = newLogger(stderr, o.log); err != nil {
		return err
	}
	if j.CRIU, err = findCRIU(j.Log, o.criu, o.config); err != nil {
		return err
	}
	j.Version = version
	// What CRIU says beside its log, but not where it is to use ours.
	if !slices.Contains(j.Keep, 1) && j.LogFile != "-" {
		j.Stdout = &criuOutput{log: j.Log}
	}
	if !slices.Contains(j.Keep, 2) {
		j.Stderr = &criuOutput{log: j.Log}
	}
	if j.LogFile != "" {
		j.CRIULog = &swrk.CRIULog{}
		j.Log.AddHook(allHook{j.CRIULog})
	}
	return nil
}

// allHook writes everything to a second place as well.
type allHook struct {
	to io.Writer
}

func (allHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h allHook) Fire(e *logrus.Entry) error { return copyHook(h).Fire(e) }
