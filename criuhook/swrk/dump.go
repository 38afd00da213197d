// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
	"criuhook/criuhook/interpose"
	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// filesImage is begun right after the place where CRIU would have asked for
// external files (cr_dump_tasks in criu/cr-dump.c).
const filesImage = "files.img"

// Dump is a dump by RPC.
type Dump struct {
	Job
	Tree  int // the root task
	Rules *rule.Set
	// Signals are passed on to CRIU.
	Signals <-chan os.Signal
	// KilledBy is set by Run to the signal that ended CRIU, if one did.
	KilledBy syscall.Signal
	// Started is set by Run once CRIU has been started.
	Started bool
	// Scripts: CRIU's options have action scripts.
	Scripts bool
}

// Run dumps. A dump that fails leaves the application as it was. The error
// wraps a [*dump.RefusedError] if a rule is the reason, else it is mostly a
// [*criurpc.Error]. Exit is what CRIU's own command line would end with.
func (d *Dump) Run(ctx context.Context) (exit int, err error) {
	f, err := d.open()
	if err != nil {
		return 1, err
	}
	defer f.close()
	defer d.CRIULog.detach()
	start := time.Now()
	for inAdvance := neverAsks(d.CRIU); ; {
		a := &attempt{Dump: d, folders: f, before: state(f.images), inAdvance: inAdvance}
		exit, err := a.run(ctx, start)
		var busy *dump.BusyError
		switch {
		case err == nil:
			return exit, nil
		case errors.As(err, &busy) && time.Since(start) < busy.Patience:
			continue // the tree runs again, so it may become idle
		case inAdvance || a.asked || a.decided != nil || !a.filesBegun() || d.KilledBy != 0 || ctx.Err() != nil:
			return exit, err
		}
		// An older CRIU, which does not ask: tell it before.
		d.Log.Debugf("CRIU did not ask for external files, so it is told of them in advance: %v", err)
		inAdvance = true
	}
}

// attempt is one run of CRIU.
type attempt struct {
	*Dump
	folders
	before os.FileInfo // files.img; nil: there was none
	base   *dump.Dump
	criu   *criurpc.Client

	inAdvance bool
	// declared are the inodes that CRIU was told of in advance.
	declared map[uint32]bool
	asked    bool // CRIU sent query-ext-files
	decided  *dump.Decided
	settled  bool // the images have their form
	external []image.ExternalFile
}

func (a *attempt) run(ctx context.Context, start time.Time) (exit int, err error) {
	a.base = &dump.Dump{Root: a.Tree, Rules: a.Dump.Rules, Log: a.Log, Version: a.Version}
	if err := a.base.AwaitIdle(ctx, start, func() {}); err != nil {
		return 1, err
	}
	req := a.request(rpc.CriuReqType_DUMP, a.folders)
	req.Opts.Pid = proto.Int32(int32(a.Tree))
	if a.inAdvance {
		if req.Opts.External, err = a.declare(); err != nil {
			a.logError(err)
			return 1, err
		}
	}
	a.CRIULog.detach() // from the log of an attempt before this one
	if a.criu, err = criurpc.Start(a.config(a.folders, nil)); err != nil {
		return 1, err
	}
	defer a.criu.Close()
	a.Started = true
	// A CRIU that has ended already: Do tells what it said.
	if a.base.ID, err = dump.ID(a.criu.PID()); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return 1, err
	}
	done := make(chan struct{})
	go a.passSignals(done)
	_, err = a.criu.Do(ctx, req, a)
	close(done)
	if err == nil {
		return 0, nil
	}
	if a.filesBegun() {
		// What is there now is neither this dump nor an earlier one.
		if e := image.RemoveStale(a.imagesPath()); e != nil {
			err = errors.Join(err, e)
		}
	}
	if a.inAdvance {
		err = a.explain(err)
	}
	return a.exitCode(err), err
}

