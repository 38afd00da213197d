// SPDX-License-Identifier: Apache-2.0

package service

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// onOwnThread runs fn on a thread that ends with it. To be called on a goroutine
// of its own.
func onOwnThread(fn func() error) error {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if unix.Gettid() != unix.Getpid() {
		return fn()
	}
	// The first thread cannot end. While it is locked, another goroutine gets another.
	done := make(chan error, 1)
	go func() { done <- onOwnThread(fn) }()
	err := <-done
	runtime.UnlockOSThread()
	return err
}
