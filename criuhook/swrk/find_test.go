// SPDX-License-Identifier: Apache-2.0

package swrk_test

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"criuhook/criuhook/swrk"
)

// tree is a folder with programs; it returns their absolute paths.
type tree string

func (r tree) path(name string) string { return filepath.Join(string(r), name) }

func (r tree) put(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	file := r.path(name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return file
}

func (r tree) link(t *testing.T, name, target string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(r.path(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, r.path(name)); err != nil {
		t.Fatal(err)
	}
	return r.path(name)
}

func newTree(t *testing.T) (tree, swrk.Finder) {
	r := tree(t.TempDir())
	self := r.put(t, "lib/criuhook", "us", 0o755)
	return r, swrk.Finder{Self: self, Dirs: []string{r.path("sbin"), r.path("bin")}}
}

func found(t *testing.T, f swrk.Finder, want string) {
	t.Helper()
	if got, err := swrk.Find(f); err != nil || got != want {
		t.Errorf("found %q, %v; want %s", got, err, want)
	}
}

func failed(t *testing.T, f swrk.Finder, words ...string) {
	t.Helper()
	got, err := swrk.Find(f)
	if err == nil {
		t.Errorf("found %s, want an error with %q", got, words)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v: want %q in it", err, word)
		}
	}
}

func TestFindOrder(t *testing.T) {
	r, f := newTree(t)
	failed(t, f, "lib/criu.real", "sbin/criu", "install CRIU", "CRIUHOOK_CRIU")

	bin := r.put(t, "bin/criu", "a", 0o755)
	found(t, f, bin)
	sbin := r.put(t, "sbin/criu", "a", 0o755)
	found(t, f, sbin)
	f.Path = r.path("none") + "::.:" + r.path("opt")
	found(t, f, sbin)
	opt := r.put(t, "opt/criu", "a", 0o755)
	found(t, f, opt)

	f.Link = r.link(t, "usr/criu", f.Self)
	found(t, f, opt)
	beside := r.put(t, "usr/criu.real", "a", 0o755)
	found(t, f, beside)
	real := r.put(t, "lib/criu.real", "a", 0o755)
	found(t, f, real)

	f.Config = r.put(t, "c", "a", 0o755)
	found(t, f, f.Config)
	f.Environment = r.put(t, "e", "a", 0o755)
	found(t, f, f.Environment)
	f.Option = r.put(t, "o", "a", 0o755)
	found(t, f, f.Option)
}

func TestFindDoesNotFindItself(t *testing.T) {
	r, f := newTree(t)
	f.Link = r.link(t, "usr/criu", f.Self)
	f.Path = strings.Join([]string{r.path("usr"), r.path("hard"), r.path("script"), r.path("other")}, ":")
	if err := os.Mkdir(r.path("hard"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(f.Self, r.path("hard/criu")); err != nil {
		t.Fatal(err)
	}
	r.put(t, "script/criu", "#!/bin/sh\nexec "+f.Link+" \"$@\"\n", 0o755)
	failed(t, f, "usr/criu (that is criuhook itself", "hard/criu (that is criuhook", "script/criu (a script that mentions")

	// A script of somebody else's is as good as any CRIU.
	found(t, f, func() string { return r.put(t, "other/criu", "#!/bin/sh\nexec /opt/criu \"$@\"\n", 0o755) }())

	f.Option = r.path("usr/criu")
	failed(t, f, "--criu names", "criuhook itself")
	f.Option = r.path("script/criu")
	failed(t, f, "--criu names", "mentions")
	f.Option = ""
	r.link(t, "lib/criu.real", "criuhook")
	failed(t, f, "lib/criu.real should be the real CRIU", "criuhook itself")
}

func TestFindKnowsACopy(t *testing.T) {
	r, f := newTree(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	copied := r.put(t, "bin/criu", "", 0o755)
	out, err := os.OpenFile(copied, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	f.Image = self
	failed(t, f, "another copy")
	f.Config = copied
	failed(t, f, "another copy", "criu:")
}

func TestFindRefusesWhatIsUnusable(t *testing.T) {
	r, f := newTree(t)
	r.put(t, "bin/criu", "a", 0o755)
	plain := r.put(t, "plain", "a", 0o644)
	for path, want := range map[string]string{
		"bin/criu":       "not an absolute path",
		plain:            "not executable",
		r.path("bin"):    "not a regular file",
		r.path("absent"): "no such file",
	} {
		f.Option, f.Environment, f.Config = path, "", ""
		failed(t, f, "--criu names "+path, want)
		f.Option, f.Environment = "", path
		failed(t, f, "CRIUHOOK_CRIU names "+path, want)
		f.Environment, f.Config = "", path
		failed(t, f, "configuration names "+path, want)
	}
	f.Config = ""
	r.put(t, "lib/criu.real", "a", 0o644)
	failed(t, f, "lib/criu.real", "not executable")
}

func TestFindElevated(t *testing.T) {
	r, f := newTree(t)
	f.Elevated = true
	f.Link = r.link(t, "usr/criu", f.Self)
	r.put(t, "usr/criu.real", "a", 0o755)
	f.Environment = r.put(t, "e", "a", 0o755)
	f.Path = r.path("opt")
	r.put(t, "opt/criu", "a", 0o755)
	failed(t, f, "tried "+r.path("lib/criu.real")+", "+r.path("sbin/criu"))
	found(t, f, func() string { return r.put(t, "sbin/criu", "a", 0o755) }())

	f.Option = f.Environment
	failed(t, f, "set-user-id")
	f.Option = ""
	// The folders of a test can be changed by others: /tmp is anybody's.
	f.Config = r.put(t, "c", "a", 0o777)
	failed(t, f, "others than root")
	f.Config = ""
	r.put(t, "lib/criu.real", "a", 0o777)
	failed(t, f, "others than root")
}

// TestFindElevatedFollowsLinks: a link in a user's directory, on the way from one
// of root's to another of root's, is the user's to change.
func TestFindElevatedFollowsLinks(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to have directories that are root's alone")
	}
	dir, err := os.MkdirTemp("/run", "criuhook-test-") // unlike /tmp nobody else's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := tree(dir)
	self := r.put(t, "bin/criuhook", "self", 0o755)
	criu := r.put(t, "real/criu", "a", 0o755)
	users := r.link(t, "users/criu", criu)
	roots := r.link(t, "roots/criu", criu)
	relative := filepath.Join(dir, "relative")
	for _, err := range []error{
		os.Chmod(dir, 0o755),
		os.Symlink("roots/../roots/criu", relative),
		os.Lchown(filepath.Dir(users), 1000, 1000),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f := swrk.Finder{Self: self, Link: self, Elevated: true}
	for _, path := range []string{criu, roots, r.link(t, "roots/twice", roots), relative} {
		f.Config = path
		found(t, f, path)
	}
	for _, path := range []string{users, r.link(t, "roots/by-users", users)} {
		f.Config = path
		failed(t, f, "configuration names "+path, filepath.Dir(users), "others than root")
	}
}

func TestNewFinder(t *testing.T) {
	t.Setenv("CRIUHOOK_CRIU", "/e")
	f, err := swrk.NewFinder("/o", "/c")
	if err != nil {
		t.Fatal(err)
	}
	if f.Option != "/o" || f.Environment != "/e" || f.Config != "/c" || f.Elevated {
		t.Errorf("%+v", f)
	}
	self, err := os.Executable()
	if err != nil || f.Self != self {
		t.Errorf("self is %s, want %s (%v)", f.Self, self, err)
	}
}
