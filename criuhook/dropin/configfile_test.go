// SPDX-License-Identifier: Apache-2.0

package dropin_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"criuhook/criuhook/dropin"
)

func TestConfigStatement(t *testing.T) {
	for _, test := range []struct {
		config string
		want   want // nil: CRIU gives up
	}{
		{"", want{}},
		{"\n  \n# tree 5\n  # x\n", want{}},
		{"leave-running\n", want{"LeaveRunning": true}},
		{"leave-running", want{"LeaveRunning": true}},
		{"\t leave-running # why\n", want{"LeaveRunning": true}},
		{"leave-running# why\n", nil},
		{"leave-running\r\n", nil},
		{"shell-job\nno-shell-job\n", want{}},
		{"log-file a.log\n", want{"LogFile": "a.log"}},
		{"log-file=a.log\n", want{"LogFile": "a.log"}},
		{"log-file\ta.log\n", want{"LogFile": "a.log"}},
		{"log-file   a.log   # why\n", want{"LogFile": "a.log"}},
		{"log-file a#b\n", want{"LogFile": "a"}},
		{"log-file \"a.log\" # why\n", want{"LogFile": "a.log"}},
		{"log-file \"a.log\" b c\n", nil},
		{"log-file \"a.log\n", nil},
		{"log-file \"\n", nil},
		{"log-file a.log b.log\n", nil},
		{"log-f a.log\n", want{"LogFile": "a.log"}},
		{"verbosity 4\n", want{"LogLevel": int32(3)}}, // an optional argument needs "="
		{"verbosity=4\n", want{"LogLevel": int32(4)}},
		{"-verbosity=4\n", nil},
		// A blank behind the length of the name is refused, one before it cuts nothing.
		{"root \"/a b\"\n", want{"Root": "/a b"}},
		{"root \"/very/long/path name\"\n", nil},
		{"external \"unix[1]\\\"x\"\n", want{"External": []string{"unix[1]\"x"}}},
		// Without its argument an option takes the next line for it.
		{"log-file\nleave-running\n", want{"LogFile": "--leave-running"}},
		{"log-file\n", nil},
		{"leave-running\n ", want{"LeaveRunning": true}},
		{"\x00\nleave-running\x00x\n", want{"LeaveRunning": true}},
		{"shell-job\nhelp\n", nil},
		{"version\n", nil},
		{"nonsense\n", nil},
	} {
		env := world{vars: map[string]string{"CRIU_CONFIG_FILE": "/c"}, files: map[string]string{"/c": test.config}}
		c := dropin.Parse([]string{"restore"}, env.environment())
		switch {
		case test.want == nil:
			if !strings.Contains(c.PassOn, "/c: ") {
				t.Errorf("%q: passed on because %q, want the file's name", test.config, c.PassOn)
			}
		case c.PassOn != "":
			t.Errorf("%q: passed on because %q", test.config, c.PassOn)
		case !reflect.DeepEqual(fields(c), test.want):
			t.Errorf("%q: got %v, want %v", test.config, fields(c), test.want)
		}
	}
}

func TestConfigOrder(t *testing.T) {
	all := world{
		vars: map[string]string{"HOME": "/h", "CRIU_CONFIG_FILE": "/e"},
		files: map[string]string{
			"/etc/criu/default.conf":  "log-file global\naction-script global\nverbosity",
			"/h/.criu/default.conf":   "log-file home\naction-script home\nverbosity",
			"/e":                      "log-file env\naction-script env\nverbosity",
			"/f":                      "log-file file\naction-script file\nverbosity",
			"fix--config=/f":          "",
			"/config=/f--no-such-one": "",
		},
	}
	without := func(names ...string) world {
		w := world{vars: map[string]string{}, files: all.files}
		for name, value := range all.vars {
			w.vars[name] = value
		}
		for _, name := range names {
			delete(w.vars, name)
		}
		return w
	}
	for _, test := range []struct {
		world   world
		line    string
		log     string
		scripts string
	}{
		{all, "restore", "env", "global home env"},
		{without("HOME"), "restore", "env", "global env"},
		{without("CRIU_CONFIG_FILE"), "restore", "home", "global home"},
		{all, "restore -o argv --action-script argv", "argv", "global home env argv"},
		{all, "restore --no-default-config", "env", "env"},
		{all, "restore --no-default", "env", "global home env"}, // abbreviated, CRIU does not see it
		{all, "restore --config /f", "file", "env file"},
		{all, "restore --config=/f -o argv", "argv", "env file"},
		{all, "restore --conf /f", "env", "global home env"},
		{all, "restore --config /f --config /g", "env", "env"},
		{all, "restore --exec-cmd -- x --config /f", "file", "env file"},
		{all, "restore --pidfile 123--config=/f", "env", "env"}, // the name is then "onfig=/f"
	} {
		c := dropin.Parse(strings.Fields(test.line), test.world.environment())
		if c.PassOn != "" {
			t.Errorf("%s: passed on because %q", test.line, c.PassOn)
		}
		if scripts := strings.Join(c.ActionScripts, " "); c.LogFile != test.log || scripts != test.scripts {
			t.Errorf("%s: log %q, scripts %q, want %q, %q", test.line, c.LogFile, scripts, test.log, test.scripts)
		}
		if level := int32(2 + len(strings.Fields(strings.ReplaceAll(test.scripts, "argv", "")))); c.LogLevel != level {
			t.Errorf("%s: level %d, want %d", test.line, c.LogLevel, level)
		}
	}
}

func TestConfigUnreadable(t *testing.T) {
	for err, passOn := range map[error]bool{
		fs.ErrNotExist: false, fs.ErrPermission: false, syscall.ENOTDIR: false, syscall.ELOOP: false,
		syscall.EIO: true, errors.New("a pipe"): true,
	} {
		c := dropin.Parse([]string{"restore"}, world{err: &fs.PathError{Op: "open", Path: "/c", Err: err}}.environment())
		if (c.PassOn != "") != passOn {
			t.Errorf("%v: passed on because %q", err, c.PassOn)
		}
	}
}

func TestSystemReadsWhatCRIUCanReadAgain(t *testing.T) {
	dir := t.TempDir()
	pipe, plain := filepath.Join(dir, "pipe"), filepath.Join(dir, "plain")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(plain, []byte("leave-running\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CRIU_CONFIG_FILE", plain)
	for name, passOn := range map[string]bool{plain: false, dir: false, os.DevNull: false, "/nowhere": false, pipe: true} {
		c := dropin.Parse([]string{"restore", "--config", name}, dropin.System())
		if (c.PassOn != "") != passOn {
			t.Errorf("%s: passed on because %q", name, c.PassOn)
		}
		if !passOn && !c.LeaveRunning {
			t.Errorf("%s: CRIU_CONFIG_FILE was not read", name)
		}
	}
}
