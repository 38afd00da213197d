// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"criuhook/criuhook/action"
	"criuhook/criuhook/interpose"
)

// runScript acts as CRIU's action script.
func runScript(ctx context.Context) int {
	s, err := action.FromEnvironment(os.Getenv)
	if err == nil && s.Idle() {
		return exitDone
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "criuhook: Error:", err)
		return exitFailed
	}
	log, err := scriptLogger(s.CRIU)
	if err != nil {
		fmt.Fprintln(os.Stderr, "criuhook: Error:", err)
		if f, _ := action.CRIUStderr(s.CRIU); f != nil {
			fmt.Fprintln(f, "criuhook: Error:", err)
		}
		return exitFailed
	}
	s.Log, s.Version, s.Rules = log, version, configuration{}.load
	if err := s.Run(ctx); err != nil {
		log.Error(err)
		return exitFailed
	}
	return exitDone
}

// scriptLogger logs to CRIU's log, which is our stderr, and what is wrong to
// CRIU's own stderr too.
func scriptLogger(criu int) (*logrus.Logger, error) {
	log, err := newLogger(os.Stderr, logOptions{})
	if err != nil {
		return nil, err
	}
	if f, sized := action.CRIUStderr(criu); f != nil {
		log.AddHook(stderrHook{copyHook{f}, sized})
	}
	return log, nil
}

// newInterpose is the verb by which the action script starts its tracer.
func newInterpose() *cobra.Command {
	t := &action.Tracer{Version: version, Rules: configuration{}.load}
	cmd := &cobra.Command{
		Use:    interpose.Verb,
		Short:  "Follow CRIU for the action script (internal)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			log, err := scriptLogger(t.CRIU)
			if err != nil {
				return err
			}
			t.Log = log
			if err := t.Run(); err != nil {
				log.Error(err)
				return &exitError{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&t.CRIU, "criu-pid", 0, "CRIU's pid")
	cmd.Flags().IntVar(&t.Root, "tree", 0, "pid of the tree's root task")
	cmd.Flags().UintSliceVar(&t.Dead, "dead", nil, "inodes that CRIU is to find dead, of a frozen tree")
	cmd.Flags().IntVar(&t.Netns, "netns", 1, "how many network namespaces that tree has")
	return cmd
}
