// SPDX-License-Identifier: Apache-2.0

package test

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The drop-in beside stock CRIU: the same words, on processes that stock CRIU
// can dump, must do the same.

// trialDir is where command lines are tried, one after the other, so that what
// is said of paths is alike. In it are: the directories images and work, the
// files of the trial, "fd3", which CRIU gets as fd 3, and "script", which notes
// each stage in "stages" and fails with 3 at the stage FAIL_STAGE.
const trialDir = "/tmp/trial"

const stageScript = `#!/bin/sh
echo "$(basename $0) $CRTOOLS_SCRIPT_ACTION" >>` + trialDir + `/stages
[ "$CRTOOLS_SCRIPT_ACTION" != "$FAIL_STAGE" ] || exit 3
`

// trial is a command line to be tried with both.
type trial struct {
	// line is what comes after "criu": words apart by blanks; "" is an empty
	// word, PID the pid of the target, OTHER that of another process, INO the
	// inode of the pipe that is the target's stdout.
	line string
	env  string
	// files are written to trialDir before.
	files map[string]string
	pipe  bool // fd 3 is a pipe
	verb  bool // the drop-in is "criuhook criu"
	// before is a command line for stock CRIU to be run before. A page server that
	// it starts has the pidfile page-server.pid.
	before string
	// server: fd 3 leads to a page server of stock CRIU.
	server bool
	// differs says which fields of the outcome are not alike, and why.
	differs map[string]string
}

// restores: CRIU is to make a process of the images that are in the directory
// images; it is looked at and ended.
func (tr *trial) restores() bool { return slices.Contains(strings.Fields(tr.line), "restore") }

// outcome is all that can be seen of a command line from outside.
type outcome struct {
	Exit           string
	Stdout, Stderr string
	Messages       string // errors and warnings in logs, by file
	Files          string // names, types; contents where they say something
	Target         string // what the target does now
}

// bench has what trials need.
type bench struct {
	target *Process
	other  *Process // one that nobody dumps
	golden string   // images of a process that is no more
	pid    int      // of that process
	inode  string   // of its pipe
}

func newBench(t *testing.T) *bench {
	t.Helper()
	need(t)
	b := &bench{golden: images(t), other: start(t, root, nil, "sleep", "1000000")}
	b.start(t)
	b.pid, b.inode = b.target.PID, b.pipeInode(t)
	stock("dump", "-t", strconv.Itoa(b.pid), "-D", b.golden, "-v4", "-o", "log").run(t, root, filepath.Join(b.golden, "log")).want(t, "dump", 0)
	b.target.Gone(t)
	for _, f := range []string{"log", "stats-dump"} {
		if err := os.Remove(filepath.Join(b.golden, f)); err != nil {
			t.Fatal(err)
		}
	}
	b.start(t)
	t.Cleanup(func() { os.RemoveAll(trialDir) })
	return b
}

// start starts a target, whose stdin and stdout are the ends of one pipe.
func (b *bench) start(t *testing.T) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command("sleep", "1000000")
	cmd.Dir, cmd.Stdin, cmd.Stdout = "/", r, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &Process{PID: cmd.Process.Pid, started: cmd}
	t.Cleanup(func() { p.Kill(t) })
	eventually(t, "the target sleeps", func() bool {
		return strings.HasPrefix(contentsOf(fmt.Sprintf("/proc/%d/syscall", p.PID)), fmt.Sprintf("%d ", unix.SYS_CLOCK_NANOSLEEP))
	})
	b.target = p
}

func (b *bench) pipeInode(t *testing.T) string {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/1", b.target.PID))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(strings.TrimPrefix(link, "pipe:["), "]")
}

// alike tries a command line with stock CRIU, then with the drop-in.
func (b *bench) alike(t *testing.T, tr trial) {
	t.Helper()
	want, got := b.try(t, byStock, tr), b.try(t, byDropin, tr)
	var record bool // what is ours in the images, beside CRIU's inventory.img
	dumped := !tr.restores() && got.Exit == "exit status 0" && strings.Contains(got.Files, "inventory.img")
	if got.Files, record = takeRecord(got.Files); record != dumped {
		t.Errorf("criu %s: %s, there is a criuhook.img: %v", tr.line, got.Exit, record)
	}
	v, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		same := v.Field(i).Equal(w.Field(i))
		switch _, differs := tr.differs[name]; {
		case !same && !differs:
			t.Errorf("criu %s [%s]: %s of the drop-in:\n%s\nof stock CRIU:\n%s", tr.line, tr.env, name, v.Field(i), w.Field(i))
		case same && differs:
			t.Errorf("criu %s: %s is alike, but noted as a difference", tr.line, name)
		}
	}
}

var recordLine = regexp.MustCompile(`(?m)^-{10} (.*/)?criuhook\.img\n`)

