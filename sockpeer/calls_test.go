// SPDX-License-Identifier: Apache-2.0

package sockpeer

import "testing"

func TestInterrupted(t *testing.T) {
	const (
		poll    = "73 0xffff0000 0x1 0x0 0x0 0x0 0x8 0xfffe1000 0x4000a4"
		stopped = "-1 0xfffe1000 0x4000a0" // at the svc: to be restarted
		ended   = "-1 0xfffe1000 0x4000a4" // behind it: EINTR
	)
	code := func(addr uint64) uint32 {
		if addr == 0x4000a0 {
			return svc
		}
		return 0xd503201f // nop
	}
	tests := []struct {
		name, now, before, call string
		unknown                 bool
	}{
		{name: "restarted", now: stopped, before: poll, call: poll},
		{name: "ended by the stop", now: ended, before: poll, call: poll},
		{name: "not seen before", now: stopped, unknown: true},
		{name: "was running", now: stopped, before: "running\n", unknown: true},
		{name: "another stack", now: "-1 0xfffe0ff0 0x4000a0", before: poll, unknown: true},
		{name: "another place", now: stopped, before: "73 0x0 0x1 0x0 0x0 0x0 0x8 0xfffe1000 0x5000a4", unknown: true},
		{name: "in its own code", now: "-1 0xfffe1000 0x400200", before: poll},
		{name: "garbage", now: "-1", before: poll},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			call, unknown := interrupted(tt.now, tt.before, code)
			if call != tt.call || unknown != tt.unknown {
				t.Errorf("call %q, unknown %v; expected %q, %v", call, unknown, tt.call, tt.unknown)
			}
		})
	}
}

func TestWaiterString(t *testing.T) {
	for call, want := range map[string]string{
		"read":      "thread 8 waits in read on fd 5",
		unknownCall: "thread 8 may wait on fd 5, in a system call that the kernel does not tell",
		compatCall:  "thread 8 may wait on fd 5, in a system call of a 32-bit program",
	} {
		if got := (Waiter{PID: 7, TID: 8, FD: 5, Syscall: call}).String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
