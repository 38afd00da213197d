// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// choice is an option that takes one of a few words.
type choice struct {
	to    *string
	words []string
}

// newChoice sets the first word as the default.
func newChoice(to *string, words ...string) *choice {
	*to = words[0]
	return &choice{to, words}
}

func (c *choice) String() string { return *c.to }

func (c *choice) Type() string { return "WORD" }

func (c *choice) Set(word string) error {
	if !slices.Contains(c.words, word) {
		return fmt.Errorf("must be %s", strings.Join(c.words, " or "))
	}
	*c.to = word
	return nil
}

// outputFlag adds --output, the form of a verb's result.
func outputFlag(cmd *cobra.Command, to *string, words ...string) {
	cmd.Flags().VarP(newChoice(to, words...), "output", "o", "`FORM` of the result: "+strings.Join(words, " or "))
	// It fails only if there is no such option.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}
