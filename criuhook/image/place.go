// SPDX-License-Identifier: Apache-2.0

package image

import "github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"

// SharesRoot reports whether paths mean to a process what they meant to CRIU
// at the dump, and will to CRIU at a restore: it is in CRIU's own mount
// namespace, and / is its root directory.
func (s *Set) SharesRoot(pid int) bool {
	for _, t := range s.tasks {
		if t.pid != pid {
			continue
		}
		if t.ids == nil || t.fs == nil || s.inv.RootIds == nil || t.ids.GetMntNsId() != s.inv.RootIds.GetMntNsId() {
			return false
		}
		for _, f := range s.files {
			if r := f.reg(); r != nil && f.entry.GetType() == fdinfo.FdTypes_REG && r.GetId() == t.fs.GetRootId() {
				return r.GetName() == "/"
			}
		}
	}
	return false
}

// OwnPIDNS reports whether the tree has a pid namespace of its own, so that
// its pids are not those that CRIU sees.
func (s *Set) OwnPIDNS() bool {
	r := s.root().ids
	return r == nil || s.inv.RootIds == nil || r.GetPidNsId() != s.inv.RootIds.GetPidNsId()
}
