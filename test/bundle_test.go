// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"criuhook/test/app"
)

// TestBundleLayouts: in, looked at, in again, and out, with all layouts of a JDK
// that looks for CRIU in its lib.
func TestBundleLayouts(t *testing.T) {
	need(t)
	for name, files := range map[string]map[string]string{
		"program":                {},
		"program by library":     {"lib/libcrexec.so": "\x7fELF"},
		"library":                {"lib/criuengine": "-", "lib/libcriuengine.so": looksInLib},
		"link to the system's":   {"lib/criu": "->/usr/sbin/criu"},
		"link inside of the JDK": {"lib/criu": "->../bin/criu", "bin/criu": contentsOf("/usr/sbin/criu")},
	} {
		t.Run(name, func(t *testing.T) {
			j := newFakeJDK(t, files)
			if err := os.Chown(j.home, 0, 12); err != nil {
				t.Fatal(err)
			}
			if files["lib/criu"] == "" {
				if err := errors.Join(os.Chown(j.lib("criu"), 0, 12), os.Chmod(j.lib("criu"), 0o750)); err != nil {
					t.Fatal(err)
				}
			}
			before := j.snapshot(t)
			stat := func() string { return owners(t, j.lib("criu")) }
			was := stat()
			j.bundle(t, 1, []string{"--check"}, "criuhook is not in")
			j.bundle(t, 0, []string{"--undo"}, "nothing to undo")
			j.bundle(t, 0, with(), "is now criuhook", "Version: ")
			if !isCriuhook(j.lib("criu")) || stat() != was {
				t.Errorf("lib/criu is not criuhook, or not as it was (%s): %s", was, stat())
			}
			j.bundle(t, 0, []string{"--check"}, "works", "set-user-id: no")
			j.bundle(t, 0, with(), "nothing to do")

			// Another build of criuhook takes the first one's place.
			other := filepath.Join(folder(t), "criuhook")
			if err := os.WriteFile(other, append([]byte(contentsOf(criuhook)), '\n'), 0o755); err != nil {
				t.Fatal(err)
			}
			j.bundle(t, 0, []string{"--criuhook", other}, "is now criuhook")
			if sumOf(j.lib("criu")) != sumOf(other) {
				t.Error("lib/criu is not the other criuhook")
			}
			j.bundle(t, 0, []string{"--check"}, "works")
			j.bundle(t, 0, []string{"--undo"}, "the JDK's own again")
			if after := j.snapshot(t); after != before {
				t.Errorf("not what was there:\n%s\nbefore:\n%s", after, before)
			}
			j.bundle(t, 1, []string{"--check"}, "criuhook is not in")
		})
	}
}

