// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"criuhook/criuhook/image"
	"criuhook/criuhook/inspect"
	"criuhook/proto"
	"criuhook/sockpeer"
)

func newInspect(o *options) *cobra.Command {
	var output, dir string
	cmd := &cobra.Command{
		Use:   "inspect --images-dir DIR [-o table|json]",
		Short: "Show what images hold, and what a restore here would do",
		Long: `Print the connections that criuhook recorded when the images were made, how each
stands in the images, and what a restore on this machine would do with it now:
whether its name exists, whether somebody listens there, and as whom. Nobody is
connected to, and nothing is written.

Of images that CRIU made alone it lists the unix sockets, and what criuhook would
make of half connections (--external, --ext-unix-sk) by the rules of this host.
An images directory whose dump was never finished is an error.`,
		Example: `  criuhook inspect --images-dir /var/lib/checkpoints/4711
  criuhook inspect --images-dir . -o json | jq '.connections[].restore'`,
		Args:                  noArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return usagef("inspect needs --images-dir DIR")
			}
			log, err := newLogger(cmd.ErrOrStderr(), o.log)
			if err != nil {
				return err
			}
			r, err := inspect.Read(dir, o.config.load)
			if errors.Is(err, fs.ErrPermission) {
				return fmt.Errorf("%w; images are often readable to root alone", err)
			}
			if err != nil {
				return err
			}
			for i := range r.Connections {
				if c := &r.Connections[i]; c.Restore.Result == inspect.Broken {
					log.Warnf("%s: %s", holder(c), c.Restore.Why)
				}
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), newInspectOutput(dir, r))
			}
			return printInspect(cmd.OutOrStdout(), widthOf(cmd.OutOrStdout()), r)
		},
	}
	cmd.Flags().StringVarP(&dir, "images-dir", "D", "", "directory `DIR` of CRIU's images")
	outputFlag(cmd, &output, "table", "json")
	_ = cmd.MarkFlagDirname("images-dir") // it fails only if there is no such option
	return cmd
}

func printInspect(w io.Writer, width int, r *inspect.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, the root task is process %d\n", count(r.Processes, "process", "processes"), r.RootPID)
	if r.OwnNetns {
		b.WriteString("the tree has its own network namespace; what is said of listeners here is of ours\n")
	}
	if r.Record == nil {
		fmt.Fprintf(&b, "there is no %s: these images were not made with criuhook\n", image.RecordName)
	} else {
		fmt.Fprintf(&b, "made with %s", cmp.Or(quoted(r.Record.GetWrittenBy()), "criuhook"))
		if at := r.Time(); !at.IsZero() {
			fmt.Fprintf(&b, " at %s", at.Format("2006-01-02 15:04:05 -0700"))
		}
		b.WriteByte('\n')
	}
	b.WriteString(connections(r, width))
	b.WriteString(sockets(r, width))
	b.WriteString(refused(r))
	b.WriteString(caches(r, width))
	_, err := io.WriteString(w, b.String())
	return err
}

func connections(r *inspect.Report, width int) string {
	if r.Record == nil && !r.Rebuilt {
		return ""
	}
	if len(r.Connections) == 0 {
		return "no connection left the tree\n"
	}
	t := table{columns: []column{
		{title: "PID", right: true}, {title: "COMMAND", least: 7}, {title: "FD", least: 5}, {title: "TYPE"},
		{title: "PEER", least: 10, keepTail: true}, {title: "RULE", least: 6}, {title: "ACTION"}, {title: "FORM"},
		{title: "RESTORE HERE"},
	}}
	var why strings.Builder
	for i := range r.Connections {
		c := &r.Connections[i]
		who, fds := recordedHolders(c.GetHolders())
		t.add(fmt.Sprint(c.GetHolders()[0].GetPid()), who, fds, sockpeer.Type(c.GetType()).String(),
			sockpeer.Name(c.GetPeer().GetName()).String(), quoted(c.GetRule()), actionName(c.GetAction()), string(c.Form),
			string(c.Restore.Result))
		why.WriteString(wrap(holder(c)+": "+string(c.Restore.Result)+": "+c.Restore.Why, "  ", width))
		if c.GetBusy() != "" {
			why.WriteString(wrap("at the dump it was busy: "+quoted(c.GetBusy()), "      ", width))
		}
		if c.GetReason() != "" {
			why.WriteString(wrap(reasonOf(r)+quoted(c.GetReason()), "      ", width))
		}
	}
	if !r.Rebuilt {
		return "\nconnections that left the tree:\n" + t.text(width) + "\na restore here:\n" + why.String()
	}
	for _, w := range r.Warnings {
		why.WriteString(wrap("warning: "+quoted(w), "  ", width))
	}
	return "\nhalf connections, of which CRIU noted no more than the peer's name:\n" + t.text(width) +
		"\na restore here with criuhook, by the rules of this host:\n" + why.String()
}

