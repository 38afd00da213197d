// SPDX-License-Identifier: Apache-2.0

package action

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
	"criuhook/criuhook/interpose"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// watchdogTime is how long CRIU may run without a system call. Another
// pre-dump script, which CRIU waits for, may take its time.
const watchdogTime = 10 * time.Minute

// Tracer is the process that the pre-dump script leaves on CRIU.
type Tracer struct {
	CRIU    int // pid
	Root    int // root task of the tree
	Rules   func() (*rule.Set, error)
	Log     *logrus.Logger
	Version string
	// Dead, if not empty, are the inodes that CRIU is to find dead, of a tree
	// that is frozen already; then nothing else is done. Netns is how many
	// network namespaces that tree has.
	Dead  []uint
	Netns int
}

// Run follows CRIU until it has read the tree's sockets. What goes wrong
// before CRIU runs on is told to the script; later, CRIU fails by itself on
// the connections that were left as they are, and the post-dump stage on the
// plan that is missing.
func (t *Tracer) Run() error {
	watchdog := time.AfterFunc(watchdogTime, t.giveUp)
	defer watchdog.Stop()

	if len(t.Dead) > 0 {
		return t.showDead(watchdog)
	}
	d, tracer, err := t.prepare(watchdog)
	if err != nil {
		interpose.Ready(err)
		return nil // the script says it
	}
	interpose.Ready(nil)
	calls := sockpeer.Calls{}
	tracer.BeforeSeize = calls.Note
	decide := func() (map[uint32]interpose.Form, int, error) {
		return t.decide(d, calls, watchdog)
	}
	err = tracer.Run(decide, func() { watchdog.Reset(watchdogTime) })
	if errors.Is(err, interpose.ErrEnded) {
		return nil // CRIU has said why
	}
	return err
}

// showDead only follows CRIU: everything has been decided.
func (t *Tracer) showDead(watchdog *time.Timer) error {
	tracer, err := interpose.New(t.CRIU)
	interpose.Ready(err)
	if err != nil {
		return nil // told
	}
	forms := map[uint32]interpose.Form{}
	for _, inode := range t.Dead {
		forms[uint32(inode)] = interpose.Dead
	}
	err = tracer.Run(func() (map[uint32]interpose.Form, int, error) { return forms, t.Netns, nil },
		func() { watchdog.Reset(watchdogTime) })
	if errors.Is(err, interpose.ErrEnded) {
		return nil // CRIU has said why
	}
	return err
}

// giveUp ends the process, and with it the tracing: the kernel lets CRIU run on.
func (t *Tracer) giveUp() {
	// Whoever reads the log may be what holds us up.
	go t.Log.Errorf("CRIU, process %d, or what it reads and writes, has not moved for long: it is left alone, and cannot dump what leaves the tree of process %d", t.CRIU, t.Root)
	time.Sleep(time.Second)
	os.Exit(1)
}

func (t *Tracer) prepare(watchdog *time.Timer) (*dump.Dump, *interpose.Tracer, error) {
	rules, err := t.Rules()
	if err != nil {
		return nil, nil, err
	}
	id, err := dump.ID(t.CRIU)
	if err != nil {
		return nil, nil, err
	}
	d := &dump.Dump{Root: t.Root, Rules: rules, Log: t.Log, Version: t.Version, ID: id, Service: rpcSocket(t.CRIU)}
	if err := t.awaitIdle(d, watchdog); err != nil {
		return nil, nil, err
	}
	tracer, err := interpose.New(t.CRIU)
	if errors.Is(err, interpose.ErrTraced) {
		err = fmt.Errorf("%w; an action script must trace CRIU. Stop the other tracer, or dump with \"criuhook dump\" or \"criuhook criu dump\", which need not trace", err)
	}
	return d, tracer, err
}

// awaitIdle lets the application run on while a rule waits for a busy
// connection, but no longer than CRIU lives.
func (t *Tracer) awaitIdle(d *dump.Dump, watchdog *time.Timer) error {
	criu, err := unix.PidfdOpen(t.CRIU, 0)
	if err != nil {
		return fmt.Errorf("watch CRIU, process %d: %w", t.CRIU, err)
	}
	defer unix.Close(criu)
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	return d.AwaitIdle(ctx, time.Now(), func() {
		watchdog.Reset(watchdogTime)
		// A pidfd is readable once the process has ended (pidfd_open(2)).
		end := []unix.PollFd{{Fd: int32(criu), Events: unix.POLLIN}}
		if n, err := unix.Poll(end, 0); err == nil && n > 0 {
			cancel(interpose.ErrEnded)
		}
	})
}

// decide scans the frozen tree and writes the plan, each in its time.
func (t *Tracer) decide(d *dump.Dump, calls sockpeer.Calls, watchdog *time.Timer) (map[uint32]interpose.Form, int, error) {
	if interpose.TracerOf(t.Root) != t.CRIU {
		return nil, 0, nil // CRIU has not seized the tree yet
	}
	ctx := context.Background() // the watchdog ends this process
	dir := fmt.Sprintf("/proc/self/fd/%d", interpose.DirFD)
	// Refused or not: from here on CRIU overwrites the images that an earlier
	// record belongs to.
	watchdog.Reset(dump.WriteTime)
	if err := image.RemoveStale(ctx, dir); err != nil {
		return nil, 0, err
	}
	watchdog.Reset(dump.LookTime)
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", t.CRIU))
	if err != nil {
		return nil, 0, fmt.Errorf("read the command line of CRIU, process %d: %w", t.CRIU, err)
	}
	if err := d.WarnGhosts(strings.Split(string(args), "\x00")); err != nil {
		return nil, 0, err
	}
	decided, err := d.Decide(calls)
	if err != nil {
		return nil, 0, err
	}
	watchdog.Reset(dump.WriteTime)
	if err := d.Note(ctx, dir, decided); err != nil {
		return nil, 0, err
	}
	forms := map[uint32]interpose.Form{}
	for i := range decided.Plan.Decisions {
		c := &decided.Plan.Decisions[i]
		forms[c.Connection.Inode] = interpose.Dormant
		if c.Action == rule.Hangup {
			forms[c.Connection.Inode] = interpose.Dead
		}
	}
	return forms, len(decided.Snapshot.Netns), nil
}
