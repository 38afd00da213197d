// SPDX-License-Identifier: Apache-2.0

package sockpeer

import "golang.org/x/sys/unix"

// waitCalls are the system calls in which a thread can wait on a socket. The
// numbers are the architecture's; calls that only some have are added beside.
var waitCalls = map[int]waitCall{
	unix.SYS_READ:            {"read", waitFD},
	unix.SYS_READV:           {"readv", waitFD},
	unix.SYS_PREADV2:         {"preadv2", waitFD},
	unix.SYS_RECVFROM:        {"recvfrom", waitFD},
	unix.SYS_RECVMSG:         {"recvmsg", waitFD},
	unix.SYS_RECVMMSG:        {"recvmmsg", waitFD},
	unix.SYS_WRITE:           {"write", waitFD},
	unix.SYS_WRITEV:          {"writev", waitFD},
	unix.SYS_PWRITEV2:        {"pwritev2", waitFD},
	unix.SYS_SENDTO:          {"sendto", waitFD},
	unix.SYS_SENDMSG:         {"sendmsg", waitFD},
	unix.SYS_SENDMMSG:        {"sendmmsg", waitFD},
	unix.SYS_SENDFILE:        {"sendfile", waitFD},
	unix.SYS_SPLICE:          {"splice", waitFD},
	unix.SYS_CONNECT:         {"connect", waitFD},
	unix.SYS_PPOLL:           {"ppoll", waitPoll},
	unix.SYS_PSELECT6:        {"pselect6", waitSelect},
	unix.SYS_EPOLL_PWAIT:     {"epoll_pwait", waitEpoll},
	unix.SYS_EPOLL_PWAIT2:    {"epoll_pwait2", waitEpoll},
	unix.SYS_RESTART_SYSCALL: {"poll, interrupted before", waitRestart},
}
