// SPDX-License-Identifier: Apache-2.0

// Package action is CRIU's action script: what to do at each stage that CRIU
// calls a script for (criu(8), --action-script).
//
// A script may be configured twice and then runs twice per stage: every stage
// finds out what has been done already.
package action

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/restore"
	"criuhook/criuhook/rule"
)

// The stages that have work for us. All others return at once.
const (
	preDump     = "pre-dump"
	postDump    = "post-dump"
	postRestore = "post-restore"
)

// StageVariable is how CRIU tells a script why it is called.
const StageVariable = "CRTOOLS_SCRIPT_ACTION"

// Script is one call of the action script.
type Script struct {
	Stage string
	// ImagesDir is where the images are, usually /proc/<CRIU>/fd/N.
	ImagesDir string
	// Root is the root task of the tree, in our pid namespace; 0: none yet.
	Root int
	// CRIU is CRIU's pid.
	CRIU int
	// Rules reads the configuration; only a dump needs it.
	Rules func() (*rule.Set, error)
	Log   *logrus.Logger
	// Version is ours, for the record.
	Version string

	limit time.Duration // of what post-dump does; 0: dump.WriteTime
}

// FromEnvironment reads what CRIU told the script.
func FromEnvironment(getenv func(string) string) (*Script, error) {
	s := &Script{
		Stage:     getenv(StageVariable),
		ImagesDir: getenv("CRTOOLS_IMAGE_DIR"),
		CRIU:      os.Getppid(),
	}
	// The parent is somebody else if a script of the user's calls us.
	if rest, ok := strings.CutPrefix(s.ImagesDir, "/proc/"); ok {
		pid, _, _ := strings.Cut(rest, "/")
		if n, err := strconv.Atoi(pid); err == nil && n > 0 {
			s.CRIU = n
		}
	}
	if v := getenv("CRTOOLS_INIT_PID"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("CRTOOLS_INIT_PID=%q is no pid: call criuhook as CRIU's --action-script", v)
		}
		s.Root = n
	}
	if !s.Idle() {
		if err := s.fromService(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Idle reports whether the stage has no work for us.
func (s *Script) Idle() bool {
	switch s.Stage {
	case preDump, postDump, postRestore:
		return false
	}
	return true
}

// Run does the work of the stage. An error fails the dump or the restore.
func (s *Script) Run(ctx context.Context) error {
	if s.Idle() {
		return nil
	}
	if s.ImagesDir == "" || s.Root == 0 {
		return fmt.Errorf("stage %s without CRTOOLS_IMAGE_DIR or CRTOOLS_INIT_PID: call criuhook as CRIU's --action-script", s.Stage)
	}
	var err error
	switch s.Stage {
	case preDump:
		err = s.preDump()
	case postDump:
		err = s.postDump()
	case postRestore:
		var r *restore.Restore
		if r, err = restore.Open(s.ImagesDir, s.Log, nil); err == nil {
			err = r.Reconnect(ctx, s.Root)
		}
	}
	if err != nil {
		return fmt.Errorf("%s of process %d: %w", s.Stage, s.Root, err)
	}
	return nil
}