// reasonOf introduces the reason of a connection: one that was given at the
// dump, or one that a restore gives now.
func reasonOf(r *inspect.Report) string {
	if r.Rebuilt {
		return "note: "
	}
	return "at the dump: "
}

// refused is why criuhook would not restore images that it has not made.
func refused(r *inspect.Report) string {
	if r.Refused == "" {
		return ""
	}
	var b strings.Builder
	for line := range strings.Lines(r.Refused) { // not wrapped: it has YAML in it
		b.WriteString("  " + ascii(strings.TrimRight(line, "\n")) + "\n")
	}
	return "\na restore here with criuhook would fail:\n" + b.String()
}

// sockets lists those that a restore of CRIU's may fail for: all of images
// that are not ours, of ours only halves, which there should not be.
func sockets(r *inspect.Report, width int) string {
	t := table{columns: []column{
		{title: "PID", right: true}, {title: "FD", least: 5}, {title: "TYPE"}, {title: "FORM"},
		{title: "NAME", least: 10, keepTail: true}, {title: "PEER", least: 10, keepTail: true},
	}}
	halves := 0
	for _, s := range r.Sockets {
		if s.Form == inspect.Half {
			halves++
		} else if r.Record != nil {
			continue
		}
		pid, fds := imageHolders(s.Holders)
		peer := s.PeerName.String()
		if s.Form == inspect.Inside {
			peer = fmt.Sprintf("inode %d", s.Peer)
		}
		t.add(pid, fds, s.Type.String(), string(s.Form), s.Name.String(), peer)
	}
	if len(t.rows) == 0 {
		if r.Record == nil && !r.Rebuilt {
			return "no unix sockets\n"
		}
		return ""
	}
	out := "\nunix sockets:\n" + t.text(width)
	if halves > 0 {
		out += wrap(count(halves, "socket is half a connection", "sockets are halves of connections")+
			": CRIU alone needs --inherit-fd for a restore, or --ext-unix-sk, by which it connects to the peer's name as root and without any greeting", "", width)
	}
	return out
}

func caches(r *inspect.Report, width int) string {
	t := table{columns: []column{
		{title: "CACHE", least: 20, keepTail: true}, {title: "MAPPINGS", right: true}, {title: "FDS", right: true}, {title: "IN THE IMAGES"},
	}}
	for _, c := range r.Record.GetCaches() {
		t.add(quoted(c.GetPath()), fmt.Sprint(c.GetMappings()), fmt.Sprint(c.GetFds()), "zero pages and /dev/null")
	}
	for _, c := range r.Caches {
		t.add(quoted(c.Path), fmt.Sprint(c.Mappings), fmt.Sprint(len(c.Holders)), "the file, which must be the same on restore")
	}
	if len(t.rows) == 0 {
		return ""
	}
	return "\ncaches of name-service daemons:\n" + t.text(width)
}

func recordedHolders(hs []*proto.Holder) (command, fds string) {
	others := map[int32]bool{}
	for _, h := range hs {
		if h.GetPid() != hs[0].GetPid() {
			others[h.GetPid()] = true
			continue
		}
		if fds != "" {
			fds += ","
		}
		fds += fmt.Sprint(h.GetFd())
	}
	command = quoted(hs[0].GetComm())
	if len(others) > 0 {
		command = fmt.Sprintf("+%d %s", len(others), command)
	}
	return command, fds
}

func imageHolders(hs []image.Holder) (pid, fds string) {
	for _, h := range hs {
		if h.PID != hs[0].PID {
			continue
		}
		if fds != "" {
			fds += ","
		}
		fds += fmt.Sprint(h.FD)
	}
	if len(hs) > 0 {
		pid = fmt.Sprint(hs[0].PID)
	}
	return pid, fds
}

// holder names a recorded connection by its first holder.
func holder(c *inspect.Connection) string {
	h := c.GetHolders()[0] // a record has one at least
	return fmt.Sprintf("process %d (%s) fd %d", h.GetPid(), quoted(h.GetComm()), h.GetFd())
}

func actionName(a proto.Action) string {
	if a == proto.Action_ACTION_RECONNECT {
		return "reconnect"
	}
	return "hangup"
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
