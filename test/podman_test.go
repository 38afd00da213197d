// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
	"criuhook/test/echo"
)

// Podman runs podman with storage of its own, on one engine.
type Podman struct {
	dir, engine string
}

// startPodman makes an empty image, "base".
func startPodman(t testing.TB) *Podman {
	t.Helper()
	unifiedCgroups(t)
	p := &Podman{dir: folder(t), engine: "runc"}
	const policy = "/etc/containers/policy.json"
	if _, err := os.Stat(policy); err != nil {
		p.write(t, policy, `{"default":[{"type":"insecureAcceptAnything"}]}`)
	}
	// Without a limit of processes: not every machine has the controller for it.
	p.write(t, p.path("containers.conf"), "[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"none\"\n"+
		"[containers]\npids_limit=0\nlog_driver=\"k8s-file\"\n")
	p.write(t, p.path("storage.conf"), "[storage]\ndriver=\"vfs\"\ngraphroot=\""+p.path("graph")+"\"\nrunroot=\""+p.path("run")+"\"\n")
	for _, d := range []string{"dev", "proc", "sys", "usr", "run", "tmp", "etc", "ctl"} {
		if err := os.MkdirAll(p.path("base/"+d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"lib", "lib64"} {
		if err := os.Symlink("usr/"+name, p.path("base/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("tar", "-C", p.path("base"), "-cf", p.path("base.tar"), ".").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	p.run(t, "import", p.path("base.tar"), "base")
	return p
}

func (p *Podman) path(name string) string { return filepath.Join(p.dir, name) }

func (p *Podman) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (p *Podman) run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := p.try(t, args...)
	if err != nil {
		logs, _ := filepath.Glob(p.path("graph/vfs-containers/*/userdata/*.log"))
		for _, l := range logs {
			b, _ := os.ReadFile(l)
			out += "\n" + l + ":\n" + Result{Log: string(b)}.tail()
		}
		t.Fatalf("podman %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(out)
}

func (p *Podman) try(t testing.TB, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "podman", append([]string{"--runtime", p.engine}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+p.path("containers.conf"), "CONTAINERS_STORAGE_CONF="+p.path("storage.conf"))
	// Not a pipe, which conmon would keep.
	f, err := os.CreateTemp(p.dir, "out")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Run()
	b, _ := os.ReadFile(f.Name())
	return string(b), err
}

// pid is that of a container's init.
func (p *Podman) pid(t testing.TB, name string) int {
	t.Helper()
	var all []struct{ State struct{ Pid int } }
	if err := json.Unmarshal([]byte(p.run(t, "inspect", name)), &all); err != nil || len(all) != 1 || all[0].State.Pid == 0 {
		t.Fatalf("podman inspect %s: %v: %+v", name, err, all)
	}
	return all[0].State.Pid
}

// remove removes a container, with what CRIU has made of control groups.
func (p *Podman) remove(t testing.TB, id string) {
	t.Helper()
	if out, err := p.try(t, "rm", "--force", "--time", "0", id); err != nil {
		t.Errorf("podman rm: %v: %s", err, out)
	}
	removeGroup("/sys/fs/cgroup/libpod-" + id)
	// Of nobody, unless another sandbox uses them now.
	for _, group := range []string{"libpod_parent/libpod-" + id, "libpod_parent/conmon", "libpod_parent"} {
		_ = os.Remove("/sys/fs/cgroup/" + group)
	}
	b, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 || f[1] == "" {
			continue
		}
		at := t.TempDir()
		if err := unix.Mount("none", at, "cgroup", 0, f[1]); err != nil {
			t.Errorf("mount the hierarchy of %s: %v", f[1], err)
			continue
		}
		// With a copy of each group that was there: so much is below the container's.
		var groups []string
		_ = filepath.WalkDir(filepath.Join(at, "libpod-"+id), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return err
		})
		for _, group := range slices.Backward(groups) {
			_ = os.Remove(group)
		}
		_ = unix.Unmount(at, unix.MNT_DETACH)
	}
}

// removeGroup removes a control group, once the last process in it has ended.
func removeGroup(dir string) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if err := os.Remove(dir); !errors.Is(err, unix.EBUSY) {
			return
		}
	}
}

// TestPodman: podman container checkpoint and restore, on either engine, also by
// way of an archive.
func TestPodman(t *testing.T) {
	need(t)
	p := startPodman(t)
	containerWays(t, func(t *testing.T, engine string) {
		p.engine = engine
		by := &Container{engine: engine, by: wayOf(t), App: &App{Process: &Process{}}}
		by.configureCRIU(t)
		if by.by == byDropin {
			// conmon has a PATH of its own, in which this comes first.
			const criu = "/usr/local/sbin/criu"
			if err := os.Symlink(criuhook, criu); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(criu) })
		}
		srv, path, _ := echoDaemon(t, "reconnect", "/run/echo.sock")
		exe, err := publicApp()
		if err != nil {
			t.Fatal(err)
		}
		ctl := folder(t)
		// Below the root of the control groups: in a group of podman's, crun has
		// CRIU restore cpuset's old hierarchy, which fails where there is one.
		// With a terminal CRIU sends its master side to the engine; without, what
		// the container says goes through pipes.
		tty := "--tty=" + strconv.FormatBool(engine == "runc")
		id := p.run(t, "run", "--detach", tty, "--network", "none", "--cgroup-parent", "/",
			"--volume", "/usr/lib:/usr/lib:ro", "--volume", "/usr/lib64:/usr/lib64:ro", "--volume", exe+":/app:ro",
			"--volume", ctl+":/ctl", "--volume", path+":/run/echo.sock", "base", "/app", app.Role, "/ctl/control")
		defer func() { p.remove(t, id) }()
		a := &App{Process: &Process{PID: p.pid(t, id)}, Control: filepath.Join(ctl, "control")}
		a.Awake(t)
		a.connect(t, "c", "/run/echo.sock")
		a.Request(t, "c")
		before := a.Details(t, "c")
		again := func(n int) {
			t.Helper()
			a.Awake(t)
			a.Request(t, "c")
			a.wantDetails(t, "in podman", "c", before)
			wantClients(t, srv, n, 1)
		}
		for n := range 2 {
			p.run(t, "container", "checkpoint", id)
			await(t, srv, "the old connection's end", func(cs []echo.Client) bool { return echo.Open(cs) == 0 })
			p.run(t, "container", "restore", id)
			again(1 + n)
		}
		archive := filepath.Join(folder(t), "archive.tar")
		p.run(t, "container", "checkpoint", "--compress", "none", "--export", archive, id)
		p.remove(t, id)
		id = p.run(t, "container", "restore", "--import", archive)
		again(3)
	})
}
