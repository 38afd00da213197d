// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/dump"
)

// logOptions are --log-level and --log-format.
type logOptions struct {
	level  string
	format string // "text", "json"; "": text
}

// check finds a bad --log-level also for verbs that log nothing.
func (o logOptions) check() error {
	if o.level == "" {
		return nil
	}
	_, err := o.parseLevel()
	return err
}

func (o logOptions) parseLevel() (logrus.Level, error) {
	name, from := o.level, "--log-level"
	if name == "" {
		name, from = environment("CRIUHOOK_LOG_LEVEL"), "CRIUHOOK_LOG_LEVEL"
	}
	if name == "" {
		return logrus.InfoLevel, nil
	}
	level, err := logrus.ParseLevel(name)
	if err != nil {
		return 0, usagef("%s %q: must be error, warn, info or debug", from, name)
	}
	return level, nil
}

// newLogger makes a logger to out, or to CRIUHOOK_LOG_FILE.
func newLogger(out io.Writer, o logOptions) (*logrus.Logger, error) {
	log := logrus.New()
	log.SetOutput(out)
	level, err := o.parseLevel()
	if err != nil {
		return nil, err
	}
	log.SetLevel(level)
	log.SetFormatter(textFormatter{})
	if o.format == "json" {
		log.SetFormatter(&logrus.JSONFormatter{})
	}
	name, err := environmentPath("CRIUHOOK_LOG_FILE")
	if err != nil {
		return nil, err
	}
	if name != "" {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open CRIUHOOK_LOG_FILE: %w", err)
		}
		log.SetOutput(f)
	}
	return log, nil
}

// keep writes the error that ended a verb to CRIUHOOK_LOG_FILE, if that is where the
// log goes: on stderr it has been said.
func (o logOptions) keep(err error) {
	log, e := newLogger(io.Discard, o)
	if e != nil {
		return // the error is that one, or came before it
	}
	if f, ok := log.Out.(*os.File); ok {
		o.report(f, err)
		_ = f.Close() // there is nobody left to tell
	}
}

// textFormatter writes a line as CRIU does, for it stands in CRIU's log:
// who, how bad, what.
type textFormatter struct{}

func (textFormatter) Format(e *logrus.Entry) ([]byte, error) {
	mark := ""
	switch {
	case e.Level <= logrus.ErrorLevel:
		mark = "Error: "
	case e.Level == logrus.WarnLevel:
		mark = "Warn: "
	}
	if client, ok := e.Data["client"]; ok { // of the service
		mark += fmt.Sprintf("client %v, uid %v: ", client, e.Data["uid"])
	}
	return []byte("criuhook: " + mark + e.Message + "\n"), nil
}

// copyHook writes warnings and errors to a second place as well.
type copyHook struct {
	to io.Writer
}

func (copyHook) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel}
}

func (h copyHook) Fire(e *logrus.Entry) error {
	line, err := textFormatter{}.Format(e)
	if err != nil {
		return err
	}
	_, err = h.to.Write(line)
	return err
}

// stderrHook copies to CRIU's stderr, which may be that of what is dumped: a JVM
// of CRaC has started CRIU.
type stderrHook struct {
	copyHook
	sized bool // a file that must not grow once the images are written
}

func (h stderrHook) Fire(e *logrus.Entry) error {
	if h.sized && dump.Late(e) {
		return nil // CRIU's log has it
	}
	return h.copyHook.Fire(e)
}
