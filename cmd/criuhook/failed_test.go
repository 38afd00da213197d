// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/restore"
)

func TestCRIUFailed(t *testing.T) {
	const first, second, last = "(00.1) Error (criu/a.c:1): the cause", "(00.2)  7: Error (criu/b.c:2): what it caused", "(00.3) Error (criu/c.c:3): Dumping FAILED."
	failed := &criurpc.Error{Op: "dump of process 7", Response: &rpc.CriuResp{}, Log: []string{first, second, last}, LogFile: "/i/dump.log"}
	single := &criurpc.Error{Op: "dump of process 7", Response: &rpc.CriuResp{}, Log: []string{first, last}, LogFile: "/i/dump.log"}
	early := &criurpc.Error{Op: "dump of process 7", Err: errors.New("CRIU ended"), Log: []string{first}}
	for _, tt := range []struct {
		name string
		err  error
		code int
		text string
	}{
		{"more than one line", failed, exitFailed, "criuhook: Error: CRIU: dump of process 7: failed: the cause\nCRIU's log is /i/dump.log, and has besides:\n  " + second + "\n"},
		{"one line", single, exitFailed, "criuhook: Error: CRIU: dump of process 7: failed: the cause\nCRIU's log is /i/dump.log\n"},
		{"no log", early, exitFailed, "criuhook: Error: CRIU: dump of process 7: CRIU ended: the cause\n"},
		{"with advice", fmt.Errorf("%w; do this", single), exitFailed, "criuhook: Error: CRIU: dump of process 7: failed: the cause; do this\nCRIU's log is /i/dump.log\n"},
		{"not CRIU's", errors.New("no"), exitFailed, "criuhook: Error: no\n"},
		{"refused dump", &criurpc.Error{Op: "dump", Err: fmt.Errorf("at: %w", &dump.RefusedError{Text: "a\n  b\n"})}, exitRefused, "criuhook: Error: a\n  b\n"},
		{"refused because busy", &dump.BusyError{RefusedError: &dump.RefusedError{Text: "a\n"}}, exitRefused, "criuhook: Error: a\n"},
		{"refused restore", fmt.Errorf("at: %w", &restore.RefusedError{Text: "a\n  b\n"}), exitRefused, "criuhook: Error: a\n  b\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := criuFailed(tt.err)
			if exitCode(err) != tt.code {
				t.Errorf("exit code %d, want %d", exitCode(err), tt.code)
			}
			var text, object bytes.Buffer
			logOptions{format: "text"}.report(&text, err)
			if text.String() != tt.text {
				t.Errorf("got\n%swant\n%s", &text, tt.text)
			}
			logOptions{format: "json"}.report(&object, err)
			var out struct {
				Level, Msg string
				File       string   `json:"criu_log"`
				Errors     []string `json:"criu_errors"`
			}
			if e := json.Unmarshal(object.Bytes(), &out); e != nil || strings.Count(object.String(), "\n") != 1 {
				t.Fatalf("no line of JSON: %v: %s", e, &object)
			}
			first, _, _ := strings.Cut(strings.TrimPrefix(tt.text, "criuhook: Error: "), "\n")
			if out.Level != "error" || !strings.HasPrefix(out.Msg, first) {
				t.Errorf("got %s", &object)
			}
			if ours := strings.Contains(tt.text, "CRIU's log"); ours && (out.Msg != first || out.File != "/i/dump.log" || out.Errors == nil) ||
				strings.Contains(tt.text, second) != (len(out.Errors) == 1) {
				t.Errorf("got %s", &object)
			}
		})
	}
}

func TestCRIUOutput(t *testing.T) {
	var b bytes.Buffer
	log := logrus.New()
	log.SetOutput(&b)
	log.SetFormatter(textFormatter{})
	w := &criuOutput{log: log}
	for _, part := range []string{"a wa", "rning\x1b[31m\n\n(00.000000) CRIU run id = 7\nError (a.c:1): in the error\nan", "other\n"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Errorf("wrote %d of %q: %v", n, part, err)
		}
	}
	if want := "criuhook: Warn: CRIU: a warning\\x1b[31m\ncriuhook: Warn: CRIU: another\n"; b.String() != want {
		t.Errorf("got\n%swant\n%s", &b, want)
	}
}
