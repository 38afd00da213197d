// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"criuhook/criuhook/plan"
	"criuhook/sockpeer"
)

func newScan(o *options) *cobra.Command {
	var output string
	var pid int
	cmd := &cobra.Command{
		Use:   "scan [--pid PID] [-o table|json]",
		Short: "List connections that would leave a checkpoint, and what would become of them",
		Long: `List the unix connections whose other end is outside of a process tree: who holds
them, who is at the other end, whether they are in use, which rule matches, and
what a dump would do now: reconnect, hangup, wait (busy, and the rule gives it
time) or refuse. For each refusal it says why, and what would allow it. DIR is out
for a connection that a process of the tree made; NAME is what it is connected to.
The line below each says what that is, and which of the libraries that the process
has mapped opened it. On a terminal what is too long for it is cut; piped, nothing is.

Without --pid every process is looked at as if it, with all that descend from
it, were to be dumped. The processes are not touched. It needs root.`,
		Example: `  criuhook scan --pid 4711
  criuhook scan -o json | jq '.connections[] | select(.verdict.action == "refuse")'`,
		Args:                  noArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("pid") && pid <= 0 {
				return usagef("--pid %d: a pid is greater than 0", pid)
			}
			log, err := newLogger(cmd.ErrOrStderr(), o.log)
			if err != nil {
				return err
			}
			set, err := o.config.load()
			if err != nil {
				return err
			}
			snap, err := scan(pid)
			if err != nil {
				return err
			}
			log.Debugf("%d connections of %d processes, %d rules", len(snap.Connections), len(snap.Processes), len(set.Rules))
			p := plan.Make(snap, set)
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), newScanOutput(pid, snap, p))
			} else {
				err = printScan(cmd.OutOrStdout(), widthOf(cmd.OutOrStdout()), pid, p)
			}
			if err == nil && len(p.Refused()) > 0 {
				return &exitError{code: exitRefused}
			}
			return err
		},
	}
	cmd.Flags().IntVar(&pid, "pid", 0, "only the tree of which the process `PID` is the root")
	outputFlag(cmd, &output, "table", "json")
	return cmd
}

func scan(pid int) (snap *sockpeer.Snapshot, err error) {
	if pid != 0 {
		snap, err = sockpeer.Scan(pid)
	} else {
		snap, err = sockpeer.ScanAll()
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w; to look into other processes takes root (CAP_SYS_PTRACE, CAP_SYS_ADMIN)", err)
	}
	return snap, err
}

func printScan(w io.Writer, width, pid int, p *plan.Plan) error {
	if p.Empty() {
		whose := "any process and its descendants"
		if pid != 0 {
			whose = fmt.Sprintf("the tree of process %d", pid)
		}
		_, err := fmt.Fprintf(w, "no connection leaves %s\n", whose)
		return err
	}
	t := table{columns: []column{
		{title: "PID", right: true}, {title: "COMMAND", least: 7}, {title: "FD", least: 4}, {title: "TYPE"},
		{title: "DIR"}, {title: "NAME", least: 10, keepTail: true}, {title: "OWNER", least: 8}, {title: "UID", right: true},
		{title: "STATE", least: 8}, {title: "RULE", least: 5}, {title: "VERDICT"},
	}}
	for i := range p.Decisions {
		d := &p.Decisions[i]
		c := &d.Connection
		by := ""
		if d.Rule != nil {
			by = d.Rule.Name
		}
		who, fds := holders(d)
		t.add(fmt.Sprint(d.Holder.PID), who, fds, c.Type.String(), dir(c), name(c), owner(c.Peer), uid(c.Peer.UID),
			state(d), by, d.Action.String())
	}
	var text string
	for i, line := range strings.SplitAfter(t.text(width), "\n") {
		text += line
		if 0 < i && i <= len(p.Decisions) {
			text += wrap(p.Decisions[i-1].Is.String(), "    ", width)
		}
	}
	if notes := p.Explain(); notes != "" {
		text += "\n" + notes
	}
	_, err := io.WriteString(w, text)
	return err
}

// holders returns the first holder's command, with how many other processes
// hold the connection, and its fds.
func holders(d *plan.Decision) (command, fds string) {
	others := map[int]bool{}
	for _, h := range d.Connection.Holders {
		if h.PID != d.Holder.PID {
			others[h.PID] = true
			continue
		}
		if fds != "" {
			fds += ","
		}
		fds += fmt.Sprint(h.FD)
	}
	command = quoted(d.Holder.Comm)
	if len(others) > 0 {
		// Before the name, which may have to be shortened.
		command = fmt.Sprintf("+%d %s", len(others), command)
	}
	return command, fds
}

// dir is which end called connect(): out, we did; in, somebody else did.
func dir(c *sockpeer.Connection) string {
	if c.Direction == sockpeer.Inbound {
		return "in"
	}
	return "out"
}

// name is what the end that was connected to is bound to: what rules go by.
func name(c *sockpeer.Connection) string {
	if c.Direction == sockpeer.Inbound {
		return c.Name.String()
	}
	return c.Peer.Name.String()
}
