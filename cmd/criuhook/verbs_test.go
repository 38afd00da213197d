// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// fakeCRIU is a program that behaves as the lines of shell say.
func fakeCRIU(t *testing.T, lines string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+lines+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestVerbsOfCRIU(t *testing.T) {
	pid := strconv.Itoa(os.Getpid())
	dir, none := t.TempDir(), filepath.Join(t.TempDir(), "none")
	plain := write(t, "not executable")
	bad := write(t, "rules:\n  - name: a\n    idel: hangup\n")
	dump := func(more ...string) []string {
		return append([]string{"dump", "--tree", pid, "--images-dir", none}, more...)
	}
	restore := func(more ...string) []string { return append([]string{"restore", "--images-dir", dir}, more...) }
	for _, tt := range []struct {
		args []string
		code int
		want string // in what is written to stderr
	}{
		{[]string{"dump"}, exitUsage, "--tree PID and --images-dir DIR have to be given\nTry 'criuhook dump --help'."},
		{[]string{"dump", "--images-dir", dir}, exitUsage, "--tree PID and"},
		{[]string{"dump", "--tree", pid}, exitUsage, "--images-dir DIR have"},
		{[]string{"dump", "--tree", "-1", "--images-dir", dir}, exitUsage, "--tree PID"},
		{[]string{"dump", "--tree", "init", "--images-dir", dir}, exitUsage, "--tree"},
		{dump("--shell-job"), exitUsage, "unknown flag: --shell-job; CRIU's options follow after --\n"},
		{restore("-j"), exitUsage, "unknown shorthand flag: 'j' in -j; CRIU's options follow after --\n"},
		{dump("shell-job"), exitUsage, `got "shell-job"; CRIU's options follow after --`},
		{dump("shell-job", "--", "--tcp-close"), exitUsage, `got "shell-job"`},
		{dump("--", "--tcp-nope"), exitUsage, "among CRIU's options: unknown option --tcp-nope"},
		{dump("--", "--tree"), exitUsage, "requires an argument"},
		{dump("--", "shell-job"), exitUsage, "that are no options"},
		{dump("--", "--help"), exitUsage, "help was asked for"},
		{dump("--", "--stream"), exitUsage, "--stream"},
		{dump("--", "--exec-cmd"), exitUsage, "--exec-cmd"},
		{dump("--", "-t", "1"), exitUsage, "give them before --"},
		{dump("--", "-D", dir), exitUsage, "give them before --"},
		{dump("--criu", "/nonexistent"), exitFailed, "--criu names /nonexistent as the real CRIU: "},
		{dump("--criu", plain), exitFailed, "not executable"},
		{dump("--criu", "criu"), exitFailed, "not an absolute path"},
		{dump("--config", bad), exitFailed, bad + ":3:5: "},
		{dump("--log-level", "loud"), exitUsage, "--log-level"},
		{[]string{"dump", "--tree", "4194304", "--images-dir", none}, exitFailed, "there is no process 4194304"},
		{[]string{"restore"}, exitUsage, "--images-dir DIR has to be given\nTry 'criuhook restore --help'."},
		{restore("dir"), exitUsage, `got "dir"; CRIU's options follow after --`},
		{restore("--", "--nope"), exitUsage, "among CRIU's options: unknown option --nope"},
		{restore("--", "--exec-cmd", "--", "true"), exitUsage, "--exec-cmd is for CRIU's command line"},
		{restore("--", "-d", "-S"), exitUsage, "--restore-sibling is for CRIU's command line"},
		{restore("--", "-D", none), exitUsage, "give it before --"},
		{restore(), exitFailed, "there are no images: stat " + dir + "/inventory.img"},
		{[]string{"restore", "--images-dir", none}, exitFailed, "there are no images: stat " + none},
		{[]string{"serve", "now"}, exitUsage, `takes no arguments, got "now"`},
		{[]string{"serve", "--log-level", "loud"}, exitUsage, "--log-level"},
		{[]string{"--log-level", "info", "criu", "check"}, exitUsage, "CRIUHOOK_CRIU, CRIUHOOK_CONFIG and CRIUHOOK_LOG_LEVEL"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			code, stdout, stderr := invoke(t, tt.args...)
			if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit code %d, want %d; stdout %q; stderr\n%swant %q", code, tt.code, stdout, stderr, tt.want)
			}
			if hint := strings.Contains(stderr, "\nTry 'criuhook "); hint != (tt.code == exitUsage) {
				t.Errorf("exit code %d: %s", code, stderr)
			}
		})
	}
	if _, err := os.Lstat(none); err == nil {
		t.Errorf("%s was made for a dump that was not even tried", none)
	}
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("a restore that was not even tried wrote %v", files)
	}
}

