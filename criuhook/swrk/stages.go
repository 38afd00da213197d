// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
	"criuhook/criuhook/interpose"
	"criuhook/criuhook/plan"
)

// Stages is what we do in one dump by RPC, whoever talks to CRIU:
//
//	Declare  before the request, only to a CRIU that does not ask
//	By       CRIU is there
//	Decide   at query-ext-files
//	Finish   at post-dump
//	Failed   CRIU has said, or shown, that it failed
type Stages struct {
	Base *dump.Dump

	images string      // path
	criu   int         // pid
	before os.FileInfo // files.img; nil: there was none
	// declared are the inodes that CRIU was told of in advance.
	declared map[uint32]bool
	asked    bool // CRIU sent query-ext-files
	decided  *dump.Decided
	settled  bool // the images have their form
	external []image.ExternalFile

	look, write time.Duration   // how long a step may take
	left        <-chan struct{} // what a step left behind; closed when that has ended
}

// NewStages begins a dump into the directory images.
func NewStages(base *dump.Dump, images string) *Stages {
	return &Stages{Base: base, images: images, before: state(images), look: dump.LookTime, write: dump.WriteTime}
}

// By says which CRIU dumps.
func (s *Stages) By(criu int) (err error) {
	s.criu = criu
	s.Base.ID, err = dump.ID(criu)
	return err
}

// Asked: CRIU has asked for external files.
func (s *Stages) Asked() bool { return s.asked || s.decided != nil }

// Settled: the images have their form.
func (s *Stages) Settled() bool { return s.settled }

// Decide decides about the frozen tree and returns what CRIU is to be told is
// external. Like all that is done while the tree is frozen, it is left behind if it
// hangs, and the dump fails (see [dump.Dump.Within]).
func (s *Stages) Decide() ([]string, error) {
	s.asked = true
	var decided *dump.Decided
	var external []image.ExternalFile
	err := s.within(s.look, "decide about the connections", func(ctx context.Context) (err error) {
		decided, external, err = s.decide(ctx)
		return err
	})
	if err == nil {
		err = s.within(s.write, "note what was decided about the connections", func(ctx context.Context) error {
			return s.Base.Note(ctx, s.images, decided)
		})
	}
	if err != nil {
		return nil, err
	}
	s.decided, s.external = decided, external
	return keys(s.decided.Plan.Decisions, s.Base.Services(), s.external), nil
}

// within bounds a step. It must not write to s: it may go on when it was given up.
func (s *Stages) within(limit time.Duration, what string, do func(context.Context) error) error {
	left, err := s.Base.Within(limit, what, do)
	if before := s.left; left != nil && before != nil {
		both := make(chan struct{})
		go func() {
			<-before
			<-left
			close(both)
		}()
		s.left = both
	} else if left != nil {
		s.left = left
	}
	return err
}

// Left is closed when the steps that took too long have ended after all; nil: none
// did. Until then the directory has to stay open under its number, or another one
// would be read by it.
func (s *Stages) Left() <-chan struct{} { return s.left }

func (s *Stages) decide(ctx context.Context) (*dump.Decided, []image.ExternalFile, error) {
	decided, err := s.Base.Decide(nil)
	if err != nil {
		return nil, nil, err
	}
	external, err := s.Base.ExternalGhosts()
	if err != nil {
		return nil, nil, err
	}
	if ctx.Err() != nil { // CRIU, too, may be another one by now
		return nil, nil, context.Cause(ctx)
	}
	if err := s.hideUnaccepted(decided); err != nil {
		return nil, nil, err
	}
	return decided, external, nil
}

// hideUnaccepted makes CRIU find connections dead that nobody has accepted yet.
// CRIU has no word for those: declared external or not, it looks for the
// listener in the tree (dump_one_unix_fd in criu/sk-unix.c). So they are
// changed in what it reads of them, as the action script does it.
func (s *Stages) hideUnaccepted(decided *dump.Decided) error {
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
	err := interpose.Spawn(nil, "--criu-pid", strconv.Itoa(s.criu), "--tree", strconv.Itoa(s.Base.Root),
		"--dead", strings.Join(inodes, ","), "--netns", strconv.Itoa(len(decided.Snapshot.Netns)))
	if err != nil {
		return fmt.Errorf("%s; CRIU must not see that as it is: %w; dump again when the peer has accepted it", first, err)
	}
	return nil
}

func keys(decisions []plan.Decision, services []uint32, files []image.ExternalFile) []string {
	var out []string
	for _, inode := range services {
		out = append(out, unixKey(inode))
	}
	for _, d := range decisions {
		if d.Connection.Unaccepted {
			continue
		}
		out = append(out, unixKey(d.Connection.Inode))
	}
	for _, f := range files {
		out = append(out, f.Key)
	}
	return out
}