func (a *attempt) passSignals(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case sig := <-a.Signals:
			_ = a.criu.Signal(sig) // it may have ended
		}
	}
}

// exitCode is CRIU's, if it ended before it answered.
func (a *attempt) exitCode(err error) int {
	var e *criurpc.Error
	switch {
	case a.settled && a.Scripts:
		return 255 // of a post-dump script that fails
	case !errors.As(err, &e) || e.Response != nil:
		return 1
	}
	_ = a.criu.Close()
	state := a.criu.Wait()
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		a.KilledBy = status.Signal()
		return 128 + int(status.Signal())
	}
	return max(state.ExitCode(), 1)
}

// Notify answers CRIU. Whatever fails fails the dump.
func (a *attempt) Notify(_ context.Context, n *criurpc.Notification) (*rpc.CriuOpts, error) {
	a.CRIULog.attach(a.criu.PID(), a.logPath(a.folders))
	var opts *rpc.CriuOpts
	var err error
	switch n.Stage {
	case criurpc.StageQueryExtFiles:
		a.asked = true
		opts, err = a.answerInTime()
	case criurpc.StagePostDump:
		err = a.finish()
	}
	if err != nil {
		a.logError(err)
	}
	return opts, err
}

// logError is for whoever reads CRIU's log; the error goes to the caller, too.
func (a *attempt) logError(err error) {
	if a.CRIULog != nil && a.CRIULog.attached() {
		fmt.Fprintln(a.CRIULog, "criuhook: Error:", err)
	}
}

// frozenTime is how long deciding may take, while the tree is frozen.
const frozenTime = 30 * time.Second

// answerInTime leaves behind what hangs, in a file system or in a process that
// nobody can stop: then the dump fails, and the tree runs on.
func (a *attempt) answerInTime() (*rpc.CriuOpts, error) {
	type result struct {
		opts *rpc.CriuOpts
		err  error
	}
	done := make(chan result, 1)
	go func() {
		opts, err := a.answer()
		done <- result{opts, err}
	}()
	select {
	case r := <-done:
		return r.opts, r.err
	case <-time.After(frozenTime):
		return nil, fmt.Errorf("decide about the connections of the tree of process %d: not done in %v, so it is let run on: look what hangs in /proc/%d, or in the file system of the images", a.Tree, frozenTime, a.Tree)
	}
}

// answer decides about the frozen tree and tells CRIU what is external.
func (a *attempt) answer() (*rpc.CriuOpts, error) {
	decided, err := a.base.Decide(nil)
	if err != nil {
		return nil, err
	}
	if a.external, err = a.base.ExternalGhosts(); err != nil {
		return nil, err
	}
	if err := a.hideUnaccepted(decided); err != nil {
		return nil, err
	}
	if err := a.base.Note(a.imagesPath(), decided); err != nil {
		return nil, err
	}
	a.decided = decided
	return criurpc.External(keys(decided.Plan.Decisions, a.external)...), nil
}

// hideUnaccepted makes CRIU find connections dead that nobody has accepted yet.
// CRIU has no word for those: declared external or not, it looks for the
// listener in the tree (dump_one_unix_fd in criu/sk-unix.c). So they are
// changed in what it reads of them, as the action script does it.
func (a *attempt) hideUnaccepted(decided *dump.Decided) error {
	var inodes []string
	var first *plan.Decision
	for i := range decided.Plan.Decisions {
		if d := &decided.Plan.Decisions[i]; d.Connection.Unaccepted {
			inodes = append(inodes, strconv.FormatUint(uint64(d.Connection.Inode), 10))
			if first == nil {
				first = d
			}
		}
	}
	if first == nil {
		return nil
	}
	err := interpose.Spawn(nil, "--criu-pid", strconv.Itoa(a.criu.PID()), "--tree", strconv.Itoa(a.Tree),
		"--dead", strings.Join(inodes, ","), "--netns", strconv.Itoa(len(decided.Snapshot.Netns)))
	if err != nil {
		return fmt.Errorf("%s; CRIU must not see that as it is: %w; dump again when the peer has accepted it", first, err)
	}
	return nil
}

