// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// options are those of every verb.
type options struct {
	config configuration
	log    logOptions
	criu   string // --criu
	logs   bool   // the verb has a log, for which also is what it fails with
}

// runCommand runs a verb and returns the exit code.
func runCommand(ctx context.Context, args []string) int {
	return run(ctx, args, os.Stdout, os.Stderr)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o := &options{}
	root := newRoot(o, stdout, stderr)
	root.SetArgs(args)
	if len(args) > 0 && args[0] == cobra.ShellCompRequestCmd {
		unquoteUsages(root)
	}
	cmd, err := root.ExecuteContextC(ctx)
	var e *exitError
	if err == nil || errors.As(err, &e) && e.cause == nil {
		return exitCode(err)
	}
	o.log.report(stderr, err)
	if o.logs {
		o.log.keep(err)
	}
	if exitCode(err) == exitUsage {
		help := cmd.CommandPath() + " --help"
		if cmd.Name() == criuName { // its --help is CRIU's
			help = "criuhook help " + criuName
		}
		fmt.Fprintf(stderr, "Try '%s'.\n", help)
	}
	return exitCode(err)
}

// report writes the error that ended a verb.
func (o logOptions) report(stderr io.Writer, err error) {
	if o.format != "json" {
		fmt.Fprintln(stderr, "criuhook: Error:", err)
		return
	}
	log := logrus.New()
	log.SetOutput(stderr)
	log.SetFormatter(&logrus.JSONFormatter{})
	var failed *criuError
	if errors.As(err, &failed) {
		log.WithFields(logrus.Fields{"criu_log": failed.file, "criu_errors": failed.more}).Error(failed.error)
		return
	}
	log.Error(err)
}

const rootLong = `criuhook lets CRIU checkpoint processes that are connected, over unix sockets, to
daemons outside of the checkpoint (sssd, nscd, winbind, lsassd, syslog and the
like), and gives them a working connection again when they are restored.

  criuhook dump    --tree PID --images-dir DIR
  criuhook restore --images-dir DIR
Where something else calls CRIU, criuhook can stand in its place, with CRIU's
command line, called by the name criu or as
  criuhook criu dump -t PID -D DIR
and where CRIU itself must be called, it is an action script; it then has no verb:
  criu dump    -t PID -D DIR --action-script=/path/criuhook
  criu restore -D DIR --action-script=/path/criuhook
Programs that use CRIU's RPC find it at a socket:
  criuhook serve
Images that were dumped in one of these ways can be restored in any other. What to
set for a JDK with CRaC is printed by "criuhook crac-env".

What becomes of each connection is for rules to say; "criuhook rules" shows them
and "criuhook scan" what they mean for processes that run now.

Files:
  /etc/criuhook/config.yaml     rules; another file with --config
  /etc/criuhook/rules.d/*.yaml  more rules, in the order of their names;
                                always beside the configuration file
  DIR/criuhook.img              what became of the connections, beside CRIU's images
  DIR/dump.log, DIR/restore.log CRIU's logs, of the verbs dump and restore

Environment (ignored when running setuid or setgid):
  CRIUHOOK_CONFIG     configuration file (absolute path), like --config
  CRIUHOOK_CRIU       the real CRIU (absolute path), like --criu
  CRIUHOOK_LOG_LEVEL  like --log-level
  CRIUHOOK_LOG_FILE   append log messages to this file (absolute path), in place of
                      stderr or, as action script and drop-in, of CRIU's log

Exit status: 0 done, 1 failed, 2 wrong usage, 3 refused by a rule; that of
"restore" without --detach is the restored process's, that of "criu" is CRIU's.`

