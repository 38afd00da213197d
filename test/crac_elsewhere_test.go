// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"criuhook/test/cracengine"
)

// moved moves the images to another place, where nobody can write, and makes
// them who's.
func (v *JVM) moved(t testing.TB, who User) (dir string) {
	t.Helper()
	dir = filepath.Join(images(t), "elsewhere")
	if out, err := exec.Command("cp", "-a", v.dir, dir).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	if err := os.RemoveAll(v.dir); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("chmod -R a-w,a+rX %s && chown -R %d:%d %[1]s", filepath.Dir(dir), who.UID, who.GID)
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return dir
}

// inContainer makes a command one that runs in pid and mount namespaces of its
// own, as pid 1, after the lines of a shell script. What the program writes is
// there a copy of what it was at the dump: the JVM that is returned has it.
func (v *JVM) inContainer(t testing.TB, cmd *exec.Cmd, script string) (*JVM, *exec.Cmd) {
	t.Helper()
	own := folder(t)
	lives := filepath.Dir(v.log)
	if out, err := exec.Command("cp", "-a", v.log, v.console, v.work, own).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	w := *v
	w.log, w.console, w.work = filepath.Join(own, "log"), filepath.Join(own, "console"), filepath.Join(own, "work")
	script = fmt.Sprintf("set -e\nmount --make-rprivate /\nmount -t proc proc /proc\nmount --bind %s %s\n%s\ncd %s\n", own, lives, script, v.work) + `exec "$@"`
	in := exec.Command("sh", append([]string{"-c", script, "sh", cmd.Path}, cmd.Args[1:]...)...)
	in.Env, in.Dir = cmd.Env, "/"
	in.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	return &w, in
}

// TestCRaCParallel: ten restores of one image at the same time, each as in a
// container of its own, by each way. The images, elsewhere now, are read-only.
func TestCRaCParallel(t *testing.T) {
	need(t)
	startDaemons(t)
	for _, s := range setups[:2] {
		t.Run(s.name, func(t *testing.T) {
			j := newJDK(t, "21", cracengine.Library)
			env, options := s.in(t, j)
			v := startJVM(t, root, j, env, options)
			v.Checkpoint(t)
			dir := v.moved(t, root)
			before := listing(t, dir)
			var all []*Restored
			for i := range 10 {
				cmd := v.restoreCommand(append(slices.Clone(env), "CRACENGINE_VALUE="+strconv.Itoa(i)), options, dir)
				w, in := v.inContainer(t, cmd, fmt.Sprintf("mount --bind %s %[1]s\nmount -o remount,bind,ro %[1]s", dir))
				all = append(all, w.restoreBy(t, in))
			}
			for i, r := range all {
				r.wantRestored(t, strconv.Itoa(i))
			}
			for _, r := range all {
				r.terminate(t)
			}
			for _, r := range all {
				r.wantEnd(t)
			}
			if after := listing(t, dir); after != before {
				t.Errorf("the images were changed:\n%s\nnow:\n%s", before, after)
			}
			nothingLeft(t)
		})
	}
}

// listing tells files apart by name, size and time.
func listing(t testing.TB, dir string) string {
	t.Helper()
	out, err := exec.Command("ls", "-la", "--time-style=full-iso", dir).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestCRaCWithoutDaemons: an image with connections to sssd and its mapped cache
// is restored where neither sssd nor nscd is, nor any of their files. There,
// lookups go on in files.
func TestCRaCWithoutDaemons(t *testing.T) {
	need(t)
	d := startDaemons(t)
	d.fallBack(t)
	for _, s := range setups[:2] {
		t.Run(s.name, func(t *testing.T) {
			j := newJDK(t, "25", cracengine.Library)
			env, options := s.in(t, j)
			v := startJVM(t, root, j, env, options)
			v.Checkpoint(t)
			w, in := v.inContainer(t, v.restoreCommand(env, options, v.moved(t, root)),
				"for d in /var/lib/sss /run/nscd /var/cache/nscd; do mount -t tmpfs none $d; done")
			start := time.Now()
			r := w.restoreBy(t, in)
			first := r.wantRestored(t, "0")
			t.Logf("after %v; first lookups: %v; the restore says: %s", time.Since(start), first, contentsOf(r.output))
			r.terminate(t)
			r.wantEnd(t)
			nothingLeft(t)
		})
	}
}

// TestCRaCLeaveRunning: the virtual machine goes on after the checkpoint; once it
// is gone its images, elsewhere now and another's, are restored again and again.
func TestCRaCLeaveRunning(t *testing.T) {
	need(t)
	startDaemons(t)
	for _, g := range []cracengine.Generation{cracengine.Executable, cracengine.Library} {
		for _, s := range setups[:2] {
			t.Run(fmt.Sprint(g, "/", s.name), func(t *testing.T) {
				j := newJDK(t, "21", g)
				env, options := s.in(t, j)
				dumpEnv, dumpOptions := slices.Clone(env), slices.Clone(options)
				switch {
				case g == cracengine.Executable:
					dumpEnv = append(dumpEnv, "CRAC_CRIU_LEAVE_RUNNING=")
				case options == nil:
					dumpOptions = engineOptions("keep_running=true")
				default:
					dumpOptions[0] += ",keep_running=true"
				}
				v := startJVM(t, root, j, dumpEnv, dumpOptions)
				at := v.now()
				v.jcmd(t)
				if got := v.await(t, at, "restored"); got != "0" {
					t.Errorf("the engine's signal came with %s, expected 0", got)
				}
				v.engineGone(t)
				nothingLeft(t)
				v.awaitRounds(t, v.now())
				v.wantNoTrouble(t)
				v.Kill(t)
				dir := v.moved(t, alice)
				awaitFree(t, v.dumpedThreads(dir))
				for n := range 3 {
					r := v.Restore(t, append(slices.Clone(env), "CRACENGINE_VALUE="+strconv.Itoa(n+1)), options, dir)
					r.wantRestored(t, strconv.Itoa(n+1))
					r.end(t)
					awaitFree(t, v.dumpedThreads(dir))
				}
				nothingLeft(t)
			})
		}
	}
}

// TestCRaCOptions: the engine's own options arrive beside ours: a file of
// counters that is inherited, pages that are not mapped; as many words as there
// is room for.
func TestCRaCOptions(t *testing.T) {
	need(t)
	startDaemons(t)
	j := newJDK(t, "21", cracengine.Executable)
	// 31 words, 10 of them the engine's own on a dump, 12 on a restore with the file.
	env := []string{"CRAC_CRIU_OPTS=--action-script=" + criuhook + strings.Repeat(" -v4", 6)}
	v := startJVM(t, root, j, env, nil)
	v.Checkpoint(t)
	if err := os.WriteFile(filepath.Join(v.dir, "perfdata"), make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	for n, path := range []string{"", criuByPath(t)} {
		e := append(slices.Clone(env[:0]), "CRACENGINE_VALUE="+strconv.Itoa(n+5))
		if path == "" {
			e = append(e, env...)
		} else {
			e = append(e, "CRAC_CRIU_PATH="+path)
		}
		r := v.Restore(t, e, nil, v.dir)
		r.wantRestored(t, strconv.Itoa(n+5))
		r.end(t)
	}
	nothingLeft(t)
}
