// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// keepUnnamed makes sure that connect() on the socket gives it no name, and
// returns how to take that back. A socket that asks for credentials is bound
// when it connects (unix_autobind, net/unix/af_unix.c); one that asked later,
// and is to be connected again, never was.
func keepUnnamed(fd int) (restore func() error, err error) {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("ask for the name of a socket: %w", err)
	}
	if sa, ok := name.(*unix.SockaddrUnix); !ok || sa.Name != "" && sa.Name != "@" {
		return func() error { return nil }, nil
	}
	var set []int
	restore = func() error {
		var errs []error
		for _, opt := range set {
			errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1))
		}
		if err := errors.Join(errs...); err != nil {
			return fmt.Errorf("let a socket ask for credentials again: %w", err)
		}
		return nil
	}
	for _, opt := range []int{unix.SO_PASSCRED, unix.SO_PASSPIDFD} {
		// An error: the kernel does not know the option.
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt); err != nil || on == 0 {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 0); err != nil {
			return nil, errors.Join(fmt.Errorf("connect a socket without a name: %w", err), restore())
		}
		set = append(set, opt)
	}
	return restore, nil
}
