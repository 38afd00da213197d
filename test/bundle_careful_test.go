// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestBundleUndoKeepsTheLast: where lib/criu is gone or is no CRIU, the one that
// was kept is not thrown away.
func TestBundleUndoKeepsTheLast(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	before := j.snapshot(t)
	j.bundle(t, 0, with())
	if err := os.Remove(j.lib("criu")); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 1, []string{"--check"}, "is gone", "--undo")
	j.bundle(t, 1, with(), "is gone")
	j.bundle(t, 0, []string{"--undo"}, "putting back what was there")
	if after := j.snapshot(t); after != before {
		t.Errorf("not what was there:\n%s\nbefore:\n%s", after, before)
	}
	j.bundle(t, 0, with())
	if err := os.WriteFile(j.lib("new"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(j.lib("new"), j.lib("criu")); err != nil {
		t.Fatal(err)
	}
	sum := sumOf(j.lib("criu.real"))
	j.bundle(t, 1, []string{"--undo"}, "may be the only one that is left")
	if got := sumOf(j.lib("criu.real")); got != sum || sum == "" {
		t.Error("criu.real is gone")
	}
}

// TestBundleSetUIDForAGroup: who may execute the JDK's CRIU, and nobody else, may
// execute a set-user-id lib/criu.
func TestBundleSetUIDForAGroup(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	if err := errors.Join(os.Chown(j.lib("criu"), 0, 12), os.Chmod(j.lib("criu"), 0o750|os.ModeSetuid)); err != nil {
		t.Fatal(err)
	}
	want := owners(t, j.lib("criu"))
	j.bundle(t, 2, with(), "trusted like root")
	j.bundle(t, 0, with("--setuid", "yes"))
	if got := owners(t, j.lib("criu")); got != want {
		t.Errorf("lib/criu is %s, expected %s", got, want)
	}
	j.bundle(t, 0, []string{"--check"}, "works")
	j.bundle(t, 0, []string{"--undo"})
	if got := owners(t, j.lib("criu")); got != want {
		t.Errorf("lib/criu is %s, expected %s", got, want)
	}
}

// TestBundleSetUIDWritable: what others than root can write to, directly or by a
// link on the way, does not become set-user-id.
func TestBundleSetUIDWritable(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	if err := os.Chmod(j.lib("criu"), 0o775); err != nil { // as the note has it
		t.Fatal(err)
	}
	j.bundle(t, 1, with("--setuid", "yes"), "can be changed by others than root")
	j.bundle(t, 0, with())
	j.bundle(t, 1, with("--setuid", "yes"), "can be changed by others than root")
	if err := os.Chmod(j.lib("criu.real"), 0o755); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 0, with("--setuid", "yes"))
	if got := owners(t, j.lib("criu")); got != "0:0 urwxr-xr-x" {
		t.Errorf("lib/criu is %s", got)
	}
	if err := os.Chmod(j.lib("criu"), 0o775|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 1, []string{"--check"}, "can be changed by others than root")

	// A link to a link of a user's, to root's own.
	dir, err := os.MkdirTemp("/opt", "way")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, int(alice.UID), -1),
		os.Symlink("/usr/sbin/criu", filepath.Join(dir, "criu")), os.Symlink("/usr/sbin", filepath.Join(dir, "sbin"))); err != nil {
		t.Fatal(err)
	}
	for name, files := range map[string]map[string]string{
		"a file":      {"lib/criu": "->" + filepath.Join(dir, "criu")},
		"a directory": {"lib/criu": "->../way/criu", "way": "->" + filepath.Join(dir, "sbin")},
	} {
		j := newFakeJDK(t, files)
		before := j.snapshot(t)
		j.bundle(t, 1, with("--setuid", "yes"), dir+" (owner uid")
		if after := j.snapshot(t); after != before {
			t.Errorf("by %s: changed:\n%s\nbefore:\n%s", name, after, before)
		}
	}
}
