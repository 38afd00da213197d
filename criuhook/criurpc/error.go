// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
)

// Error is a request that failed. Error() is one line; %+v adds what CRIU has
// logged. [errors.Is] and [errors.As] find the error of the handler, that of
// the context, and CRIU's errno.
type Error struct {
	// Op is what was asked for, such as "dump of process 17".
	Op string
	// Stage is the notification that failed, if one did.
	Stage Stage
	// Err is the error on our side: of the handler, the context, the socket. Nil if
	// it was CRIU that failed.
	Err error
	// Response is CRIU's answer; nil if it gave none. It has success if CRIU went
	// on although a notification failed.
	Response *rpc.CriuResp
	// Log are the last error lines of CRIU's log, oldest first, or if there is none
	// of this request, the last lines of its stderr.
	Log []string
	// LogFile is the name of that log; empty if the lines come from elsewhere.
	LogFile string
}

// EndedError is a CRIU that ended without an answer: it has said why on its
// stderr, or in its log, or was killed.
type EndedError struct{ State *os.ProcessState }

func (e *EndedError) Error() string {
	return fmt.Sprintf("CRIU ended without an answer: %s", e.State)
}

// Errno is CRIU's cr_errno, 0 if it gave none: ESRCH for no such process, EEXIST
// for a pid that is taken, EBADRQC for bad options (criu/include/cr-errno.h).
func (e *Error) Errno() syscall.Errno { return syscall.Errno(e.Response.GetCrErrno()) }

func (e *Error) Error() string {
	s := "CRIU: " + e.Op + ": "
	if e.Stage != "" {
		s += "at " + string(e.Stage) + ": "
	}
	reason := e.reason()
	if e.Err != nil {
		s += strings.ReplaceAll(e.Err.Error(), "\n", "; ")
		if e.Response != nil || errors.Is(e.Err, ErrClosed) {
			reason = "" // CRIU only repeats that we gave up
		}
	} else {
		s += "failed"
		if n := e.Errno(); n != 0 {
			s += fmt.Sprintf(" (errno %d, %v)", int(n), n)
		}
	}
	if reason != "" {
		s += ": " + reason
	}
	if e.Response.GetSuccess() {
		s += "; CRIU went on and succeeded"
	}
	return printable(s)
}

// Unwrap gives the error on our side and CRIU's errno.
func (e *Error) Unwrap() []error {
	var all []error
	if e.Err != nil {
		all = append(all, e.Err)
	}
	if n := e.Errno(); n != 0 {
		all = append(all, n)
	}
	return all
}

// Format prints Error(), and with %+v below it the lines of CRIU's log.
func (e *Error) Format(s fmt.State, verb rune) {
	if verb != 'v' || !s.Flag('+') {
		if verb != 'q' && verb != 's' && verb != 'x' && verb != 'X' {
			verb = 's'
		}
		fmt.Fprintf(s, fmt.FormatString(s, verb), e.Error())
		return
	}
	_, _ = io.WriteString(s, e.Error())
	if len(e.Log) == 0 {
		return
	}
	from := "CRIU's stderr"
	if e.LogFile != "" {
		from = printable(e.LogFile)
	}
	_, _ = io.WriteString(s, "\nfrom "+from+":")
	for _, line := range e.Log {
		_, _ = io.WriteString(s, "\n\t"+line)
	}
}

// logLine is the beginning of an error in CRIU's log: time, pid, file and line.
var logLine = regexp.MustCompile(`^.*?Error \([^)]*\): *`)

// reason is the line that tells most. CRIU logs the cause first, and then what
// it made fail in turn.
func (e *Error) reason() string {
	lines := e.Log
	if m := strings.TrimSpace(e.Response.GetCrErrmsg()); m != "" {
		lines = append([]string{printable(m)}, lines...)
	}
	var last string
	for _, line := range lines {
		last = logLine.ReplaceAllString(line, "")
		if !isNoise(last) {
			return last
		}
	}
	return last
}

// isNoise: CRIU complains about RLIMIT_NOFILE whenever CAP_SYS_RESOURCE is
// missing and goes on (criu/rlimit.c), and ends with "Dumping FAILED."
func isNoise(line string) bool {
	return line == "" || strings.Contains(line, "RLIMIT_NOFILE") || strings.HasSuffix(line, "FAILED.")
}

// isGone: CRIU has closed its end.
func isGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, os.ErrClosed)
}
