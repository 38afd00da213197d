// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

func itoa(n int) string { return strconv.Itoa(n) }

func TestStream(t *testing.T) {
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, a)
	s := sockpeer.NewSocket(a, "ours")
	theirs := sockpeer.NewSocket(b, "theirs")
	flags := must(unix.FcntlInt(uintptr(a), unix.F_GETFL, 0))(t)
	ctx := soon(t, patience)

	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // more than the buffers hold
	got := make(chan []byte)
	go func() {
		x := make([]byte, len(big))
		n, _ := io.ReadFull(theirs.Stream(ctx), x)
		got <- x[:n]
	}()
	n, err := s.Stream(ctx).Write(big)
	check(t, err)
	if x := <-got; n != len(big) || !bytes.Equal(x, big) {
		t.Errorf("wrote %d, read %d", n, len(x))
	}

	short := soon(t, 10*time.Millisecond)
	if _, err := s.Stream(short).Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing to read: %v", err)
	}
	short = soon(t, 10*time.Millisecond)
	if _, err := s.Stream(short).Write(big); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody reads: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Stream(cancelled).Read(make([]byte, 1)); err == nil {
		t.Error("read after it was cancelled")
	}
	if after := must(unix.FcntlInt(uintptr(a), unix.F_GETFL, 0))(t); after != flags {
		t.Errorf("flags %o became %o", flags, after)
	}

	check(t, theirs.Close())
	s2 := s.Stream(soon(t, patience))
	if _, err := s2.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write to a closed one: %v", err)
	}
	if _, err := io.ReadAll(s2); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read from a closed one: %v", err)
	}
	if _, err := s2.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read its end: %v", err)
	}
}

// TestStreamCancelled: a cancellation without a deadline ends a wait too.
func TestStreamCancelled(t *testing.T) {
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, a, b)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := sockpeer.NewSocket(a, "ours").Stream(ctx).Read(make([]byte, 1))
		done <- err
	}()
	cancel()
	if err := <-done; err == nil {
		t.Error("read something")
	}
}
