// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Container is a running container: runc's or crun's, with pid, mount, network,
// ipc, uts and cgroup namespaces of its own, and the application as its init.
type Container struct {
	*App
	engine, id string
	dir        string // bundle, images and logs
	by         way
	cycles     int
	foreground chan struct{} // closed once the engine, init's parent, has ended
}

// containerWays runs a scenario with each engine: once with our action script
// in its configuration of CRIU, once with us as its criu.
func containerWays(t *testing.T, scenario func(t *testing.T, engine string)) {
	t.Helper()
	need(t)
	for _, engine := range []string{"runc", "crun"} {
		t.Run(engine, func(t *testing.T) {
			eachWay(t, []way{byScript, byDropin}, func(t *testing.T) {
				scenario(t, engine)
				nothingLeft(t)
				noCRIULeft(t)
			})
		})
	}
}

var containers atomic.Int64

// enginesRoot is where the engines keep their state: crun looks as the real user.
const enginesRoot = "/run/criuhook-engines"

// startContainer starts the application in a container.
func startContainer(t testing.TB, engine string, s Spec) *Container {
	t.Helper()
	unifiedCgroups(t)
	if err := os.MkdirAll(enginesRoot, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	// Control groups are not of the sandbox alone.
	var random [4]byte
	if _, err := unix.Getrandom(random[:], 0); err != nil {
		t.Fatal(err)
	}
	c := &Container{engine: engine, id: fmt.Sprintf("criuhook-test-%x-%d", random, containers.Add(1)), dir: dir, by: wayOf(t)}
	c.App = &App{Process: &Process{User: s.User, dumpBy: c.by, restoreBy: c.by}, Control: filepath.Join(dir, "ctl/control")}
	c.alive = c.Awake
	c.configureCRIU(t)
	c.bundle(t, s)
	t.Cleanup(func() { c.delete(t) })
	out, code := c.engineRun(t, "run", "--detach", "--pid-file", c.path("pid"), "--bundle", dir, c.id)
	if code != 0 {
		t.Fatalf("%s run: %d: %s", engine, code, out)
	}
	c.PID = c.pid(t)
	if s.Args == nil {
		c.Awake(t)
	}
	return c
}

func (c *Container) path(name string) string { return filepath.Join(c.dir, name) }

// engineRun runs the engine until it ends.
func (c *Container) engineRun(t testing.TB, args ...string) (output string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd, log := c.command(ctx, t, args...)
	_ = cmd.Run() // the code says it
	b, _ := os.ReadFile(log)
	return string(bytes.TrimSpace(b)), cmd.ProcessState.ExitCode()
}

// command is the engine, with us in its way, and where it writes what it has to
// say. Its standard streams are the container's, and lead nowhere.
func (c *Container) command(ctx context.Context, t testing.TB, args ...string) (cmd *exec.Cmd, log string) {
	t.Helper()
	f, err := os.CreateTemp(c.dir, c.engine)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	of := command{c.by, c.engine, append([]string{c.engine, "--root", enginesRoot, "--log", f.Name()}, args...)}
	u := root
	if args[0] != "run" {
		u = c.User // see command.as
	}
	cmd = of.as(ctx, u)
	cmd.Env = os.Environ()
	if c.by == byDropin {
		cmd.Env = append(cmd.Env, "PATH="+dropinDir(t)+":"+os.Getenv("PATH"))
	}
	return cmd, f.Name()
}

// dropinDir is a directory with our binary under CRIU's name.
func dropinDir(t testing.TB) string {
	t.Helper()
	const dir = "/tmp/criuhook-dropin"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "criu")
	if _, err := os.Lstat(link); err != nil {
		if err := os.Symlink(criuhook, link); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// configureCRIU tells CRIU of our action script: in the file that runc has it
// read, and for crun, which names none, in the one that every CRIU reads
// (criu(8), CONFIGURATION FILES).
func (c *Container) configureCRIU(t testing.TB) {
	t.Helper()
	const dir = "/etc/criu"
	every, own := "", ""
	if c.by == byScript {
		own = "action-script " + criuhook + "\n"
	}
	if c.engine != "runc" {
		every, own = own, ""
	}
	if c.User.UID != 0 { // see TestContainerUser; in runc.conf it crashes CRIU 4.1.1
		every += "network-lock skip\n"
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"default.conf": every, "runc.conf": own} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(file) })
	}
}

