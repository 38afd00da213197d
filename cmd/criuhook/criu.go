// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"criuhook/criuhook/action"
	"criuhook/criuhook/dropin"
	"criuhook/criuhook/swrk"
)

// criuName is the name by which we are CRIU.
const criuName = "criu"

// runCRIU acts as CRIU's command line and returns CRIU's exit status.
func runCRIU(ctx context.Context, arg0 string, args []string) int {
	log, criuLog, err := dropinLogger()
	if err != nil {
		fmt.Fprintln(os.Stderr, "criuhook: Error:", err)
		return exitFailed
	}
	call := dropin.Call{Arg0: arg0, Args: args, Rules: configuration{}.load, Log: log, CRIULog: criuLog, Version: version, Again: again()}
	if call.CRIU, err = findCRIU(log, "", configuration{}); err == nil {
		call.Self, err = os.Executable()
	}
	if err != nil {
		log.Error(err)
		return exitFailed
	}
	return call.Run(ctx)
}

// calledAsCRIU reports whether a link or copy of us has the name of CRIU.
func calledAsCRIU(arg0 string) bool { return filepath.Base(arg0) == criuName }

// findCRIU finds the real CRIU; option is --criu. A configuration that cannot
// be read does not stand in the way: a restore does without its rules, and a
// dump will say what is wrong with it.
func findCRIU(log *logrus.Logger, option string, config configuration) (string, error) {
	var named string
	rules, err := config.load()
	if err == nil {
		named = rules.CRIU
	} else {
		log.Warnf("CRIU is searched without regard to \"criu:\" in the configuration: %v", err)
	}
	f, err := swrk.NewFinder(option, named)
	if err != nil {
		return "", err
	}
	return swrk.Find(f)
}

// dropinLogger writes to CRIU's log, and what is wrong to stderr, as the
// action script does.
func dropinLogger() (*logrus.Logger, *swrk.CRIULog, error) {
	criuLog := &swrk.CRIULog{}
	log, err := newLogger(criuLog, logOptions{})
	if err != nil {
		return nil, nil, err
	}
	log.AddHook(stderrHook{copyHook{os.Stderr}, action.Sized(2)})
	return log, criuLog, nil
}

// newCRIU documents the verb; main sees to it that it gets its arguments
// untouched.
func newCRIU() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "criu ARGUMENTS…",
		Short: "Stand in for CRIU's command line",
		Long: `Does what CRIU does with these arguments, and with the same options, exit status,
log and images, but so that connections to daemons do not stand in the way: dump,
restore and swrk (CRIU's RPC, as runc and crun call it) are handled, any other
command is handed to CRIU untouched. The same happens when criuhook is called by
the name criu, by a link or a copy.

Messages go to CRIU's log, warnings and errors also to stderr; of a restore only
warnings and errors, on stderr alone (CRIUHOOK_LOG_FILE gets all); those of swrk go
only to the log, and why there is no CRIU also to stderr.

The real CRIU is the one that --criu (of dump, restore and serve), CRIUHOOK_CRIU
or the configuration (criu:) names, else criu.real beside criuhook, else the first
criu in PATH and the sbin directories that is not criuhook.`,
		Example: `  criuhook criu dump -t 4711 -D /var/lib/checkpoints/4711 -o dump.log
  criuhook criu restore -d -D /var/lib/checkpoints/4711 -o restore.log`,
		DisableFlagParsing:    true,
		DisableFlagsInUseLine: true,
		RunE: func(*cobra.Command, []string) error {
			return usagef("criu: options of criuhook cannot stand before it; use CRIUHOOK_CRIU, CRIUHOOK_CONFIG and CRIUHOOK_LOG_LEVEL")
		},
	}
	// Without the options of other verbs, of which it takes none.
	cmd.SetUsageFunc(func(cmd *cobra.Command) error {
		_, err := fmt.Fprintf(cmd.OutOrStderr(), "Usage:\n  %s\n\nExamples:\n%s\n\nOptions are CRIU's, --help too.\n", cmd.UseLine(), cmd.Example)
		return err
	})
	return cmd
}

// newRelease is the verb by which the drop-in empties CRIU's fd store.
func newRelease() *cobra.Command {
	var criu, pidfd int
	cmd := &cobra.Command{
		Use:    dropin.ReleaseVerb,
		Short:  "Let go of the sockets that CRIU keeps after a restore (internal)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if pidfd >= 0 {
				return dropin.ReleaseBy(cmd.Context(), criu, pidfd)
			}
			return dropin.Release(cmd.Context(), criu)
		},
	}
	cmd.Flags().IntVar(&pidfd, "pidfd", -1, "a pidfd of it that we inherited")
	cmd.Flags().IntVar(&criu, "criu-pid", 0, "CRIU's pid")
	return cmd
}

// newRelay is the verb by which the drop-in takes part in what "criu swrk" and its
// client say to each other.
func newRelay() *cobra.Command {
	r := &dropin.Relay{Rules: configuration{}.load, Version: version}
	cmd := &cobra.Command{
		Use:    dropin.RelayVerb,
		Short:  "Stand between CRIU and a client of its RPC (internal)",
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r.Options = args
			r.CRIULog = &swrk.CRIULog{}
			if r.Log, err = newLogger(r.CRIULog, logOptions{}); err != nil {
				return err
			}
			return r.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&r.CRIU, "criu", "", "path of the real CRIU")
	cmd.Flags().StringVar(&r.Arg0, "arg0", "", "the name it is called by")
	cmd.Flags().IntVar(&r.PID, "criu-pid", 0, "pid of the process that becomes CRIU")
	return cmd
}