// TestCRIURefuses: CRIU ends before it has a log.
func TestCRIURefuses(t *testing.T) {
	criu := fakeCRIU(t, `echo "Warn (x.c:1): odd"; echo "Warn (x.c:1): strange" >&2; echo "Error (criu/config.c:1042): Invalid value: x" >&2; exit 1`)
	dir := filepath.Join(t.TempDir(), "made")
	code, stdout, stderr := invoke(t, "dump", "--tree", strconv.Itoa(os.Getpid()), "--images-dir", dir, "--criu", criu)
	if code != exitFailed || stdout != "" || strings.Count(stderr, "Invalid value: x") != 1 || strings.Count(stderr, "CRIU: Warn (x.c:1): odd\n") != 1 ||
		strings.Count(stderr, "strange") != 1 {
		t.Errorf("exit code %d, stdout %q, stderr\n%s", code, stdout, stderr)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the images directory: %v, %v", info, err)
	}
	_, _, stderr = invoke(t, "dump", "--tree", strconv.Itoa(os.Getpid()), "--images-dir", dir, "--criu", criu, "--log-format", "json")
	for line := range strings.Lines(stderr) {
		if !json.Valid([]byte(line)) {
			t.Errorf("no JSON: %s", line)
		}
	}
}

// TestCRIUOptions: what CRIU is called with.
func TestCRIUOptions(t *testing.T) {
	called := filepath.Join(t.TempDir(), "called")
	criu := fakeCRIU(t, fmt.Sprintf(`echo "$@" >%s; exit 1`, called))
	pid, dir := strconv.Itoa(os.Getpid()), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "inventory.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		verb string
		args []string
		want string
	}{
		{"dump", []string{"-t", pid, "-D", dir}, "--tree " + pid + " --images-dir " + dir + " -v4 --log-file dump.log swrk"},
		{"dump", []string{"-t", pid, "-D", dir, "-R", "--", "-j", "-o", "x"}, "-v4 --log-file dump.log --leave-running -j -o x swrk"},
		{"restore", []string{"-D", dir, "-d", "--", "-j"}, "--images-dir " + dir + " -v4 --log-file restore.log -j swrk"},
	} {
		if code, _, stderr := invoke(t, append([]string{tt.verb, "--criu", criu}, tt.args...)...); code != exitFailed {
			t.Errorf("%s %q: exit code %d: %s", tt.verb, tt.args, code, stderr)
		}
		b, err := os.ReadFile(called)
		if err != nil || !strings.Contains(string(b), tt.want) {
			t.Errorf("%s %q: CRIU was called with %s (%v), want %s", tt.verb, tt.args, b, err, tt.want)
		}
	}
}

// TestWhereCRIUIs: the option comes before the environment, and that before the
// configuration.
func TestWhereCRIUIs(t *testing.T) {
	says := func(who string) string { return fakeCRIU(t, `echo "Error (x.c:1): `+who+`" >&2; exit 1`) }
	option, environment, config := says("by option"), says("by environment"), write(t, "criu: "+says("by configuration")+"\n")
	dump := []string{"dump", "-t", strconv.Itoa(os.Getpid()), "-D", t.TempDir(), "--config", config}
	want := func(who string, args ...string) {
		t.Helper()
		if code, _, stderr := invoke(t, args...); code != exitFailed || !strings.Contains(stderr, who) {
			t.Errorf("exit code %d, want that of the CRIU %s: %s", code, who, stderr)
		}
	}
	want("by configuration", dump...)
	t.Setenv("CRIUHOOK_CRIU", environment)
	want("by environment", dump...)
	want("by option", append(dump, "--criu", option)...)
}
