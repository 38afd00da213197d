// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"

	"github.com/sirupsen/logrus"
)

// logOptions are --log-level and --log-format.
type logOptions struct {
	level  string
	format string
}

// newLogger makes a logger to out, or to CRIUHOOK_LOG_FILE.
func newLogger(out io.Writer, o logOptions) (*logrus.Logger, error) {
	log := logrus.New()
	log.SetOutput(out)
	if o.level == "" {
		o.level = environment("CRIUHOOK_LOG_LEVEL")
	}
	if o.level == "" {
		o.level = "info"
	}
	level, err := logrus.ParseLevel(o.level)
	if err != nil {
		return nil, &exitError{exitUsage, fmt.Errorf("--log-level or CRIUHOOK_LOG_LEVEL: %w", err)}
	}
	log.SetLevel(level)
	switch o.format {
	case "", "text":
		log.SetFormatter(textFormatter{})
	case "json":
		log.SetFormatter(&logrus.JSONFormatter{})
	default:
		return nil, &exitError{exitUsage, fmt.Errorf("--log-format %q: text or json", o.format)}
	}
	if name := environment("CRIUHOOK_LOG_FILE"); name != "" {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open CRIUHOOK_LOG_FILE: %w", err)
		}
		log.SetOutput(f)
	}
	return log, nil
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
