// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"regexp"
	"strings"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/restore"
)

// criuError is a failure of CRIU's, with what else its log says of it.
type criuError struct {
	error          // one line
	file  string   // CRIU's log
	more  []string // error lines that the error does not repeat
}

func (e *criuError) Unwrap() error { return e.error }

func (e *criuError) Error() string {
	text := e.error.Error() + "\nCRIU's log is " + e.file
	if len(e.more) > 0 {
		text += ", and has besides:\n  " + strings.Join(e.more, "\n  ")
	}
	return text
}

// criuFailed adds to an error what CRIU has logged, and the exit code.
func criuFailed(err error) error {
	var dumpRefused *dump.RefusedError
	var restoreRefused *restore.RefusedError
	var e *criurpc.Error
	switch {
	case errors.As(err, &dumpRefused):
		return &exitError{exitRefused, dumpRefused}
	case errors.As(err, &restoreRefused):
		return &exitError{exitRefused, restoreRefused}
	case errors.As(err, &e) && e.LogFile != "":
		return &criuError{err, e.LogFile, moreOf(e)}
	}
	return err
}

// logLine is the beginning of an error in CRIU's log: time, pid, file and line.
var logLine = regexp.MustCompile(`^.*?Error \([^)]*\): *`)

// moreOf are the lines of CRIU's log that say more than the error and than that
// CRIU has failed.
func moreOf(e *criurpc.Error) []string {
	more := []string{} // in JSON no null
	for _, line := range e.Log {
		text := logLine.ReplaceAllString(line, "")
		if !strings.Contains(e.Error(), text) && !strings.HasSuffix(text, "FAILED.") {
			more = append(more, line)
		}
	}
	return more
}

// gaveUp: after we told CRIU to stop, it has said that it did, or was not even
// asked yet.
func gaveUp(err error) bool {
	var e *criurpc.Error
	return !errors.As(err, &e) || e.Response != nil
}

// criuOutput takes what CRIU says beside its log: before it has opened that, to
// its stdout, or by a program that it starts. An error is for the error of the
// request to tell.
type criuOutput struct {
	log  *logrus.Logger
	line []byte // under way
}

func (w *criuOutput) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte{'\n'})
		w.line = append(w.line, part...)
		if ended || len(w.line) > 4096 { // bytes
			w.say(strings.TrimSpace(string(w.line)))
			w.line = w.line[:0]
		}
		rest = after
	}
	return len(b), nil
}

func (w *criuOutput) say(line string) {
	switch {
	case line == "", logLine.MatchString(line):
	case strings.HasPrefix(line, "(") && !strings.Contains(line, "Warn "): // with a time, as in its log
		w.log.Debug("CRIU: " + ascii(line))
	default:
		w.log.Warn("CRIU: " + ascii(line))
	}
}
