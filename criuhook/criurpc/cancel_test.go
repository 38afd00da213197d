// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
)

// All in this file is against a FAKE criu, see fake_test.go.

var errStop = errors.New("told to stop")

// whenUp cancels when the fake has the request.
func whenUp(t *testing.T, dir string, cancel func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if _, err := os.Stat(filepath.Join(dir, "up")); err == nil {
				break
			}
		}
		cancel()
	}()
	t.Cleanup(func() { <-done })
}

func TestCancelBefore(t *testing.T) {
	nothingLeft(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errStop)
	if _, err := criurpc.Run(ctx, pretend("dump"), dumpRequest(t.TempDir()), nil); !errors.Is(err, errStop) {
		t.Errorf("error: %v", err)
	}
	c, err := criurpc.Start(pretend("versions"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Version(ctx); !errors.Is(err, errStop) {
		t.Errorf("error: %v", err)
	}
	// CRIU was not bothered.
	if _, err := c.Version(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCancelInNotification(t *testing.T) {
	stages := []criurpc.Stage{criurpc.StagePreDump, criurpc.StageQueryExtFiles, criurpc.StagePostDump}
	for _, stage := range stages {
		for _, obedient := range []bool{true, false} {
			t.Run(string(stage)+"/"+strconv.FormatBool(obedient), func(t *testing.T) {
				nothingLeft(t)
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				c, err := criurpc.Start(pretend("dump"))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				resp, err := c.Do(ctx, dumpRequest(t.TempDir()),
					criurpc.HandlerFunc(func(ctx context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
						if n.Stage != stage {
							return nil, nil
						}
						cancel(errStop)
						if obedient {
							<-ctx.Done()
							return nil, ctx.Err()
						}
						// CRIU has its answer, and is through, while we are not.
						c.Wait()
						return nil, nil
					}))
				if !errors.Is(err, errStop) || resp == nil || resp.GetSuccess() {
					t.Errorf("answer %v, error %v", resp, err)
				}
				if got := c.Wait().ExitCode(); got != 1 {
					t.Errorf("exit code %d, want 1: CRIU could not clean up", got)
				}
			})
		}
	}
}

func TestCancelBetweenNotifications(t *testing.T) {
	nothingLeft(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	dir := t.TempDir()
	whenUp(t, dir, func() { cancel(errStop) })
	_, err := criurpc.Run(ctx, pretend("long"), dumpRequest(dir), nil)
	if !errors.Is(err, errStop) {
		t.Errorf("error: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "clean")); err != nil {
		t.Error("CRIU could not clean up")
	}
}

func TestCancelTooLate(t *testing.T) {
	nothingLeft(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	dir := t.TempDir()
	whenUp(t, dir, func() { cancel(errStop) })
	resp, err := criurpc.Run(ctx, pretend("late"), dumpRequest(dir), nil)
	if err != nil || !resp.GetSuccess() {
		t.Errorf("answer %v, error %v: it was done", resp, err)
	}
}

func TestCancelHanging(t *testing.T) {
	nothingLeft(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	dir := t.TempDir()
	whenUp(t, dir, func() { cancel(errStop) })
	config := pretend("hang")
	config.Grace = 50 * time.Millisecond
	holdStdin(t, &config)
	_, err := criurpc.Run(ctx, config, dumpRequest(dir), nil)
	if !errors.Is(err, errStop) || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("error: %v", err)
	}
	// Its child went with it.
	b, err := os.ReadFile(filepath.Join(dir, "up"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child of CRIU is gone", func() bool { return ended(pid) })
}

func TestCloseDuringRequest(t *testing.T) {
	nothingLeft(t)
	dir := t.TempDir()
	c, err := criurpc.Start(pretend("long"))
	if err != nil {
		t.Fatal(err)
	}
	whenUp(t, dir, func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = c.Do(t.Context(), dumpRequest(dir), nil)
	if err == nil || !strings.Contains(err.Error(), "was closed in the middle") {
		t.Errorf("error: %v", err)
	}
}

func TestCloseUnused(t *testing.T) {
	nothingLeft(t)
	for range 20 {
		c, err := criurpc.Start(pretend("dump"))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
}

// ended: gone, or a zombie that only its new parent can reap.
func ended(pid int) bool {
	if errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
		return true
	}
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	f := strings.Fields(string(b[max(strings.LastIndexByte(string(b), ')'), 0):]))
	return len(f) < 2 || slices.Contains([]string{"Z", "X"}, f[1])
}
