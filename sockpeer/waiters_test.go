// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

func TestScanWaiters(t *testing.T) {
	needRoot(t)
	for call := range blockers {
		t.Run(call, func(t *testing.T) {
			noLeak(t)
			a, b := pair(t, sockpeer.Stream)
			closing(t, b)
			p := given(t, "block "+call, a)
			var got sockpeer.Waiter
			waits := func() bool {
				c := only(t, p.pid)
				if len(c.Waiters) == 0 {
					return false
				}
				got = c.Waiters[0]
				if len(c.Waiters) > 1 || got.PID != p.pid || got.FD != 3 || c.Busy() == "" {
					t.Fatalf("%+v", c)
				}
				return true
			}
			eventually(t, "a thread waits", waits)
			if got.Syscall != call {
				t.Errorf("waits in %s, want %s", got.Syscall, call)
			}
			before := got

			// As when CRIU has frozen it, and as that leaves it behind.
			check(t, unix.Kill(p.pid, unix.SIGSTOP))
			eventually(t, "the thread is stopped", func() bool { return procState(got.TID) == "T" })
			if !waits() || got != before {
				t.Errorf("stopped: %+v, was %+v", got, before)
			}
			check(t, unix.Kill(p.pid, unix.SIGCONT))
			eventually(t, "the thread runs", func() bool { return procState(got.TID) != "T" })
			eventually(t, "a thread waits again", waits)
			restarted := call == "poll" && strings.Contains(got.Syscall, "poll")
			if got.TID != before.TID || got.Syscall != call && !restarted {
				t.Errorf("continued: %+v, was %+v", got, before)
			}
			if call == "poll" {
				eventually(t, "it is the restarted poll", func() bool { return waits() && got.Syscall != call })
				check(t, unix.Kill(p.pid, unix.SIGSTOP))
				eventually(t, "the thread is stopped", func() bool { return procState(got.TID) == "T" })
				if !waits() {
					t.Error("not seen when stopped again")
				}
			}
		})
	}
}

// TestScanEpollWaiters: the socket is not what the thread waits on itself.
func TestScanEpollWaiters(t *testing.T) {
	needRoot(t)
	for how := range epollBlockers {
		t.Run(how, func(t *testing.T) {
			noLeak(t)
			a, b := pair(t, sockpeer.Stream)
			closing(t, b)
			p := given(t, "epoll "+how, a)
			eventually(t, "a thread waits", func() bool {
				s := scan(t, p.pid)
				if len(s.Connections) != 1 {
					return false // the fd is being moved
				}
				c := s.Connections[0]
				if len(c.Waiters) > 1 {
					t.Fatalf("%+v", c.Waiters)
				}
				return len(c.Waiters) == 1 && c.Waiters[0].FD == c.Holders[0].FD
			})
		})
	}
}

// TestScanNoWaiter: a thread that waits for something else.
func TestScanNoWaiter(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	c, d := pair(t, sockpeer.Stream)
	closing(t, b, d)
	idle := inode(t, c)
	p := given(t, "block read", a, c)
	eventually(t, "a thread waits", func() bool {
		s := scan(t, p.pid)
		return len(s.Connections) == 2 && len(s.Connections[0].Waiters) == 1
	})
	if got := find(scan(t, p.pid), idle); got == nil || got.Busy() != "" {
		t.Errorf("%+v", got)
	}
}

func TestScanChurn(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name("\x00sockpeer-churn")
	l := listener(t, sockpeer.Stream, name)
	check(t, unix.SetNonblock(l, true))
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	ino := inode(t, a)
	stop := make(chan bool)
	stopped := make(chan bool)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			unix.Poll([]unix.PollFd{{Fd: int32(l), Events: unix.POLLIN}}, 10)
			if fd, _, err := unix.Accept(l); err == nil {
				unix.Close(fd)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	p := given(t, "churn "+name.Pattern(), a)
	scans := 200
	if testing.Short() {
		scans = 20
	}
	for i := range scans {
		s, err := sockpeer.Scan(p.pid)
		if err != nil {
			t.Fatalf("scan %d: %v", i, err)
		}
		if i%10 == 0 {
			if s, err = sockpeer.ScanAll(); err != nil {
				t.Fatalf("scan %d of all: %v", i, err)
			}
		}
		c := find(s, ino)
		// A child, caught before its exec, can have the lower pid.
		if c == nil || !slices.Contains(c.Holders, sockpeer.Holder{PID: p.pid, TID: p.pid, FD: 3}) || c.Peer.PID == 0 {
			t.Fatalf("scan %d: %+v", i, c)
		}
	}
}
