// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"criuhook/test/cracengine"
)

// cracSoon is how long a thread's first lookup may take after a restore.
const cracSoon = 50 * time.Millisecond

// setup is what people set, and do to the JDK, to have criuhook in it.
type setup struct {
	name string
	// in prepares the JDK; env and options are for both, checkpoint and restore.
	in func(t testing.TB, j *jdk) (env, options []string)
}

// engineOptions are -XX:CRaCEngineOptions where the engine has them.
func engineOptions(o ...string) []string {
	return []string{"-XX:CRaCEngineOptions=" + strings.Join(o, ",")}
}

var setups = []setup{
	{"script", func(t testing.TB, j *jdk) (env, options []string) {
		if j.generation == cracengine.Upstream {
			return nil, engineOptions("args=--action-script=" + criuhook)
		}
		return []string{"CRAC_CRIU_OPTS=--action-script=" + criuhook}, nil
	}},
	{"dropin", func(t testing.TB, j *jdk) (env, options []string) {
		path := criuByPath(t)
		if j.generation == cracengine.Executable {
			return []string{"CRAC_CRIU_PATH=" + path}, nil
		}
		return nil, engineOptions("criu_location=" + path)
	}},
	{"bundled", func(t testing.TB, j *jdk) (env, options []string) {
		if j.generation == cracengine.Upstream { // has no CRIU of its own
			return []string{"PATH=" + filepath.Dir(criuByPath(t)) + ":" + os.Getenv("PATH")}, nil
		}
		bundle(t, j)
		return nil, nil
	}},
}

// criuByPath is criuhook under CRIU's name, with nothing beside it.
func criuByPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/opt", "dropin")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		err = os.Symlink(criuhook, filepath.Join(dir, "criu"))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "criu")
}

// bundle puts criuhook into the JDK as scripts/bundle-jdk does.
func bundle(t testing.TB, j *jdk, options ...string) {
	t.Helper()
	cmd := exec.Command("../scripts/bundle-jdk", append(options, "--criuhook", criuhook, j.home)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

// TestCRaCStock: what people run into, message by message; the program goes on.
func TestCRaCStock(t *testing.T) {
	need(t)
	startDaemons(t)
	for _, j := range []*jdk{newJDK(t, "21", cracengine.Executable), newJDK(t, "25", cracengine.Library)} {
		for _, c := range []struct {
			env  []string
			want string
		}{
			{nil, "External socket is used. Consider using --ext-unix-sk option."},
			{[]string{"CRAC_CRIU_OPTS=--ext-unix-sk"}, "Can't dump half of stream unix connection. name: (null); peer name: " + nssPipe},
		} {
			t.Run(fmt.Sprint(j.version, " ", c.env), func(t *testing.T) {
				v := startJVM(t, root, j, c.env, nil)
				at := v.now()
				v.jcmd(t)
				if got := v.await(t, at, "refused"); got != "-1" {
					t.Errorf("the engine's signal came with %s, expected -1", got)
				}
				if text := v.dumpLog(); !strings.Contains(text, c.want) {
					t.Errorf("expected %q\n%s", c.want, Result{Log: text}.tail())
				}
				v.engineGone(t)
				v.awaitRounds(t, v.now())
				v.wantNoTrouble(t)
				t.Logf("dump4.log:\n%s", errorsOf(v.dumpLog()))
				t.Logf("console:\n%s", contentsOf(v.console))
			})
		}
	}
	nothingLeft(t)
}

// errorsOf are the lines of CRIU's log that say Error, or are ours.
func errorsOf(log string) string {
	lines := slices.DeleteFunc(strings.Split(log, "\n"), func(l string) bool {
		return !strings.Contains(l, "Error") && !strings.Contains(l, ") criuhook:")
	})
	return strings.Join(lines, "\n")
}

// TestCRaC: a virtual machine that is refused without criuhook, by each way to
// put criuhook in, comes back with all it had.
func TestCRaC(t *testing.T) {
	need(t)
	startDaemons(t)
	for _, c := range []struct {
		version    string
		generation cracengine.Generation
	}{
		{"21", cracengine.Executable},
		{"21", cracengine.Library},
		{"25", cracengine.Executable},
		{"25", cracengine.Library},
		{"25", cracengine.Upstream},
	} {
		for _, s := range setups {
			t.Run(fmt.Sprintf("%s/%s/%s", c.version, c.generation, s.name), func(t *testing.T) {
				j := newJDK(t, c.version, c.generation)
				env, options := s.in(t, j)
				start := slices.Clone(options)
				if s.name == "script" { // asking takes half a second
					start = append(start, "-Downers.compiled=true")
				}
				v := startJVM(t, root, j, env, start)
				v.Checkpoint(t)
				if s.name == "script" && !strings.HasPrefix(v.await(t, 0, "compiled"), "4 Owners.turn") {
					t.Error("the checksum was not compiled")
				}
				v.comesBack(t, env, options)
				nothingLeft(t)
			})
		}
	}
}

// comesBack restores, checks, and ends it: another time, as often as three, if
// the machine was too busy to tell how quick the first lookups are.
func (v *JVM) comesBack(t testing.TB, env, options []string) {
	t.Helper()
	fast := false
	for n := 0; n < 1 || n < 4 && !fast; n++ {
		value := fmt.Sprint(100 + n)
		seen := len(clients(t))
		cmd := v.restoreCommand(append(slices.Clone(env), "CRACENGINE_VALUE="+value), options, v.dir)
		var pipe *os.File
		if v.jdk.generation == cracengine.Upstream { // it takes over the restore's stdio
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd.Stderr, pipe = w, w
		}
		r := v.restoreBy(t, cmd)
		first := r.wantRestored(t, value)
		if pipe != nil {
			want := linkOf(t, pipe.Fd())
			if name, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", v.PID)); name != want {
				t.Errorf("the virtual machine's stderr is %s, expected the restore's, %s", name, want)
			}
			pipe.Close()
		}
		t.Logf("first lookups: %v; the restore says: %s", first, contentsOf(r.output))
		fast = fast || slices.Max(first) < cracSoon
		wantMadeFor(t, seen, v.dir)
		r.end(t)
	}
	if !fast {
		t.Errorf("in four restores, some thread's first lookup took %v or more", cracSoon)
	}
}

func linkOf(t testing.TB, fd uintptr) string {
	t.Helper()
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// wantMadeFor checks that sssd has seen, for each connection in the images, one
// that is not the virtual machine's own.
func wantMadeFor(t testing.TB, seen int, dir string) {
	t.Helper()
	n := 0
	all := clients(t)[seen:]
	for _, c := range all {
		if !strings.Contains(c.command, "/bin/java") {
			n++
		}
	}
	if want := len(record(t, dir).Connections); n != want || n == 0 {
		t.Errorf("sssd saw %d connections made by criuhook, %d are in the images: %+v", n, want, all)
	}
}