// TestBundleSetUID: the set-user-id bit is neither kept nor lost without a word.
func TestBundleSetUID(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	if err := os.Chmod(j.lib("criu"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	before := j.snapshot(t)
	j.bundle(t, 2, with(), "--setuid yes", "--setuid no", "Nothing was changed")
	if after := j.snapshot(t); after != before {
		t.Errorf("changed:\n%s", after)
	}
	isSetUID := func(name string, want bool) {
		t.Helper()
		info, err := os.Stat(j.lib(name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode()&os.ModeSetuid != 0; got != want {
			t.Errorf("%s: set-user-id is %v, expected %v", name, got, want)
		}
	}
	j.bundle(t, 0, with("--setuid", "yes"), "set-user-id: yes (--setuid yes)")
	isSetUID("criu", true)
	isSetUID("criu.real", false)
	j.bundle(t, 0, []string{"--check"}, "works", "set-user-id: yes")
	j.bundle(t, 0, with(), "nothing to do")
	isSetUID("criu", true)
	j.bundle(t, 0, with("--setuid=no"), "set-user-id: no (--setuid no)")
	isSetUID("criu", false)
	isSetUID("criu.real", false)
	j.bundle(t, 0, []string{"--check"}, "works", "set-user-id: no")
	j.bundle(t, 0, with("--setuid=yes"))
	isSetUID("criu", true)

	// Something else takes the bit away: noticed.
	if err := os.Chmod(j.lib("criu"), 0o755); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 1, []string{"--check"}, "something took the bit away")
	j.bundle(t, 0, with(), "mode 4755")

	// Others could put something else in the place of criu.real: noticed.
	if err := os.Chmod(j.home, 0o775); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 1, []string{"--check"}, "can be changed by others than root")
	j.bundle(t, 1, with("--setuid", "yes"), "can be changed by others than root")
	j.bundle(t, 0, with("--setuid", "no"))
	if err := os.Chmod(j.home, 0o755); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 0, []string{"--undo"})
	if after := j.snapshot(t); after != before {
		t.Errorf("not what was there:\n%s\nbefore:\n%s", after, before)
	}

	// A CRIU that is not the JDK's keeps its bit, and that is said.
	system := filepath.Join(j.home, "system-criu")
	if err := errors.Join(os.Rename(j.lib("criu"), system), os.Symlink(system, j.lib("criu"))); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 0, with("--setuid", "no"), "leads to "+system)
	isSetUID("criu", false)
	isSetUID("criu.real", true)
	j.bundle(t, 0, []string{"--check"}, "works", "leads to "+system)
	j.bundle(t, 0, []string{"--undo"})
	if err := os.Rename(system, j.lib("criu")); err != nil {
		t.Fatal(err)
	}

	// A JDK that never had the bit gets it only when asked for.
	if err := os.Chmod(j.lib("criu"), 0o755); err != nil {
		t.Fatal(err)
	}
	j.bundle(t, 0, with(), "!set-user-id: yes")
	isSetUID("criu", false)
	j.bundle(t, 0, with("--setuid", "yes"), "set-user-id: yes")
	isSetUID("criu", true)
}

// TestBundleUpgrade: a new lib/criu of the JDK's is noticed, and taken in.
func TestBundleUpgrade(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	upgrade := func(mode os.FileMode) string {
		t.Helper()
		file := j.lib("new")
		text := append([]byte(contentsOf("/usr/sbin/criu")), "upgraded"...)
		if err := errors.Join(os.WriteFile(file, text, 0o755), os.Chmod(file, mode), os.Rename(file, j.lib("criu"))); err != nil {
			t.Fatal(err)
		}
		return sumOf(j.lib("criu"))
	}
	j.bundle(t, 0, with())
	sum := upgrade(0o755)
	j.bundle(t, 1, []string{"--check"}, "upgraded", "run bundle-jdk")
	j.bundle(t, 0, with(), "is now criuhook")
	if got := sumOf(j.lib("criu.real")); got != sum || !isCriuhook(j.lib("criu")) {
		t.Error("criu.real is not the JDK's new CRIU")
	}
	j.bundle(t, 0, []string{"--check"}, "works")

	// The decision is asked for anew when the JDK's has changed.
	upgrade(0o755 | os.ModeSetuid)
	j.bundle(t, 2, with(), "--setuid yes")
	j.bundle(t, 0, with("--setuid", "yes"))
	sum = upgrade(0o755)
	j.bundle(t, 2, with(), "before the upgrade criuhook was set-user-id")

	j.bundle(t, 0, []string{"--undo"}, "removing what was left")
	if names := namesIn(t, j.lib("")); slices.Contains(names, "criu.real") || slices.Contains(names, "criu.bundle") || sumOf(j.lib("criu")) != sum {
		t.Errorf("left: %q", names)
	}
}

