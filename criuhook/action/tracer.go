// SPDX-License-Identifier: Apache-2.0

package action

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/criuhook/interpose"
	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

const (
	// watchdogTime is how long CRIU may run without a system call. Another
	// pre-dump script, which CRIU waits for, may take its time.
	watchdogTime = 10 * time.Minute
	// frozenTime is how long deciding may take, while the tree is frozen.
	frozenTime = 30 * time.Second
	// busyInterval is how often a connection is looked at that a rule waits
	// for.
	busyInterval = 10 * time.Millisecond
)

// Tracer is the process that the pre-dump script leaves on CRIU.
type Tracer struct {
	CRIU    int // pid
	Root    int // root task of the tree
	Rules   func() (*rule.Set, error)
	Log     *logrus.Logger
	Version string
}

// Run follows CRIU until it has read the tree's sockets. What goes wrong
// before CRIU runs on is told to the script; later, CRIU fails by itself on
// the connections that were left as they are, and the post-dump stage on the
// plan that is missing.
func (t *Tracer) Run() error {
	status := os.NewFile(tracerStatusFD, "status")
	watchdog := time.AfterFunc(watchdogTime, t.giveUp)
	defer watchdog.Stop()

	rules, tracer, err := t.prepare(watchdog)
	if err != nil {
		fmt.Fprintln(status, oneLine(err))
		status.Close()
		return nil // the script says it
	}
	fmt.Fprintln(status, ready)
	status.Close()
	calls := sockpeer.Calls{}
	tracer.BeforeSeize = calls.Note
	decide := func() (map[uint32]interpose.Form, int, error) {
		watchdog.Reset(frozenTime)
		return t.decide(rules, calls)
	}
	err = tracer.Run(decide, func() { watchdog.Reset(watchdogTime) })
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

func (t *Tracer) prepare(watchdog *time.Timer) (*rule.Set, *interpose.Tracer, error) {
	rules, err := t.Rules()
	if err != nil {
		return nil, nil, err
	}
	if err := t.awaitIdle(rules, watchdog); err != nil {
		return nil, nil, err
	}
	tracer, err := interpose.New(t.CRIU)
	if errors.Is(err, interpose.ErrTraced) {
		err = fmt.Errorf("%w; an action script must trace CRIU. Stop the other tracer. The way that need not trace is CRIU's RPC, \"criuhook dump\", which version %s does not have yet", err, t.Version)
	}
	return rules, tracer, err
}

// awaitIdle lets the application run on while a rule waits for a busy
// connection. The tasks still run, so the decision that counts is made later.
func (t *Tracer) awaitIdle(rules *rule.Set, watchdog *time.Timer) error {
	if !rules.Waits() {
		return nil
	}
	start := time.Now()
	criu, err := unix.PidfdOpen(t.CRIU, 0)
	if err != nil {
		return fmt.Errorf("watch CRIU, process %d: %w", t.CRIU, err)
	}
	defer unix.Close(criu)
	for {
		snap, err := sockpeer.Scan(t.Root)
		if err != nil {
			return err
		}
		p := plan.Make(snap, rules)
		if len(p.Waiting()) == 0 {
			return nil
		}
		p.Expire(time.Since(start))
		if len(p.Waiting()) == 0 {
			return errors.New(p.Explain())
		}
		watchdog.Reset(watchdogTime)
		// A pidfd is readable once the process has ended (pidfd_open(2)).
		end := []unix.PollFd{{Fd: int32(criu), Events: unix.POLLIN}}
		n, err := unix.Poll(end, int(busyInterval.Milliseconds()))
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("watch CRIU, process %d: %w", t.CRIU, err)
		}
		if n > 0 {
			return interpose.ErrEnded
		}
	}
}

// decide scans the frozen tree and writes the plan.
func (t *Tracer) decide(rules *rule.Set, calls sockpeer.Calls) (map[uint32]interpose.Form, int, error) {
	if interpose.TracerOf(t.Root) != t.CRIU {
		return nil, 0, nil // CRIU has not seized the tree yet
	}
	dir := fmt.Sprintf("/proc/self/fd/%d", tracerDirFD)
	// Not earlier: from here on CRIU overwrites the images that an earlier
	// record belongs to.
	if err := image.RemoveStale(dir); err != nil {
		return nil, 0, err
	}
	snap, err := sockpeer.ScanStopped(t.Root, calls)
	if err != nil {
		return nil, 0, err
	}
	if err := t.warnGhosts(); err != nil {
		return nil, 0, err
	}
	for _, l := range snap.Pending {
		t.Log.Warnf("process %d fd %d listens at %s, and %d clients wait there to be accepted: they are not in the images", l.Listener.PID, l.Listener.FD, l.Name, l.Count)
	}
	p := plan.Make(snap, rules)
	p.Freeze()
	if len(p.Refused()) > 0 {
		return nil, 0, errors.New(p.Explain())
	}
	rec, err := p.Record(snap, t.Root)
	if err != nil {
		return nil, 0, err
	}
	if rec.DumpId, err = dumpID(t.CRIU); err != nil {
		return nil, 0, err
	}
	rec.WrittenBy, rec.UnixTime = "criuhook "+t.Version, time.Now().Unix()
	if err := image.WritePlan(dir, rec); err != nil {
		return nil, 0, err
	}
	forms := map[uint32]interpose.Form{}
	for i := range p.Decisions {
		d := &p.Decisions[i]
		forms[d.Connection.Inode] = interpose.Dormant
		if d.Action == rule.Hangup {
			forms[d.Connection.Inode] = interpose.Dead
		}
		level := logrus.InfoLevel
		if d.Action == rule.Hangup && d.Reason != "" {
			level = logrus.WarnLevel // less than its rule promised
		}
		t.Log.Log(level, d.String())
	}
	return forms, len(snap.Netns), nil
}
