// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"unicode"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
)

// Bounds of what an [Error] carries: a log of level 4 can have any size.
const (
	logBytes  = 1 << 20 // read from the end of the log
	logLines  = 32
	lineBytes = 1024
)

// logFile is where CRIU writes the log of a request.
type logFile struct {
	name   string
	before os.FileInfo // nil if it was not there
}

// findLog must be called before the request is sent; nil if there is no file
// (setup_logging_from_req and setup_images_and_workdir in criu/cr-service.c).
func (c *Client) findLog(req *rpc.CriuReq) *logFile {
	name := c.config.LogFile
	if opts := req.GetOpts(); name == "" && opts != nil {
		file := opts.GetLogFile()
		if file == "" && opts.GetLogToStderr() {
			return nil
		}
		if file == "" {
			file = "criu.log" // DEFAULT_LOG_FILENAME
		}
		switch {
		case opts.WorkDirFd != nil:
			name = fmt.Sprintf("/proc/self/fd/%d/%s", opts.GetWorkDirFd(), file)
		case opts.GetImagesDirFd() != -1:
			name = fmt.Sprintf("/proc/self/fd/%d/%s", opts.GetImagesDirFd(), file)
		case opts.GetImagesDir() != "":
			name = filepath.Join(opts.GetImagesDir(), file)
		}
	}
	if name == "" {
		return nil
	}
	before, err := os.Stat(name)
	if err != nil {
		before = nil
	}
	return &logFile{name: name, before: before}
}

// errors reads the error lines, and the log's name. What cannot be read is no
// error of its own: it is only missing in that of the request.
func (l *logFile) errors() ([]string, string) {
	// O_NONBLOCK: not to hang on a pipe of that name.
	f, err := os.OpenFile(l.name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, ""
	}
	defer f.Close()
	info, err := f.Stat()
	// CRIU truncates its log when it opens it: one that did not change is of
	// another run.
	if err != nil || !info.Mode().IsRegular() || l.before != nil && sameState(l.before, info) {
		return nil, ""
	}
	skip := info.Size() - logBytes
	lines := &lastErrors{partial: skip > 0}
	_, _ = io.Copy(lines, io.NewSectionReader(f, max(skip, 0), logBytes))
	lines.end()
	name := l.name
	if real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil {
		name = real
	}
	return lines.found, name
}

func sameState(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// lastErrors keeps the last lines of what is written to it.
type lastErrors struct {
	next    io.Writer // gets all of it too, if set
	mu      sync.Mutex
	partial bool     // the line under way has lost its beginning
	line    []byte   // under way, bounded
	found   []string // with "Error ("
	other   []string
}

func (l *lastErrors) Write(b []byte) (int, error) {
	l.mu.Lock()
	for rest := b; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte{'\n'})
		l.line = append(l.line, part[:min(len(part), lineBytes-len(l.line))]...)
		if ended {
			l.endLine()
		}
		rest = after
	}
	l.mu.Unlock()
	if l.next != nil {
		return l.next.Write(b)
	}
	return len(b), nil
}

func (l *lastErrors) endLine() {
	line := printable(string(l.line))
	partial := l.partial
	l.line, l.partial = l.line[:0], false
	switch {
	case partial, line == "":
	case strings.Contains(line, "Error ("):
		l.found = keep(l.found, line)
	default:
		l.other = keep(l.other, line)
	}
}

// end takes a last line without an end for one.
func (l *lastErrors) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLine()
}

// lines are the errors, or any lines if there are none.
func (l *lastErrors) lines() []string {
	l.end()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.found) > 0 {
		return append([]string(nil), l.found...)
	}
	return append([]string(nil), l.other...)
}

func keep(lines []string, line string) []string {
	if len(lines) == logLines {
		copy(lines, lines[1:])
		lines = lines[:logLines-1]
	}
	return append(lines, line)
}

// printable: names of the application's are in CRIU's log, and may hold
// anything that does something to a terminal.
func printable(s string) string {
	s = strings.ReplaceAll(s, "\t", " ")
	return strings.TrimRightFunc(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.TrimRight(s, "\r\n")), unicode.IsSpace)
}
