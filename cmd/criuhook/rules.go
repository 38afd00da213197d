// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

func newRules(o *options) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "rules [-o table|yaml]",
		Short: "Show the rules in force, or check a file of rules",
		Long: `Print the rules in force, in the order in which they are tried: those of the
configuration file, those of rules.d beside it, then the built-in ones. The first
rule that matches a connection decides. Built-in rules are explained: what the
clients of such a daemon do, what the rule costs them, why it is as it is, and
where that is known from; neighbours often share it. As YAML it is a configuration
file with each rule's origin and explanation as a comment: a start for rules of
one's own (give those that are kept another name).`,
		Example: `  criuhook rules
  criuhook rules -o yaml
  criuhook rules check /etc/criuhook/rules.d/proxy.yaml`,
		Args:                  noArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set, err := o.config.load()
			if err != nil {
				return err
			}
			if output == "yaml" {
				text, err := set.YAML()
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(text)
				return err
			}
			return printRules(cmd.OutOrStdout(), widthOf(cmd.OutOrStdout()), set)
		},
	}
	outputFlag(cmd, &output, "table", "yaml")
	cmd.AddCommand(newRulesCheck())
	return cmd
}

func newRulesCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a file of rules",
		Long: `Read one configuration file as a dump would, and say what is wrong with it, by
line and column. Run as root it also refuses a file that others could write.`,
		Example: "  criuhook rules check /etc/criuhook/rules.d/proxy.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("rules check needs one file, got %d", len(args))
			}
			return nil
		},
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := rule.ReadFile(args[0])
			if err != nil {
				return err
			}
			rules := "rules"
			if len(f.Rules) == 1 {
				rules = "rule"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d %s, ok\n", quoted(f.Name), len(f.Rules), rules)
			return err
		},
	}
}

func printRules(w io.Writer, width int, set *rule.Set) error {
	t := table{columns: []column{
		{title: "NAME", least: 12}, {title: "CONDITIONS", least: 20, keepTail: true},
		{title: "IDLE"}, {title: "BUSY", least: 10}, {title: "PRELUDE"}, {title: "SOURCE", least: 10, keepTail: true},
	}}
	for i := range set.Rules {
		r := &set.Rules[i]
		busy := r.Busy.String()
		if r.Busy == rule.Wait {
			busy += " " + r.Patience.String()
		}
		t.add(r.Name, conditions(r), r.Idle.String(), busy, r.Prelude, r.Source)
	}
	lines := strings.SplitAfter(t.text(width), "\n")
	var b strings.Builder
	b.WriteString(lines[0])
	for i := range set.Rules {
		r := &set.Rules[i]
		b.WriteString(lines[i+1])
		b.WriteString(wrap(onRestore(r), "    ", width))
		// Neighbours often share a reason; the last one gives it.
		if i+1 == len(set.Rules) || !set.Rules[i+1].SameReasons(r) {
			for _, x := range r.Reasons() {
				b.WriteString(hang(x.Title+": "+x.Text, "    ", "      ", width))
			}
		}
	}
	b.WriteString("\n" + wrap(fmt.Sprintf("with no rule: outbound connections: %s (unknown), inbound connections: %s (inbound)", set.Unknown, set.Inbound), "", width))
	_, err := io.WriteString(w, b.String())
	return err
}

func conditions(r *rule.Rule) string {
	var c []string
	if r.Path != "" {
		c = append(c, quoted(r.Path))
	}
	if r.Type != nil {
		c = append(c, r.Type.String())
	}
	if r.UID != nil {
		c = append(c, "uid "+strconv.FormatUint(uint64(*r.UID), 10))
	}
	if r.Exe != "" {
		c = append(c, "exe "+quoted(r.Exe))
	}
	if r.Direction == sockpeer.Inbound {
		c = append(c, "inbound")
	}
	return strings.Join(c, ", ")
}

// onRestore is what a rule says of restores other than the default.
func onRestore(r *rule.Rule) string {
	if r.Idle != rule.Reconnect {
		return ""
	}
	var s []string
	if r.To != "" {
		s = append(s, "to "+quoted(r.To))
	}
	if r.Timeout != rule.DefaultTimeout {
		s = append(s, "timeout "+r.Timeout.String())
	}
	if r.Absent != rule.AbsentHangup {
		s = append(s, "absent "+r.Absent.String())
	}
	if len(s) == 0 {
		return ""
	}
	return "On restore: " + strings.Join(s, ", ") + "."
}