func keys(decisions []plan.Decision, files []image.ExternalFile) []string {
	var out []string
	for _, d := range decisions {
		if d.Connection.Unaccepted {
			continue
		}
		out = append(out, fmt.Sprintf("unix[%d]", d.Connection.Inode))
	}
	for _, f := range files {
		out = append(out, f.Key)
	}
	return out
}

// finish brings the images into their form.
func (a *attempt) finish() error {
	if a.decided == nil {
		if err := a.decideLate(); err != nil {
			return err
		}
	}
	if err := a.base.Settle(a.imagesPath(), a.decided.Record(), a.external...); err != nil {
		return err
	}
	a.settled = true
	return nil
}

// declare finds what is to be told to a CRIU that does not ask.
func (a *attempt) declare() ([]string, error) {
	snap, err := sockpeer.Scan(a.Tree)
	if err != nil {
		return nil, err
	}
	p := plan.Make(snap, a.Dump.Rules)
	if len(p.Refused()) > 0 {
		return nil, &dump.RefusedError{Text: p.Explain()}
	}
	if a.external, err = a.base.ExternalGhosts(); err != nil {
		return nil, err
	}
	a.declared = map[uint32]bool{}
	for i := range p.Decisions {
		d := &p.Decisions[i]
		if d.Connection.Unaccepted {
			return nil, fmt.Errorf("%s; this CRIU does not tell when the tree is frozen, so that it cannot be hidden from it: dump again when the peer has accepted it", d)
		}
		a.declared[d.Connection.Inode] = true
	}
	return keys(p.Decisions, a.external), nil
}

// decideLate decides when the images are written: the tree has been frozen
// since before they were.
func (a *attempt) decideLate() error {
	decided, err := a.base.Decide(nil)
	if err != nil {
		return err
	}
	var late []string
	for i := range decided.Plan.Decisions {
		if d := &decided.Plan.Decisions[i]; !a.declared[d.Connection.Inode] {
			late = append(late, d.String())
		}
	}
	if len(late) > 0 {
		return appeared(late)
	}
	if err := a.base.Note(a.imagesPath(), decided); err != nil {
		return err
	}
	a.decided = decided
	return nil
}

// explain names the connections that came after CRIU was told of the others,
// which CRIU's own message does not.
func (a *attempt) explain(err error) error {
	var e *criurpc.Error
	if a.decided != nil || !errors.As(err, &e) || e.Err != nil {
		return err // known already
	}
	snap, scanErr := sockpeer.Scan(a.Tree)
	if scanErr != nil {
		return err // gone; CRIU's message stands
	}
	var late []string
	p := plan.Make(snap, a.Dump.Rules)
	for i := range p.Decisions {
		if d := &p.Decisions[i]; !a.declared[d.Connection.Inode] {
			late = append(late, d.String())
		}
	}
	if len(late) == 0 {
		return err
	}
	e.Err = appeared(late)
	a.logError(e.Err)
	return err
}

func appeared(late []string) error {
	return fmt.Errorf("this CRIU does not ask for external files while the tree is frozen, and after it was told of them these appeared; dump again, or take a CRIU of version 3.19 or newer:\n  %s",
		strings.Join(late, "\n  "))
}

// filesBegun reports whether this run has begun to write images.
func (a *attempt) filesBegun() bool {
	now := state(a.images)
	if now == nil {
		return false
	}
	return a.before == nil || !os.SameFile(a.before, now) || !a.before.ModTime().Equal(now.ModTime()) || a.before.Size() != now.Size()
}

func state(images *os.File) os.FileInfo {
	info, err := os.Lstat(fmt.Sprintf("/proc/self/fd/%d/%s", images.Fd(), filesImage))
	if err != nil {
		return nil
	}
	return info
}
