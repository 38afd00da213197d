// SPDX-License-Identifier: Apache-2.0

package sockpeer

import "golang.org/x/sys/unix"

func init() {
	waitCalls[unix.SYS_POLL] = waitCall{"poll", waitPoll}
	waitCalls[unix.SYS_SELECT] = waitCall{"select", waitSelect}
	waitCalls[unix.SYS_EPOLL_WAIT] = waitCall{"epoll_wait", waitEpoll}
}

// hidesCalls: a stopped thread does not show the system call it is in.
const hidesCalls = false