// TestBundleRefuses: what is not understood is not touched.
func TestBundleRefuses(t *testing.T) {
	need(t)
	for _, tt := range []struct {
		name  string
		files map[string]string
		args  []string
		code  int
		want  []string
	}{
		{name: "no CRaC", files: map[string]string{"lib/criuengine": "-"}, code: 1, want: []string{"without CRaC's CRIU engine"}},
		{name: "no JDK", files: map[string]string{"lib/criuengine": "-", "bin/java": "-", "lib/server/libjvm.so": "-"}, code: 1, want: []string{"is no JDK"}},
		{name: "looks in PATH", files: map[string]string{"lib/libcriuengine.so": looksInPath}, code: 1, want: []string{"looks for criu in PATH", "/usr/local/bin/criu", "crac-env"}},
		{name: "no CRIU", files: map[string]string{"lib/criu": "-"}, code: 1, want: []string{"has no CRIU of its own", "crac-env"}},
		{name: "a script", files: map[string]string{"lib/criu": "#!/bin/sh\nexec /usr/sbin/criu \"$@\"\n"}, code: 1, want: []string{"perhaps a wrapper"}},
		{name: "a program that is not CRIU", files: map[string]string{"lib/criu": contentsOf("/bin/true")}, code: 1, want: []string{"perhaps a wrapper"}},
		{name: "CRIU that does not run", files: map[string]string{"lib/criu": "\x7fELF CRTOOLS_SCRIPT_ACTION"}, code: 1, want: []string{"does not run"}},
		{name: "a link to nothing", files: map[string]string{"lib/criu": "->/nowhere/criu"}, code: 1, want: []string{"leads nowhere"}},
		{name: "a link to criuhook", files: map[string]string{"lib/criu": "->" + criuhook}, code: 1, want: []string{"a link to criuhook already"}},
		{name: "a criu.real of somebody else's", files: map[string]string{"lib/criu.real": "x"}, code: 1, want: []string{"not by this script"}},
		{name: "criuhook alone", files: map[string]string{"lib/criu": contentsOf(criuhook)}, code: 1, want: []string{"is gone", "reinstall"}},
		{name: "not criuhook", args: []string{"--criuhook", "/bin/true"}, code: 1, want: []string{"/bin/true is not criuhook"}},
		{name: "no criuhook", args: []string{"--criuhook", "/nowhere"}, code: 1, want: []string{"no such file"}},
		{name: "an unknown answer", args: []string{"--setuid", "keep"}, code: 2, want: []string{"must be yes or no"}},
		{name: "an unknown option", args: []string{"--nothing"}, code: 2, want: []string{"unknown option", "Usage: bundle-jdk"}},
		{name: "two things at once", args: []string{"--check", "--undo"}, code: 2, want: []string{"exclude each other"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newFakeJDK(t, tt.files)
			before := j.snapshot(t)
			if tt.args == nil {
				tt.args = with()
			}
			j.bundle(t, tt.code, tt.args, tt.want...)
			if after := j.snapshot(t); after != before {
				t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
			}
			if tt.code == 1 && !slices.Contains(tt.args, "/bin/true") && !slices.Contains(tt.args, "/nowhere") {
				j.bundle(t, 1, []string{"--check"})
			}
		})
	}
	bundleAs(t, root, "../scripts/bundle-jdk", 2, nil, "JAVA_HOME is missing")
	bundleAs(t, root, "../scripts/bundle-jdk", 1, []string{"/nowhere"}, "no such directory")
}

// TestBundleNeverWithout: whoever starts lib/criu meanwhile always gets CRIU.
func TestBundleNeverWithout(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	var runs atomic.Int64
	failed := make(chan string, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			out, err := exec.Command(j.lib("criu"), "--version").CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), "Version: ") {
				failed <- fmt.Sprintf("%v\n%s", err, out)
				return
			}
			runs.Add(1)
		}
	}()
	for range 5 {
		now := runs.Load()
		j.bundle(t, 0, with())
		j.bundle(t, 0, []string{"--undo"})
		eventually(t, "another start of lib/criu", func() bool { return runs.Load() > now || len(failed) > 0 })
	}
	stop()
	<-done
	select {
	case f := <-failed:
		t.Error("lib/criu did not work at a moment:", f)
	default:
		t.Logf("%d starts", runs.Load())
	}
}

