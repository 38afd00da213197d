// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"criuhook/criuhook/image"
	"criuhook/criuhook/inspect"
	"criuhook/criuhook/rule"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// The JSON of "criuhook inspect". docs/json.md describes it; keys are never
// renamed or taken away.
type (
	inspectOutput struct {
		ImagesDir   string              `json:"images_dir"`
		RootPID     int                 `json:"root_pid"`
		Processes   int                 `json:"processes"`
		OwnNetns    bool                `json:"own_netns"`
		Record      *recordOutput       `json:"record"`
		Rebuilt     bool                `json:"rebuilt"`
		Refused     string              `json:"refused,omitempty"`
		Warnings    []string            `json:"warnings,omitempty"`
		Connections []inspectConnection `json:"connections"`
		Sockets     []inspectSocket     `json:"sockets"`
		Caches      []inspectCache      `json:"caches"`
	}
	recordOutput struct {
		WrittenBy string `json:"written_by"`
		DumpID    string `json:"dump_id"`
		Time      string `json:"time,omitempty"`
	}
	inspectConnection struct {
		Inode     uint32           `json:"inode"`
		Type      string           `json:"type"`
		Form      string           `json:"form"`
		Name      string           `json:"name,omitempty"`
		Peer      peerOutput       `json:"peer"`
		Holders   []inspectHolder  `json:"holders"`
		Action    string           `json:"action"`
		Rule      string           `json:"rule,omitempty"`
		Busy      string           `json:"busy,omitempty"`
		Reason    string           `json:"reason,omitempty"`
		Reconnect *reconnectOutput `json:"reconnect"`
		Restore   restoreOutput    `json:"restore"`
	}
	inspectHolder struct {
		PID     int    `json:"pid"`
		FD      int    `json:"fd"`
		Cloexec bool   `json:"cloexec"`
		Command string `json:"command,omitempty"`
	}
	reconnectOutput struct {
		To          string `json:"to"`
		OrTo        string `json:"or_to,omitempty"`
		UID         uint32 `json:"uid"`
		GID         uint32 `json:"gid"`
		Prelude     string `json:"prelude"`
		Timeout     string `json:"timeout"`
		Absent      string `json:"absent"`
		ListenerUID *int64 `json:"listener_uid"`
	}
	restoreOutput struct {
		Result      string `json:"result"`
		Why         string `json:"why"`
		Listens     bool   `json:"listens"`
		ListenerUID *int64 `json:"listener_uid"`
	}
	inspectSocket struct {
		Inode    uint32          `json:"inode"`
		Type     string          `json:"type"`
		Form     string          `json:"form"`
		Name     string          `json:"name,omitempty"`
		Peer     uint32          `json:"peer,omitempty"`
		PeerName string          `json:"peer_name,omitempty"`
		Queued   uint64          `json:"queued"`
		Holders  []inspectHolder `json:"holders"`
	}
	inspectCache struct {
		Path     string `json:"path"`
		Unlinked bool   `json:"unlinked"`
		Mappings int    `json:"mappings"`
		FDs      int    `json:"fds"`
		Edited   bool   `json:"edited"`
	}
)

func newInspectOutput(dir string, r *inspect.Report) inspectOutput {
	out := inspectOutput{
		ImagesDir: quoted(dir), RootPID: r.RootPID, Processes: r.Processes, OwnNetns: r.OwnNetns, Rebuilt: r.Rebuilt, Refused: r.Refused, Warnings: r.Warnings,
		Connections: []inspectConnection{}, Sockets: []inspectSocket{}, Caches: []inspectCache{},
	}
	if r.Record != nil {
		out.Record = &recordOutput{WrittenBy: quoted(r.Record.GetWrittenBy()), DumpID: quoted(r.Record.GetDumpId())}
		if at := r.Time(); !at.IsZero() {
			out.Record.Time = at.UTC().Format(time.RFC3339)
		}
	}
	for i := range r.Connections {
		out.Connections = append(out.Connections, newInspectConnection(&r.Connections[i]))
	}
	for _, s := range r.Sockets {
		out.Sockets = append(out.Sockets, inspectSocket{
			Inode: s.Inode, Type: s.Type.String(), Form: string(s.Form), Name: s.Name.String(), Peer: s.Peer,
			PeerName: s.PeerName.String(), Queued: s.Queued, Holders: socketHolders(s.Holders),
		})
	}
	for _, c := range r.Record.GetCaches() {
		out.Caches = append(out.Caches, inspectCache{quoted(c.GetPath()), c.GetUnlinked(), int(c.GetMappings()), int(c.GetFds()), true})
	}
	for _, c := range r.Caches {
		out.Caches = append(out.Caches, inspectCache{quoted(c.Path), c.Unlinked, c.Mappings, len(c.Holders), false})
	}
	return out
}

func newInspectConnection(c *inspect.Connection) inspectConnection {
	p := c.GetPeer()
	peerUID := int64(-1)
	if p != nil {
		peerUID = p.GetUid()
	}
	out := inspectConnection{
		Inode: c.GetInode(), Type: sockpeer.Type(c.GetType()).String(), Form: string(c.Form),
		Name:    sockpeer.Name(c.GetName()).String(),
		Peer:    newPeer(p.GetInode(), sockpeer.Name(p.GetName()), sockpeer.Name(p.GetPath()), int(p.GetPid()), peerUID, p.GetExe()),
		Holders: []inspectHolder{},
		Action:  actionName(c.GetAction()), Rule: quoted(c.GetRule()), Busy: quoted(c.GetBusy()), Reason: quoted(c.GetReason()),
		Restore: restoreOutput{Result: string(c.Restore.Result), Why: c.Restore.Why, Listens: c.Restore.Listener != nil},
	}
	if l := c.Restore.Listener; l != nil {
		out.Restore.ListenerUID = known(l.UID)
	}
	for _, h := range c.GetHolders() {
		out.Holders = append(out.Holders, inspectHolder{int(h.GetPid()), int(h.GetFd()), h.GetCloexec(), quoted(h.GetComm())})
	}
	if c.GetAction() == proto.Action_ACTION_RECONNECT {
		out.Reconnect = newReconnect(c.Connection)
	}
	return out
}

func newReconnect(c *proto.Connection) *reconnectOutput {
	r := c.GetReconnect()
	absent := rule.AbsentHangup
	if r.GetAbsentFails() {
		absent = rule.AbsentFail
	}
	return &reconnectOutput{
		To: sockpeer.Name(r.GetTo()).String(), OrTo: sockpeer.Name(r.GetOrTo()).String(), UID: c.GetIdentity().GetUid(), GID: c.GetIdentity().GetGid(),
		Prelude: r.GetPrelude(), Timeout: time.Duration(r.GetTimeoutNs()).String(), Absent: absent.String(),
		ListenerUID: known(r.GetListenerUid()),
	}
}

func socketHolders(hs []image.Holder) []inspectHolder {
	out := []inspectHolder{}
	for _, h := range hs {
		out = append(out, inspectHolder{PID: h.PID, FD: h.FD, Cloexec: h.Cloexec})
	}
	return out
}

// known is a uid as JSON has it: null for one that is not known.
func known(uid int64) *int64 {
	if uid < 0 {
		return nil
	}
	return &uid
}
