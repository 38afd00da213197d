// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"strconv"

	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// The JSON of "criuhook scan". docs/json.md describes it; keys are never
// renamed or taken away.
type (
	scanOutput struct {
		PID         int              `json:"pid,omitempty"`
		Refused     int              `json:"refused"`
		Connections []scanConnection `json:"connections"`
	}
	scanConnection struct {
		Inode      uint32       `json:"inode"`
		Is         string       `json:"is"`
		Daemon     string       `json:"daemon,omitempty"`
		Libraries  []string     `json:"libraries,omitempty"`
		Type       string       `json:"type"`
		Direction  string       `json:"direction"`
		State      string       `json:"state"`
		Name       string       `json:"name,omitempty"`
		Netns      uint64       `json:"netns"`
		RecvQueue  uint32       `json:"recv_queue"`
		SendQueue  uint32       `json:"send_queue"`
		HalfClosed bool         `json:"half_closed"`
		Peer       peerOutput   `json:"peer"`
		Holders    []scanHolder `json:"holders"`
		Waiters    []scanWaiter `json:"waiters"`
		Verdict    scanVerdict  `json:"verdict"`
	}
	scanHolder struct {
		PID     int    `json:"pid"`
		TID     int    `json:"tid"`
		FD      int    `json:"fd"`
		Cloexec bool   `json:"cloexec"`
		Command string `json:"command"`
	}
	scanWaiter struct {
		PID     int    `json:"pid"`
		TID     int    `json:"tid"`
		FD      int    `json:"fd"`
		Syscall string `json:"syscall"`
	}
	scanVerdict struct {
		Action     string `json:"action"`
		Rule       string `json:"rule,omitempty"`
		RuleSource string `json:"rule_source,omitempty"`
		Busy       string `json:"busy,omitempty"`
		Reason     string `json:"reason,omitempty"`
		Advice     string `json:"advice,omitempty"`
	}
	// peerOutput is of "criuhook inspect" too.
	peerOutput struct {
		Inode uint32 `json:"inode,omitempty"`
		Name  string `json:"name,omitempty"`
		Path  string `json:"path,omitempty"`
		PID   int    `json:"pid,omitempty"`
		UID   *int64 `json:"uid"`
		Exe   string `json:"exe,omitempty"`
	}
)

func newScanOutput(pid int, snap *sockpeer.Snapshot, p *plan.Plan) scanOutput {
	out := scanOutput{PID: pid, Refused: len(p.Refused()), Connections: []scanConnection{}}
	for i := range p.Decisions {
		d := &p.Decisions[i]
		c := &d.Connection
		o := scanConnection{
			Inode: c.Inode, Is: d.Is.String(), Daemon: d.Is.Daemon, Libraries: d.Is.Libraries,
			Type: c.Type.String(), Direction: c.Direction.String(), State: state(d),
			Name: c.Name.String(), Netns: c.Netns, RecvQueue: c.RecvQueue, SendQueue: c.SendQueue,
			HalfClosed: c.Shutdown != 0,
			Peer:       newPeer(c.Peer.Inode, c.Peer.Name, c.Peer.Path, c.Peer.PID, c.Peer.UID, c.Peer.Exe),
			Holders:    []scanHolder{}, Waiters: []scanWaiter{},
			Verdict: scanVerdict{Action: d.Action.String(), Busy: d.Busy, Reason: d.Reason},
		}
		if d.Rule != nil {
			o.Verdict.Rule, o.Verdict.RuleSource = d.Rule.Name, quoted(d.Rule.Source)
		}
		if d.Action == rule.Refuse {
			o.Verdict.Advice = d.Explain()
		}
		for _, h := range c.Holders {
			o.Holders = append(o.Holders, scanHolder{h.PID, h.TID, h.FD, h.Cloexec, quoted(snap.Processes[h.PID].Comm)})
		}
		for _, w := range c.Waiters {
			o.Waiters = append(o.Waiters, scanWaiter(w))
		}
		out.Connections = append(out.Connections, o)
	}
	return out
}

func newPeer(inode uint32, name, path sockpeer.Name, pid int, uid int64, exe string) peerOutput {
	return peerOutput{Inode: inode, Name: name.String(), Path: path.String(), PID: pid, UID: known(uid), Exe: quoted(exe)}
}

// state is whether a connection is in use.
func state(d *plan.Decision) string {
	switch {
	case d.Connection.Unaccepted:
		return "unaccepted"
	case d.Busy != "":
		return "busy"
	}
	return "idle"
}

func owner(p sockpeer.Peer) string {
	switch {
	case p.PID == 0:
		return ""
	case p.Exe == "":
		return strconv.Itoa(p.PID)
	}
	return strconv.Itoa(p.PID) + " " + quoted(filepath.Base(p.Exe))
}

func uid(n int64) string {
	if n < 0 {
		return "?"
	}
	return strconv.FormatInt(n, 10)
}
