// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"cmp"
	"slices"

	"golang.org/x/sys/unix"
)

// pending finds the listeners of the tree in whose backlog somebody from
// outside waits. Clients in the tree are dumped with it.
func (s *scan) pending() []Pending {
	var out []Pending
	for ino, holders := range s.holders {
		sk := s.sockets[ino]
		if sk.state != Listening || len(sk.icons) == 0 {
			continue
		}
		slices.SortFunc(holders, byHolder)
		p := Pending{Listener: holders[0], Name: sk.name}
		for _, client := range sk.icons {
			// 0: the client has closed it, and may have sent something.
			if client == 0 || s.outside(p.Listener, client) {
				p.Count++
			}
		}
		if p.Count == 0 {
			continue
		}
		if flags, err := readFdFlags(p.Listener.PID, p.Listener.TID, p.Listener.FD); err == nil {
			p.Listener.Cloexec = flags&unix.O_CLOEXEC != 0
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Pending) int { return byHolder(a.Listener, b.Listener) })
	return out
}

func byHolder(a, b Holder) int {
	return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.FD, b.FD), cmp.Compare(a.TID, b.TID))
}