func newRoot(o *options, stdout, stderr io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "criuhook VERB",
		Short: "Checkpoint processes that are connected to daemons outside of the checkpoint",
		Long:  rootLong,
		Example: `  criuhook scan --pid 4711
  criuhook dump --tree 4711 --images-dir /var/lib/checkpoints/4711
  criuhook inspect --images-dir /var/lib/checkpoints/4711
  criuhook restore --images-dir /var/lib/checkpoints/4711 --detach`,
		Version:                    version,
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2,
		DisableFlagsInUseLine:      true,
		Args:                       noArgs,
		PersistentPreRunE:          func(*cobra.Command, []string) error { return o.log.check() },
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(cmd.ErrOrStderr())
			if err := cmd.Help(); err != nil {
				return err
			}
			return &exitError{code: exitUsage}
		},
	}
	root.SetOut(stdout) // before the completion verb takes note of it
	root.SetErr(stderr)
	root.SetVersionTemplate(versionLine())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) && strings.Contains(cmd.Use, "CRIU OPTIONS") {
			err = fmt.Errorf("%w; CRIU's options follow after --", err)
		}
		return &exitError{exitUsage, err}
	})
	f := root.PersistentFlags()
	f.StringVar(&o.config.file, "config", "", "configuration `FILE` (default /etc/criuhook/config.yaml, which need not exist)")
	f.StringVar(&o.log.level, "log-level", "", "log messages of this `LEVEL` and above: error, warn, info or debug (default info)")
	f.Var(newChoice(&o.log.format, "text", "json"), "log-format", "`FORM` of log messages and errors: text or json")
	root.AddCommand(newDump(o), newRestore(o), newCRIU(), newServe(o), newScan(o), newInspect(o), newRules(o), newCRaCEnv(), newVersion(),
		newInterpose(), newRelease(), newRelay(), newBecome())
	root.SetHelpCommand(newHelp())
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			finishCompletion(cmd)
		}
	}
	usageErrors(root)
	return root
}

// finishCompletion makes cobra's verb like the others: without a shell it is
// wrong usage, not help.
func finishCompletion(cmd *cobra.Command) {
	cmd.Use = "completion SHELL"
	cmd.DisableFlagsInUseLine = true
	cmd.Short = "Print a completion script for a shell"
	cmd.Long = "Print a script that makes the shell complete criuhook's verbs and options: bash,\nzsh, fish or powershell. The help of each says where to put the script."
	cmd.Example = "  criuhook completion bash >/etc/bash_completion.d/criuhook"
	cmd.Args = noArgs
	cmd.RunE = func(*cobra.Command, []string) error {
		return usagef("completion: which shell? bash, zsh, fish or powershell")
	}
	for _, shell := range cmd.Commands() {
		shell.Example = "  criuhook completion " + shell.Name()
	}
}

// unquoteUsages takes the back quotes out of the usages of options, by which
// pflag finds the name of a value: a shell that completes would show them.
func unquoteUsages(cmd *cobra.Command) {
	unquote := func(f *pflag.Flag) { _, f.Usage = pflag.UnquoteUsage(f) }
	cmd.PersistentFlags().VisitAll(unquote)
	cmd.Flags().VisitAll(unquote)
	for _, c := range cmd.Commands() {
		unquoteUsages(c)
	}
}

// usageErrors makes errors about arguments exit with the code for usage.
func usageErrors(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return &exitError{exitUsage, err}
			}
			return nil
		}
	}
	for _, c := range cmd.Commands() {
		usageErrors(c)
	}
}

// noArgs is for commands that take no arguments, but perhaps verbs.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return fmt.Errorf("%s takes no arguments, got %q", cmd.CommandPath(), args[0])
	}
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		return fmt.Errorf("%s has no verb %q; did you mean %s?", cmd.CommandPath(), args[0], strings.Join(s, " or "))
	}
	return fmt.Errorf("%s has no verb %q", cmd.CommandPath(), args[0])
}

func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// newHelp is cobra's help, except that an unknown topic is an error.
func newHelp() *cobra.Command {
	return &cobra.Command{
		Use:     "help [VERB]",
		Short:   "Explain a verb",
		Long:    "Print what a verb does, its options and examples, as VERB --help does.",
		Example: "  criuhook help scan",

		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			topic, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usagef("there is no verb %q to explain", strings.Join(args, " "))
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
}
