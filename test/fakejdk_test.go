// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// fakeJDK is a tree that looks like a JDK with CRaC, with the real CRIU in it.
type fakeJDK struct{ home string }

// What a JDK's engine says of where it looks for CRIU. The second is put together
// only when it runs: the test's own program is the engine of other tests' JDKs,
// and they are known by this text.
var (
	looksInLib  = "\x7fELF criu_location\x00path to the CRIU executable.\x00"
	looksInPath = looksInLib + strings.Join([]string{"Cannot find CRIU", "executable", "on the PATH\x00"}, " ")
)

// newFakeJDK makes a JDK with the files named, besides those that each has; one
// that begins with -> is a link.
func newFakeJDK(t *testing.T, files map[string]string) fakeJDK {
	t.Helper()
	// Not below /tmp, which others can write to.
	dir, err := os.MkdirTemp("/opt", "jdk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"bin/java": "", "lib/server/libjvm.so": "CRaCAllowedOpenFilePrefixes\x00", "lib/criuengine": "\x7fELF", "lib/criu": contentsOf("/usr/sbin/criu")}
	for name, text := range files {
		all[name] = text
	}
	for name, text := range all {
		file := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		if to, ok := strings.CutPrefix(text, "->"); ok {
			err = errors.Join(err, os.Symlink(to, file))
		} else if text != "-" {
			err = errors.Join(err, os.WriteFile(file, []byte(text), 0o755))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return fakeJDK{dir}
}

func (j fakeJDK) lib(name string) string { return filepath.Join(j.home, "lib", name) }

// bundle runs the script on the JDK and wants an exit code and parts of what it
// says; with "!" before them they must not be there.
func (j fakeJDK) bundle(t *testing.T, code int, args []string, want ...string) string {
	t.Helper()
	return bundleAs(t, root, "../scripts/bundle-jdk", code, append(args, j.home), want...)
}

func bundleAs(t *testing.T, u User, script string, code int, args []string, want ...string) string {
	t.Helper()
	cmd := exec.Command("/bin/bash", append([]string{script}, args...)...)
	if u.UID != 0 {
		cmd.Dir = filepath.Dir(script)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("bundle-jdk %q: exit status %d, expected %d\n%s", args, got, code, out)
	}
	for _, w := range want {
		if strings.Contains(string(out), w) == strings.HasPrefix(w, "!") {
			t.Errorf("bundle-jdk %q says, expected %q:\n%s", args, w, out)
		}
	}
	return string(out)
}

// with is how the script is told which criuhook.
func with(args ...string) []string { return append(args, "--criuhook", criuhook) }

// snapshot is all that can be seen of lib: names, modes, owners, times, contents.
func (j fakeJDK) snapshot(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(j.lib(""), func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		to, _ := os.Readlink(file)
		fmt.Fprintln(&b, file, info.Mode(), st.Uid, st.Gid, info.ModTime().UnixNano(), to, sumOf(file))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func sumOf(file string) string {
	out, _ := exec.Command("sha256sum", file).Output()
	sum, _, _ := bytes.Cut(out, []byte(" "))
	return string(sum)
}

// isCriuhook tells whether a file is the binary under test.
func isCriuhook(file string) bool { return sumOf(file) == sumOf(criuhook) }

// owners are owner, group and mode of what a name leads to.
func owners(t *testing.T, file string) string {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprint(st.Uid, ":", st.Gid, " ", info.Mode())
}

func namesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}
