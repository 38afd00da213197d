// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"criuhook/test/cracengine"
)

// setuidSetups are setups for users without rights: what the JDK starts as CRIU
// is set-user-id root.
var setuidSetups = []setup{
	{"script", func(t testing.TB, j *jdk) (env, options []string) {
		setuid(t, j.lib("criu"))
		return []string{"CRAC_CRIU_OPTS=--action-script=" + criuhook}, nil
	}},
	{"dropin", func(t testing.TB, j *jdk) (env, options []string) {
		path := criuByPath(t)
		if err := os.Remove(path); err != nil { // a link, by which the bit would be criuhook's
			t.Fatal(err)
		}
		copyFile(t, criuhook, path, 0o755)
		copyFile(t, stockCRIU(t), path+".real", 0o755)
		setuid(t, path)
		return []string{"CRAC_CRIU_PATH=" + path}, nil
	}},
	{"bundled", func(t testing.TB, j *jdk) (env, options []string) {
		setuid(t, j.lib("criu"))
		bundle(t, j, "--setuid", "yes")
		return nil, nil
	}},
}

func setuid(t testing.TB, file string) {
	t.Helper()
	if err := os.Chmod(file, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
}

// evil is a directory of a user who wants to have something of his own done by
// root.
type evil struct {
	dir     string
	env     []string
	markers []string // none of these files may ever be there
	targets []string // these must stay as they are
}

const harmless = "nobody may change this\n"

// newEvil fills a directory with what criuhook, run with a user's rights, would
// obey, by environment, PATH or working directory.
func newEvil(t testing.TB, u User) *evil {
	t.Helper()
	e := &evil{dir: folder(t)}
	in := func(name string) string { return filepath.Join(e.dir, name) }
	script := "#!/bin/sh\nid >>" + in("ran") + "\nexec " + stockCRIU(t) + ` "$@"` + "\n"
	config := "criu: " + in("criu") + "\nunknown: refuse\nrules:\n  - {name: evil, path: /var/lib/sss/pipes/*, idle: refuse}\n"
	for name, text := range map[string]string{
		"criu": script, "criu.real": script, "criuhook": script,
		"config.yaml": config, "evil.yaml": config, "target": harmless,
		"criu.conf": "action-script " + in("criu") + "\n",
	} {
		if err := os.WriteFile(in(name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"rules.d", "criuhook.d"} {
		if err := errors.Join(os.Mkdir(in(dir), 0o755), os.Rename(in("evil.yaml"), in(dir+"/evil.yaml")), os.WriteFile(in("evil.yaml"), []byte(config), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(in(".criu"), 0o755), os.Link(in("criu.conf"), in(".criu/default.conf"))); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", u.UID, u.GID), e.dir).CombinedOutput(); err != nil {
		t.Fatalf("chown: %v\n%s", err, out)
	}
	// Root's, which a link of the user's leads to.
	target := filepath.Join(images(t), "target")
	if err := os.WriteFile(target, []byte(harmless), 0o600); err != nil {
		t.Fatal(err)
	}
	e.markers = []string{in("ran"), in("log"), in("criuhook.plan"), in("criuhook.img")}
	e.targets = []string{in("target"), target}
	e.env = []string{
		"CRIUHOOK_CONFIG=" + in("config.yaml"),
		"CRIUHOOK_CRIU=" + in("criu"),
		"CRIUHOOK_LOG_FILE=" + in("log"),
		"CRIUHOOK_LOG_LEVEL=trace",
		"PATH=" + e.dir + ":" + os.Getenv("PATH"),
		"XDG_CONFIG_HOME=" + e.dir,
		"TMPDIR=" + e.dir,
		// What CRIU tells its scripts.
		"CRTOOLS_SCRIPT_ACTION=post-restore",
		"CRTOOLS_IMAGE_DIR=" + e.dir,
		"CRTOOLS_INIT_PID=1",
	}
	return e
}

// ofCRIU is what CRIU alone, as root, does obey.
func (e *evil) ofCRIU() []string {
	return []string{"HOME=" + e.dir, "CRIU_CONFIG_FILE=" + filepath.Join(e.dir, "criu.conf")}
}

// plant puts links into the images directory, before the dump, where criuhook
// writes.
func (e *evil) plant(t testing.TB, dir string) {
	t.Helper()
	for _, name := range []string{"criuhook.plan", "criuhook.img", ".criuhook.img", "criuhook.img.tmp"} {
		if err := os.Symlink(e.targets[1], filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// open opens a file of the user's several times, to be inherited as fds 3 to 9.
func (e *evil) open(t testing.TB) (files []*os.File) {
	t.Helper()
	for range 7 {
		f, err := os.OpenFile(e.targets[0], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return files
}

// wantInnocent checks that nothing of it was obeyed.
func (e *evil) wantInnocent(t testing.TB, when string) {
	t.Helper()
	for _, m := range e.markers {
		if _, err := os.Lstat(m); err == nil {
			t.Errorf("%s: there is %s: %s", when, m, contentsOf(m))
		}
	}
	for _, f := range e.targets {
		if text := contentsOf(f); text != harmless {
			t.Errorf("%s: %s says %q now", when, f, text)
		}
	}
}

// TestCRaCSetuid: a user's own virtual machine, by a set-user-id CRIU, comes
// back, as the user's; and nothing that he has put in the way is obeyed by what
// runs as root.
func TestCRaCSetuid(t *testing.T) {
	need(t)
	startDaemons(t)
	t.Run("control", func(t *testing.T) { // run with the user's rights, it does obey
		e := newEvil(t, alice)
		own := filepath.Join(folder(t), "criuhook")
		copyFile(t, criuhook, own, 0o755)
		cmd := exec.Command(own, "criu", "--version")
		cmd.Dir, cmd.Env = e.dir, append(os.Environ(), e.env...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice.UID, Gid: alice.GID}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", cmd.Args, err, out)
		}
		if text := contentsOf(filepath.Join(e.dir, "ran")); !strings.HasPrefix(text, "uid=1000") {
			t.Errorf("CRIUHOOK_CRIU was not obeyed: %q", text)
		}
		if _, err := os.Stat(filepath.Join(e.dir, "log")); err != nil {
			t.Errorf("CRIUHOOK_LOG_FILE was not obeyed: %v", err)
		}
	})
	for _, g := range []cracengine.Generation{cracengine.Executable, cracengine.Library} {
		for _, s := range setuidSetups {
			t.Run(fmt.Sprint(g, "/", s.name), func(t *testing.T) {
				j := newJDK(t, "21", g)
				env, options := s.in(t, j)
				e := newEvil(t, alice)
				own := len(env)
				env = append(env, e.env...)
				if s.name != "script" { // there CRIU itself is what is set-user-id
					env = append(env, e.ofCRIU()...)
				}
				v := startJVMIn(t, alice, j, e.dir, env, options)
				e.plant(t, v.dir)
				v.Checkpoint(t)
				e.wantInnocent(t, "after the dump")
				v.work = e.dir
				seen := len(clients(t))
				for _, closed := range []string{"", "exec <&- >&- 2>&-; "} {
					cmd := v.restoreCommand(append(env, "CRACENGINE_VALUE=9"), options, v.dir)
					if closed != "" { // whatever is opened next would get these numbers
						cmd.Args = append([]string{"sh", "-c", closed + `exec "$@"`, "sh", cmd.Path}, cmd.Args[1:]...)
						cmd.Path = "/bin/sh"
					}
					cmd.ExtraFiles = e.open(t)
					r := v.restoreBy(t, cmd)
					r.wantRestored(t, "9")
					r.wantUser(t)
					r.end(t)
					e.wantInnocent(t, "after the restore")
				}
				// Another user, root, may restore it too: it comes back as alice's.
				r := v.asRoot().Restore(t, append(slices.Clone(env[:own]), "CRACENGINE_VALUE=10"), options, v.dir)
				r.wantRestored(t, "10")
				(&Restored{JVM: v}).wantUser(t)
				r.end(t)
				made := clients(t)[seen:]
				if len(made) == 0 {
					t.Error("sssd saw no new connection")
				}
				for _, c := range made {
					if c.uid != fmt.Sprint(alice.UID) {
						t.Errorf("sssd saw uid %s: %+v", c.uid, c)
					}
				}
				nothingLeft(t)
			})
		}
	}
}

// asRoot is the same virtual machine, to be restored by root.
func (v *JVM) asRoot() *JVM {
	p, w := *v.Process, *v
	p.User, w.Process = root, &p
	return &w
}

// wantUser checks that the virtual machine has its user's rights and no other.
func (r *Restored) wantUser(t testing.TB) {
	t.Helper()
	status := contentsOf(fmt.Sprintf("/proc/%d/status", r.PID))
	for _, want := range []string{
		fmt.Sprintf("\nUid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", r.User.UID),
		fmt.Sprintf("\nGid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", r.User.GID),
		"\nCapEff:\t0000000000000000\n",
	} {
		if !strings.Contains(status, want) {
			t.Errorf("the virtual machine has not %q:\n%s", want, status)
		}
	}
}
