// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"criuhook/criuhook/image"
	"criuhook/sockpeer/child"
)

// lastPID is after which pid the kernel looks for the next (pid_namespaces(7)).
const lastPID = "/proc/sys/kernel/ns_last_pid"

// What is done where lastPID cannot be written to, as in most containers, where
// pids are low and those of a restore the next ones.
const (
	// ahead is how many processes and threads of ours and CRIU's there may be
	// during a restore, beside those of the images.
	ahead = 256
	// maxSteps bounds how many pids are used up, about a millisecond each.
	maxSteps = 2048
)

// StepAside keeps processes and threads of ours, and those that CRIU has beside
// the tree, off the pids that are to be restored, as far as that can be: the next
// ones come after them. Where threads of ours are in the way already, it calls
// again, if it is not nil, to execute this program anew in this process. Our own
// pid nothing changes.
func (r *Restore) StepAside(again func() error) {
	set := r.set
	if set == nil { // there is nothing to reconnect
		var err error
		if set, err = image.Open(r.dir); err != nil {
			return // CRIU says better than we what is wrong with them
		}
	}
	if set.OwnPIDNS() {
		return
	}
	last, err := readLastPID()
	if err != nil { // not every kernel has it, and it may be hidden
		if last, err = child.Next(); err != nil {
			return
		}
	}
	ids := set.IDs()
	if most := set.MaxPID(); last < most && os.WriteFile(lastPID, []byte(strconv.Itoa(most)), 0) != nil {
		r.useUp(last, behind(ids, last))
	}
	if again == nil {
		return
	}
	if tid := threadAmong(ids); tid != 0 {
		r.log.Debugf("thread %d of criuhook has a pid of the images: executing criuhook again", tid)
		if err := again(); err != nil {
			r.log.Debugf("execute criuhook again: %v", err)
		}
	}
}

// behind is the lowest pid from last on after which ids, in order, leave room.
func behind(ids []int, last int) int {
	for _, id := range ids {
		if id > last+ahead {
			break
		}
		last = max(last, id)
	}
	return last
}

// useUp has the kernel give pids to processes that end at once, up to the last
// one.
func (r *Restore) useUp(from, last int) {
	if last-from > maxSteps {
		r.log.Debugf("pids from %d to %d are not used up beforehand, to keep criuhook and CRIU off them: too many", from+1, last)
		return
	}
	for at := from; at < last; {
		pid, err := child.Next()
		if err != nil || pid < at { // from the beginning again: no more above
			r.log.Debugf("pids are used up only to %d instead of %d: %v", at, last, err)
			return
		}
		at = pid
	}
}

// threadAmong is a thread of ours that has one of ids, in order; 0: none.
func threadAmong(ids []int) int {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return 0
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil || tid == os.Getpid() {
			continue
		}
		if _, is := slices.BinarySearch(ids, tid); is {
			return tid
		}
	}
	return 0
}

func readLastPID() (int, error) {
	b, err := os.ReadFile(lastPID)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}