func unixKey(inode uint32) string { return fmt.Sprintf("unix[%d]", inode) }

// Finish brings the images, which are complete, into their form. An error is to
// fail the dump.
func (s *Stages) Finish() error {
	if s.decided == nil {
		var decided *dump.Decided
		err := s.within(s.write, "decide about the connections", func(ctx context.Context) (err error) {
			decided, err = s.decideLate(ctx)
			return err
		})
		if err != nil {
			return err
		}
		s.decided = decided
	}
	err := s.within(s.write, "finish the images", func(ctx context.Context) error {
		return s.Base.Settle(ctx, s.images, s.decided.Record(), s.external...)
	})
	s.settled = err == nil
	return err
}

// Unchanged fails if a connection of the finished images is no longer idle. It is
// for who lets time pass after Finish.
func (s *Stages) Unchanged() error {
	return s.within(s.look, "look again at the connections", func(context.Context) error {
		return s.Base.Unchanged(s.decided.Record())
	})
}

// Declare finds what is to be told to a CRIU that does not ask, before it
// dumps.
func (s *Stages) Declare() ([]string, error) {
	p, services, err := s.Base.Plan()
	if err != nil {
		return nil, err
	}
	if len(p.Refused()) > 0 {
		return nil, &dump.RefusedError{Text: p.Explain()}
	}
	if s.external, err = s.Base.ExternalGhosts(); err != nil {
		return nil, err
	}
	s.declared = map[uint32]bool{}
	for i := range p.Decisions {
		d := &p.Decisions[i]
		if d.Connection.Unaccepted {
			return nil, fmt.Errorf("%s; this CRIU does not tell when the tree is frozen, so that it cannot be hidden from it: dump again when the peer has accepted it", d)
		}
		s.declared[d.Connection.Inode] = true
	}
	return keys(p.Decisions, services, s.external), nil
}

// decideLate decides when the images are written: the tree has been frozen
// since before they were.
func (s *Stages) decideLate(ctx context.Context) (*dump.Decided, error) {
	decided, err := s.Base.Decide(nil)
	if err != nil {
		return nil, err
	}
	var late []string
	for i := range decided.Plan.Decisions {
		if d := &decided.Plan.Decisions[i]; !s.declared[d.Connection.Inode] {
			late = append(late, d.String())
		}
	}
	if len(late) > 0 {
		return nil, appeared(late)
	}
	if err := s.Base.Note(ctx, s.images, decided); err != nil {
		return nil, err
	}
	return decided, nil
}

// Appeared tells which connections came after CRIU was told of the others, which
// CRIU's own message does not; nil: none, or that was not how it failed.
func (s *Stages) Appeared() error {
	if s.declared == nil || s.decided != nil {
		return nil
	}
	p, _, err := s.Base.Plan()
	if err != nil {
		return nil // gone; CRIU's message stands
	}
	var late []string
	for i := range p.Decisions {
		if d := &p.Decisions[i]; !s.declared[d.Connection.Inode] {
			late = append(late, d.String())
		}
	}
	if len(late) == 0 {
		return nil
	}
	return appeared(late)
}

// Failed removes the record, also that of an earlier dump, if CRIU has begun to
// write images: what is there now is neither this dump nor that one.
func (s *Stages) Failed() error {
	if !s.Begun() {
		return nil
	}
	return s.within(s.write, "remove what is left of the dump", func(ctx context.Context) error {
		remove := func() error { return image.RemoveStale(ctx, s.images) }
		if s.Base.Files != nil {
			return s.Base.Files(remove)
		}
		return remove()
	})
}

func appeared(late []string) error {
	return fmt.Errorf("this CRIU does not ask for external files while the tree is frozen, and after it was told of them these appeared; dump again, or take a CRIU of version 3.19 or newer:\n  %s",
		strings.Join(late, "\n  "))
}

// filesImage is begun right after the place where CRIU would have asked for
// external files (cr_dump_tasks in criu/cr-dump.c).
const filesImage = "files.img"

// Begun reports whether this run of CRIU has begun to write images.
func (s *Stages) Begun() bool {
	now := state(s.images)
	if now == nil {
		return false
	}
	return s.before == nil || !os.SameFile(s.before, now) || !s.before.ModTime().Equal(now.ModTime()) || s.before.Size() != now.Size()
}

func state(images string) os.FileInfo {
	info, err := os.Lstat(filepath.Join(images, filesImage))
	if err != nil {
		return nil
	}
	return info
}
