// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func init() {
	blockers["poll"] = func(fd int) {
		p := pollfds(fd)
		unix.Syscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&p)), uintptr(len(p)), ^uintptr(0))
	}
	blockers["select"] = func(fd int) {
		var set unix.FdSet
		set.Set(fd)
		unix.Syscall6(unix.SYS_SELECT, uintptr(fd+1), uintptr(unsafe.Pointer(&set)), 0, 0, 0, 0)
	}
	blockers["epoll_wait"] = func(fd int) {
		ep := epoll(fd)
		defer unix.Close(ep)
		var ev [4]unix.EpollEvent
		unix.Syscall6(unix.SYS_EPOLL_WAIT, uintptr(ep), uintptr(unsafe.Pointer(&ev)), 4, ^uintptr(0), 0, 0)
	}
}
