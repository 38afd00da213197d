// SPDX-License-Identifier: Apache-2.0

package rule_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"criuhook/criuhook/rule"
)

// tree writes files below a new directory and returns it.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLoad(t *testing.T) {
	dir := tree(t, map[string]string{
		"config.yaml":          "criu: /a/criu\nunknown: hangup\ninbound: hangup\nrules:\n  - {name: z, path: /z, idle: hangup}\n",
		"rules.d/20-b.yaml":    "rules:\n  - {name: b, path: /b, idle: hangup}\ncriu: /b/criu\n",
		"rules.d/10-a.yaml":    "rules:\n  - {name: a, path: /a, idle: hangup}\ninbound: refuse\n",
		"rules.d/30.yml":       "not: read\n",
		"rules.d/.hidden.yaml": "not: read\n",
	})
	config := filepath.Join(dir, "config.yaml")
	set, err := rule.Load(config, true)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range set.Rules[:3] {
		names = append(names, r.Name)
	}
	if got := strings.Join(names, " "); got != "z a b" || len(set.Rules) != 3+len(rule.BuiltIn()) {
		t.Errorf("%s, %d rules", got, len(set.Rules))
	}
	if set.Unknown != rule.Hangup || set.Inbound != rule.Refuse || set.CRIU != "/b/criu" {
		t.Errorf("%v %v %v", set.Unknown, set.Inbound, set.CRIU)
	}
	if got, want := set.Rules[1].Source, filepath.Join(dir, "rules.d/10-a.yaml")+":2"; got != want {
		t.Errorf("source %s, want %s", got, want)
	}
}

func TestLoadNothing(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.yaml")
	for _, name := range []string{config, os.DevNull} {
		set, err := rule.Load(name, false)
		if err != nil || len(set.Rules) != len(rule.BuiltIn()) || set.Unknown != rule.Refuse || set.Inbound != rule.Refuse {
			t.Errorf("%s: %+v, %v", name, set, err)
		}
	}
	if _, err := rule.Load(config, true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestLoadErrors(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []string
	}{
		{"all files at once", map[string]string{"config.yaml": "x: 1\n", "rules.d/a.yaml": "y: 1\n"},
			[]string{"config.yaml:1:1: unknown key", "rules.d/a.yaml:1:1: unknown key"}},
		{"a name in two files", map[string]string{"config.yaml": "rules: [{name: a, path: /a, idle: hangup}]\n", "rules.d/a.yaml": "rules: [{name: a, path: /a, idle: hangup}]\n"},
			[]string{`rules.d/a.yaml:1:16: a second rule named "a", the first is `, "config.yaml:1"}},
		{"a built-in rule's name", map[string]string{"config.yaml": "rules:\n  - {name: sssd, path: /a, idle: hangup}\n"},
			[]string{`config.yaml:2:12: "sssd" is the name of a built-in rule`}},
		{"a directory", map[string]string{"rules.d/a.yaml/x": ""}, []string{"rules.d/a.yaml is not a regular file"}},
		{"rules.d is a file", map[string]string{"rules.d": ""}, []string{"rules.d is not a directory"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := rule.Load(filepath.Join(tree(t, tt.files), "config.yaml"), false)
			for _, want := range tt.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v\nwant %s", err, want)
				}
			}
		})
	}
}

func TestLoadFIFO(t *testing.T) {
	name := filepath.Join(t.TempDir(), "config.yaml")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := rule.Load(name, true); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("got %v", err)
	}
}

type info struct {
	uid  uint32
	mode fs.FileMode
}

func (i info) Name() string       { return "f" }
func (i info) Size() int64        { return 0 }
func (i info) Mode() fs.FileMode  { return i.mode }
func (i info) ModTime() time.Time { return time.Time{} }
func (i info) IsDir() bool        { return false }
func (i info) Sys() any           { return &syscall.Stat_t{Uid: i.uid} }

func TestCheckOwner(t *testing.T) {
	for _, tt := range []struct {
		name string
		info info
		euid int
		want string
	}{
		{"root's", info{0, 0o644}, 0, ""},
		{"somebody's", info{1000, 0o644}, 0, "belongs to uid 1000"},
		{"group can write", info{0, 0o664}, 0, "has mode 0664"},
		{"others can write", info{0, 0o602}, 0, "has mode 0602"},
		{"a user's own", info{1000, 0o664}, 1000, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := rule.CheckOwner("f", tt.info, tt.euid)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// As root, a symlink to another user's file is no way around the check.
func TestLoadOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := tree(t, map[string]string{"config.yaml": "unknown: hangup\n", "rules.d/a.yaml": "", "other": "unknown: hangup\n"})
	config := filepath.Join(dir, "config.yaml")
	other := filepath.Join(dir, "other")
	if err := os.Chown(other, 1000, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := rule.Load(config, true); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, filepath.Join(dir, "rules.d/b.yaml")); err != nil {
		t.Fatal(err)
	}
	if _, err := rule.Load(config, true); err == nil || !strings.Contains(err.Error(), "b.yaml belongs to uid 1000") {
		t.Errorf("got %v", err)
	}
	if err := os.Chmod(filepath.Join(dir, "rules.d"), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := rule.Load(config, true); err == nil || !strings.Contains(err.Error(), "rules.d has mode 0777") {
		t.Errorf("got %v", err)
	}
}
