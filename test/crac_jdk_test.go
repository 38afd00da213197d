// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"criuhook/test/cracengine"
)

func init() { cracengine.Main() }

// realJDK is the home of a stock JDK.
func realJDK(version string) string {
	homes, _ := filepath.Glob("/usr/lib/jvm/java-" + version + "-openjdk-*")
	if len(homes) == 0 {
		return "/usr/lib/jvm/java-" + version + "-openjdk"
	}
	return homes[0]
}

// javaBuilt is where test/java is, built once: classes that run on JDK 21 and
// later, and the engine's half in the virtual machine.
var javaBuilt = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "java")
	if err != nil {
		return "", err
	}
	jdk := realJDK("21")
	sources, err := filepath.Glob("java/*.java")
	if err != nil {
		return "", err
	}
	// -XDignore…: sun.misc.Signal is no part of the language's libraries.
	javac := exec.Command(jdk+"/bin/javac", append([]string{"--release", "21", "-Xlint:-options", "-d", dir}, sources...)...)
	gcc := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-I"+jdk+"/include", "-I"+jdk+"/include/linux",
		"-o", dir+"/libcheckpoint.so", "java/checkpoint.c")
	for _, cmd := range []*exec.Cmd{javac, gcc} {
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
		}
	}
	return dir, os.Chmod(dir, 0o755)
})

// jdk is a home that stands in for a CRaC JDK's: a stock one with
// test/cracengine in it.
type jdk struct {
	home       string
	version    string
	generation cracengine.Generation
}

// newJDK makes a home, with a stock CRIU as lib/criu. Where it lies, only root
// can change anything, as in a package's JDK.
func newJDK(t testing.TB, version string, g cracengine.Generation) *jdk {
	t.Helper()
	parent, err := os.MkdirTemp("/opt", "jdk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(parent) })
	j := &jdk{home: filepath.Join(parent, "crac-"+version), version: version, generation: g}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	built, err := javaBuilt()
	must(err)
	must(os.Chmod(parent, 0o755))
	must(os.MkdirAll(j.lib(""), 0o755))
	must(os.Mkdir(filepath.Join(j.home, "bin"), 0o755))
	real := realJDK(version)
	for _, dir := range []string{"", "bin", "lib"} {
		entries, err := os.ReadDir(filepath.Join(real, dir))
		must(err)
		for _, e := range entries {
			to := filepath.Join(j.home, dir, e.Name())
			if _, err := os.Lstat(to); err == nil || e.Name() == "java" || e.Name() == "jcmd" {
				continue
			}
			must(os.Symlink(filepath.Join(real, dir, e.Name()), to))
		}
	}
	program := filepath.Join(j.home, "bin", "java")
	copyFile(t, "/proc/self/exe", program, 0o755)
	names := map[cracengine.Generation][]string{
		cracengine.Executable: {"lib/criuengine"},
		cracengine.Library:    {"lib/libcriuengine.so", "lib/criuhelper"},
		cracengine.Upstream:   {"lib/libcriuengine.so", "lib/criuhelper"},
	}[g]
	for _, name := range append(names, "bin/jcmd") {
		must(os.Link(program, filepath.Join(j.home, name)))
	}
	must(g.Write(j.home, real))
	if g == cracengine.Upstream { // by this text it is known
		f, err := os.OpenFile(j.lib("libcriuengine.so"), os.O_WRONLY|os.O_APPEND, 0)
		must(err)
		_, err = fmt.Fprintf(f, "Cannot find %s executable on the %s", "CRIU", "PATH")
		must(errors.Join(err, f.Close()))
	}
	copyFile(t, filepath.Join(built, "libcheckpoint.so"), j.lib("libcheckpoint.so"), 0o644)
	if g != cracengine.Upstream {
		copyFile(t, stockCRIU(t), j.lib("criu"), 0o755)
	}
	return j
}

func (j *jdk) lib(name string) string { return filepath.Join(j.home, "lib", name) }

// stockCRIU is the path of CRIU.
func stockCRIU(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("criu")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func copyFile(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close(), os.Chmod(to, mode)); err != nil { // not by the umask
		t.Fatal(err)
	}
}