// manage are the options for control groups.
func (c *Container) manage() []string {
	if c.engine == "crun" && oldCgroups() {
		return []string{"--manage-cgroups-mode", "ignore"}
	}
	return nil
}

// tryCheckpoint checkpoints into a new directory.
func (c *Container) tryCheckpoint(t testing.TB, more ...string) (images string, r Result) {
	t.Helper()
	c.cycles++
	images = c.path("images" + strconv.Itoa(c.cycles))
	work := c.path("dump" + strconv.Itoa(c.cycles))
	for _, d := range []string{images, work} {
		// In a user namespace CRIU is not root, and looks into them.
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	args := slices.Concat([]string{"checkpoint", "--image-path", images, "--work-path", work}, c.manage(), more, []string{c.id})
	out, code := c.engineRun(t, args...)
	log, _ := os.ReadFile(filepath.Join(work, "dump.log"))
	return images, Result{By: c.by, Code: code, Output: out, Log: string(log)}
}

// Checkpoint checkpoints, and waits until the container is gone.
func (c *Container) Checkpoint(t testing.TB, more ...string) (images string) {
	t.Helper()
	images, r := c.tryCheckpoint(t, more...)
	r.want(t, c.engine+" checkpoint", 0)
	c.gone(t)
	return images
}

// gone waits until init has ended and the engine knows.
func (c *Container) gone(t testing.TB) {
	t.Helper()
	eventually(t, "the container's init is gone", func() bool { return isFree(c.PID) })
	c.delete(t)
}

func (c *Container) restoreArgs(images, work string, more ...string) []string {
	return slices.Concat([]string{"restore"}, more, []string{"--bundle", c.dir, "--pid-file", c.path("pid"), "--image-path", images, "--work-path", work}, c.manage(), []string{c.id})
}

func (c *Container) tryRestore(t testing.TB, images string) Result {
	t.Helper()
	work, err := os.MkdirTemp(c.dir, "restore")
	if err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(c.path("pid"))
	out, code := c.engineRun(t, c.restoreArgs(images, work, "--detach")...)
	log, _ := os.ReadFile(filepath.Join(work, "restore.log"))
	return Result{By: c.by, Code: code, Output: out, Log: string(log), restores: true}
}

// Restore restores, and waits until the application answers.
func (c *Container) Restore(t testing.TB, images string) Result {
	t.Helper()
	r := c.tryRestore(t, images)
	r.want(t, c.engine+" restore", 0)
	c.PID = c.pid(t)
	if state := c.state(t); state.Status != "running" || state.PID != c.PID {
		t.Errorf("%s says of the container: %+v, expected it to run as process %d", c.engine, state, c.PID)
	}
	return r
}

func (c *Container) pid(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile(c.path("pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

type engineState struct {
	Status string `json:"status"`
	PID    int    `json:"pid"`
}

func (c *Container) state(t testing.TB) (s engineState) {
	t.Helper()
	out, err := exec.Command(c.engine, "--root", enginesRoot, "state", c.id).Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		t.Fatalf("%s state %s: %v: %s", c.engine, c.id, err, out)
	}
	return s
}

// delete removes the container, with its control groups.
func (c *Container) delete(t testing.TB) {
	t.Helper()
	if c.foreground != nil {
		defer func() { <-c.foreground }()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, c.engine, "--root", enginesRoot, "delete", "--force", c.id).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "does not exist") && !strings.Contains(string(out), "No such file") {
		t.Errorf("%s delete: %v: %s", c.engine, err, out)
	}
	_ = os.Remove("/sys/fs/cgroup/" + c.id) // where the engine has forgotten it
}
