// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer/child"
)

// keepID is -1 in setresuid(2): leave this id as it is.
const keepID = ^uintptr(0)

// Do runs fn with the identity: ids, supplementary groups and effective
// capabilities of id, for fn's thread alone. What the kernel checks and shows of
// a client (SO_PEERCRED, SO_PEERGROUPS, file permissions) is that of id. The
// real and saved ids stay ours: by them the user could signal the thread, and so
// end or stop this process (kill(2)). Of what SCM_CREDENTIALS carry, which is the
// real ids else, [Socket.Stream] takes care.
//
// fn must not start goroutines that need the identity.
func (id Identity) Do(fn func() error) error {
	return onThread(func() error {
		if err := id.take(); err != nil {
			return fmt.Errorf("become uid %d, gid %d with %d groups: %w", id.UID, id.GID, len(id.Groups), err)
		}
		return fn()
	})
}

// onThread runs fn on a thread of its own that is thrown away: what fn changes
// of it must serve nobody else.
func onThread(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			errc <- fn()
			return
		}
		// The first thread cannot end, and is what /proc shows of the
		// process. While it is locked, the goroutine gets another.
		errc <- onThread(fn)
		runtime.UnlockOSThread()
	}()
	return <-errc
}

// take changes the calling thread. Raw system calls, because those of the
// standard library change all threads of a process.
func (id Identity) take() error {
	var groups unsafe.Pointer
	if len(id.Groups) > 0 {
		groups = unsafe.Pointer(&id.Groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(id.Groups)), uintptr(groups), 0); e != 0 {
		return fmt.Errorf("setgroups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, keepID, uintptr(id.GID), keepID); e != 0 {
		return fmt.Errorf("setresgid: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keepID, uintptr(id.UID), keepID); e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	return limitCapabilities(id.CapEff)
}

// addTake adds to the calls of a child what take does.
func (id Identity) addTake(p *child.Program) error {
	hdr, data, err := capabilities(id.CapEff)
	if err != nil {
		return err
	}
	groups := append(slices.Clone(id.Groups), 0) // never empty
	p.Call(unix.SYS_SETGROUPS, child.Args{uintptr(len(id.Groups)), p.Pointer(unsafe.Pointer(&groups[0]))})
	p.Call(unix.SYS_SETRESGID, child.Args{keepID, uintptr(id.GID), keepID})
	p.Call(unix.SYS_SETRESUID, child.Args{keepID, uintptr(id.UID), keepID})
	p.Call(unix.SYS_CAPSET, child.Args{p.Pointer(unsafe.Pointer(hdr)), p.Pointer(unsafe.Pointer(data))})
	return nil
}

// limitCapabilities leaves the calling thread no effective capability that is
// not in mask. Leaving euid 0 has cleared them all already; a root with fewer
// capabilities than ours, as in a container, has not.
func limitCapabilities(mask uint64) error {
	hdr, data, err := capabilities(mask)
	if err != nil {
		return err
	}
	if err := unix.Capset(hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// capabilities are those of the calling thread, limited to mask, for capset(2).
// What is permitted does not change with the ids: the saved uid stays.
func capabilities(mask uint64) (*unix.CapUserHeader, *[2]unix.CapUserData, error) {
	hdr := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{}
	if err := unix.Capget(hdr, &data[0]); err != nil {
		return nil, nil, fmt.Errorf("capget: %w", err)
	}
	data[0].Effective = data[0].Permitted & uint32(mask)
	data[1].Effective = data[1].Permitted & uint32(mask>>32)
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return hdr, data, nil
}

// Elevated reports whether we have rights that our caller may not have: we run
// set-user-id or set-group-id, or have file capabilities (AT_SECURE in
// getauxval(3)). Then nothing of the caller's may decide whom we trust.
func Elevated() bool {
	if os.Geteuid() != os.Getuid() || os.Getegid() != os.Getgid() {
		return true
	}
	const atSecure = 23
	vector, err := unix.Auxv()
	return err == nil && slices.ContainsFunc(vector, func(v [2]uintptr) bool { return v[0] == atSecure && v[1] != 0 })
}