// TestBundleOwnJDK: a user's own JDK, and another's.
func TestBundleOwnJDK(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	dir := folder(t) // the checkout may be where only root can look
	script := filepath.Join(dir, "bundle-jdk")
	for to, from := range map[string]string{script: "../scripts/bundle-jdk", filepath.Join(dir, "criuhook"): criuhook} {
		if err := os.WriteFile(to, []byte(contentsOf(from)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bundleAs(t, alice, script, 1, []string{j.home}, "cannot write into")
	err := filepath.WalkDir(j.home, func(file string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(file, int(alice.UID), int(alice.GID)))
	})
	if err != nil {
		t.Fatal(err)
	}
	before := j.snapshot(t)
	bundleAs(t, alice, script, 0, []string{j.home}, "is now criuhook") // the one beside the script
	bundleAs(t, alice, script, 0, []string{"--check", j.home}, "works")
	// Not root's to touch: its owner could put links in root's way.
	was := j.snapshot(t)
	for _, args := range [][]string{with("--setuid", "yes"), with("--setuid", "no"), {"--check"}, {"--undo"}} {
		j.bundle(t, 1, args, "lead root astray", fmt.Sprintf("Run this as uid %d", alice.UID))
	}
	if now := j.snapshot(t); now != was {
		t.Errorf("changed by root:\n%s\nbefore:\n%s", now, was)
	}
	bundleAs(t, alice, script, 0, []string{"--undo", j.home})
	if after := j.snapshot(t); after != before {
		t.Errorf("not what was there:\n%s\nbefore:\n%s", after, before)
	}
}

// containerCapabilities are those that Docker and podman give to a container, with
// the two that CRIU needs for --unprivileged.
const containerCapabilities = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap," +
	"+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap,+checkpoint_restore,+sys_ptrace"

// TestBundleSetUIDWorks: a user without rights dumps and restores a process of
// its own by a bundled lib/criu that is set-user-id, also where root itself has
// only what root has in a container.
func TestBundleSetUIDWorks(t *testing.T) {
	need(t)
	j := newFakeJDK(t, nil)
	j.bundle(t, 0, with("--setuid", "yes"))
	for name, bounded := range map[string]bool{"on a host": false, "as in a container": true} {
		for _, rule := range []string{"reconnect", "hangup"} {
			t.Run(name+", "+rule, func(t *testing.T) { setUIDWorks(t, j, rule, bounded) })
		}
	}
}

func setUIDWorks(t *testing.T, j fakeJDK, rule string, bounded bool) {
	_, path := daemon(t, "unix", rule)
	a := startApp(t, alice, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir := folder(t)
	run := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), criuTime)
		defer cancel()
		log := filepath.Join(dir, args[0]+".log")
		args = append(args, "-D", dir, "-v4", "-o", args[0]+".log", "--shell-job")
		cmd := exec.CommandContext(ctx, j.lib("criu"), args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice.UID, Gid: alice.GID, Groups: alice.Groups}}
		if bounded { // the bounding set is root's to shrink
			ids := []string{"--bounding-set", containerCapabilities, "--inh-caps=-all",
				"--reuid", fmt.Sprint(alice.UID), "--regid", fmt.Sprint(alice.GID), "--groups", "1000,2001,2002", j.lib("criu")}
			cmd = exec.CommandContext(ctx, "setpriv", append(append(ids, args...), "--unprivileged")...)
		}
		// Nothing of these decides what runs as root.
		cmd.Env = []string{"PATH=/nowhere", "CRIUHOOK_CRIU=/bin/false", "CRIUHOOK_CONFIG=/nowhere/config.yaml", "CRIUHOOK_LOG_FILE=" + filepath.Join(dir, "not-by-root")}
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		t.Logf("%s says: %s", args[0], out)
		if err != nil {
			t.Fatalf("%s: %v\n%s\n%s", args[0], err, out, Result{Log: contentsOf(log)}.tail())
		}
	}
	run("dump", "-t", fmt.Sprint(a.PID))
	a.Gone(t)
	awaitFree(t, a.dumpedThreads(dir))
	run("restore", "-d")
	a.Awake(t)
	if rule == "reconnect" {
		a.Request(t, "c")
	}
	a.Do(t, app.Command{Op: "close", Conn: "c"})
	if _, err := os.Stat(filepath.Join(dir, "not-by-root")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the user's environment made root write a file:", err)
	}
	nothingLeft(t)
}