func takeRecord(files string) (string, bool) {
	return recordLine.ReplaceAllString(files, ""), recordLine.MatchString(files)
}

// words replaces what stands for something.
func (b *bench) words(line string) []string {
	replace := strings.NewReplacer("PID", strconv.Itoa(b.target.PID), "OTHER", strconv.Itoa(b.other.PID), "INO", b.inode)
	words := strings.Fields(line)
	for i, w := range words {
		if words[i] = replace.Replace(w); w == `""` {
			words[i] = ""
		}
	}
	return words
}

// try tries a command line.
func (b *bench) try(t *testing.T, w way, tr trial) outcome {
	t.Helper()
	b.prepare(t, tr)
	c := stock(b.words(tr.line)...)
	if w == byDropin { // under CRIU's name
		c.by, c.file = w, criuhook
		if tr.verb {
			c.args = slices.Concat([]string{"criuhook"}, c.args)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd := c.as(ctx, root)
	cmd.Dir, cmd.WaitDelay = trialDir, patience
	cmd.Env = append(os.Environ(), strings.Fields(tr.env)...)
	var out [2]*os.File // not pipes, which a daemon would keep
	for i := range out {
		f, err := os.CreateTemp("", "out")
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(f.Name())
		defer f.Close()
		out[i] = f
	}
	cmd.Stdout, cmd.Stderr = out[0], out[1]
	if tr.before != "" {
		first := exec.CommandContext(ctx, "criu", b.words(tr.before)...)
		first.Dir = trialDir
		_ = first.Run() // its files say how that went
	}
	fd3, end := b.fd3(t, tr)
	cmd.ExtraFiles = []*os.File{fd3}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // the state says it
		close(ended)
	}()
	var o outcome
	if tr.restores() {
		o.Target = b.restored(t, cmd.Process.Pid, ended, fd3)
	}
	<-ended
	fd3.Close()
	end.Close()
	if o.Exit = cmd.ProcessState.String(); ctx.Err() != nil {
		o.Exit += ", too late"
		t.Logf("criu %s: %s\n%s", tr.line, o.Target, contentsOf(trialDir+"/images/log"))
	}
	if !tr.restores() {
		o.Target = b.dumped(t)
	}
	if pid, err := strconv.Atoi(strings.TrimSpace(contentsOf(trialDir + "/page-server.pid"))); err == nil {
		eventually(t, "the page server has ended", func() bool { return stateOf(pid) == "" })
	}
	o.Stdout, o.Stderr = b.said(out[0]), b.said(out[1])
	o.Messages, o.Files = b.look(t)
	return o
}

func (b *bench) fd3(t *testing.T, tr trial) (fd3, end *os.File) {
	t.Helper()
	var err error
	switch {
	case tr.server:
		fd3, end = b.pageServer(t)
	case tr.pipe:
		end, fd3, err = os.Pipe()
	default:
		fd3, err = os.OpenFile(trialDir+"/fd3", os.O_RDWR|os.O_CREATE, 0o600)
		end = fd3
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd3, end
}

// pageServer starts a page server with one end of a connection as its fd 3.
func (b *bench) pageServer(t *testing.T) (fd3, end *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd3, end = os.NewFile(uintptr(pair[0]), "fd3"), os.NewFile(uintptr(pair[1]), "end")
	server := exec.Command("criu", "page-server", "--ps-socket", "3", "-D", "work", "-W", ".", "-v4", "-o", "server.log", "--pidfile", "page-server.pid")
	server.Dir, server.ExtraFiles = trialDir, []*os.File{end}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(trialDir+"/page-server.pid", []byte(strconv.Itoa(server.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Wait() }() // its log says it
	return fd3, end
}

// prepare makes all as it is before every trial.
func (b *bench) prepare(t *testing.T, tr trial) {
	t.Helper()
	if tr.before != "" { // CRIU 4.1 leaves traces in it where it fails
		b.target.Kill(t)
	}
	if stateOf(b.target.PID) == "" {
		b.start(t)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.RemoveAll(trialDir))
	must(os.MkdirAll(trialDir+"/work", 0o755))
	if tr.restores() {
		must(os.CopyFS(trialDir+"/images", os.DirFS(b.golden)))
	} else {
		must(os.MkdirAll(trialDir+"/images", 0o755))
	}
	for _, script := range []string{"script", "script2"} {
		must(os.WriteFile(filepath.Join(trialDir, script), []byte(stageScript), 0o755))
	}
	for name, text := range tr.files {
		must(os.WriteFile(filepath.Join(trialDir, name), []byte(strings.Join(b.words(text), " ")+"\n"), 0o644))
	}
}

// each tries lines with both, each after a prefix.
func (b *bench) each(t *testing.T, prefix string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		b.alike(t, trial{line: cmp.Or(strings.TrimSpace(prefix+" "+line), line)})
	}
}
