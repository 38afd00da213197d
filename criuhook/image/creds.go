// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"

	"criuhook/sockpeer"
)

// Creds are the rights of a process.
type Creds struct {
	// Identity is that of its first thread.
	Identity sockpeer.Identity
	// Mixed: another thread has another one.
	Mixed bool
	// OwnUserns: it is in another user namespace than CRIU was, and all
	// numbers are those of that namespace.
	OwnUserns bool
}

// Creds reads the rights of a process, a pid as in PIDs, from its threads'
// images.
func (s *Set) Creds(pid int) (Creds, error) {
	t, err := s.task(pid)
	if err != nil {
		return Creds{}, err
	}
	out := Creds{OwnUserns: s.inv.RootIds != nil && t.ids != nil && t.ids.GetUserNsId() != s.inv.RootIds.GetUserNsId()}
	for i, th := range t.threads {
		id, err := identity(th.creds)
		if err != nil {
			return Creds{}, fmt.Errorf("read %s: %w", s.f.path(coreName(th.call.TID)), err)
		}
		if i == 0 {
			out.Identity = id
		}
		out.Mixed = out.Mixed || !alike(out.Identity, id)
	}
	return out, nil
}

// Comm is the name of a process, a pid as in PIDs.
func (s *Set) Comm(pid int) (string, error) {
	t, err := s.task(pid)
	if err != nil {
		return "", err
	}
	return t.threads[0].comm, nil
}

func identity(e *creds.CredsEntry) (sockpeer.Identity, error) {
	switch {
	case e == nil:
		return sockpeer.Identity{}, errors.New("it does not say what the thread's rights were: a zombie, or a CRIU that is too old; dump with a current CRIU")
	case len(e.GetCapEff()) == 0 || len(e.GetCapEff()) > 2:
		return sockpeer.Identity{}, fmt.Errorf("it has %d words of effective capabilities where 2 are expected: the image is damaged", len(e.GetCapEff()))
	case len(e.GetGroups()) > maxGroups:
		return sockpeer.Identity{}, fmt.Errorf("it has %d groups, at most %d are possible", len(e.GetGroups()), maxGroups)
	}
	id := sockpeer.Identity{UID: e.GetEuid(), GID: e.GetEgid(), Groups: slices.Clone(e.GetGroups())}
	for i, word := range e.GetCapEff() { // the lower one first
		id.CapEff |= uint64(word) << (32 * i)
	}
	return id, nil
}

// alike: the kernel would not tell one from the other.
func alike(a, b sockpeer.Identity) bool {
	return a.UID == b.UID && a.GID == b.GID && a.CapEff == b.CapEff && slices.Equal(groupSet(a.Groups), groupSet(b.Groups))
}

func groupSet(groups []uint32) []uint32 {
	out := slices.Clone(groups)
	slices.Sort(out)
	return slices.Compact(out)
}

func coreName(tid int) string { return fmt.Sprintf("core-%d.img", tid) }

// thread is what the images tell of one thread.
type thread struct {
	comm  string // only of the first one
	call  Call
	creds *creds.CredsEntry
}

// task returns a task with its threads. Those are read when they are first
// asked for: each has an image of its own, and most are never needed.
func (s *Set) task(pid int) (*task, error) {
	i := slices.IndexFunc(s.tasks, func(t *task) bool { return t.pid == pid })
	if i < 0 {
		return nil, fmt.Errorf("read %s: there is no process %d", s.f.path("pstree.img"), pid)
	}
	s.threadsMu.Lock()
	defer s.threadsMu.Unlock()
	t := s.tasks[i]
	if t.threads != nil {
		return t, nil
	}
	f, err := s.reopen()
	if err != nil {
		return nil, err
	}
	defer f.close()
	var threads []thread
	for _, tid := range t.tids {
		c := &criu_core.CoreEntry{}
		found, err := f.one(coreName(tid), magicCore, c)
		if err == nil && !found {
			err = fmt.Errorf("read %s: there is none: the dump is not complete", f.path(coreName(tid)))
		}
		if err != nil {
			return nil, err
		}
		threads = append(threads, thread{c.GetTc().GetComm(), callOf(tid, c), c.GetThreadCore().GetCreds()})
	}
	t.threads = threads
	return t, nil
}

// reopen opens the images directory again, and no other one.
func (s *Set) reopen() (*folder, error) {
	f, err := openFolder(s.f.at)
	if err != nil {
		return nil, err
	}
	now, err := f.root.Stat(".")
	if err == nil && !os.SameFile(s.dir, now) {
		err = errors.New("another directory is there than before")
	}
	if err != nil {
		f.close()
		return nil, fmt.Errorf("read %s again: %w; keep the images in place and try again", s.f.dir, err)
	}
	return f, nil
}

// maxTID bounds process and thread ids (the kernel's PID_MAX_LIMIT).
const maxTID = 1 << 22

// threadIDs lists the threads of a process, the first one first. CRIU has it
// among them, and lists none of a zombie. seen are those of all processes.
func threadIDs(pid int, listed []uint32, seen map[int]bool) ([]int, error) {
	out, first := []int{pid}, false
	for _, l := range listed {
		tid := int(l)
		if tid == pid && !first {
			first = true
			continue
		}
		if tid == 0 || tid > maxTID || tid == pid || seen[tid] {
			return nil, fmt.Errorf("process %d cannot have the thread %d, or another has it too: the image is damaged", pid, tid)
		}
		seen[tid] = true
		out = append(out, tid)
	}
	return out, nil
}
