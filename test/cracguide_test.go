// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"criuhook/test/cracengine"
)

// guideHome is the JDK of docs/crac.md.
const guideHome = "/opt/crac-21"

// guideStep is one command of the guide, and what it prints there.
type guideStep struct {
	line    int
	root    bool // by its prompt
	command string
	output  []string
}

// guideSteps reads the blocks of the guide that are to be executed.
func guideSteps(t *testing.T) (steps []guideStep) {
	t.Helper()
	text, err := os.ReadFile("../docs/crac.md")
	if err != nil {
		t.Fatal(err)
	}
	in := false
	for i, l := range strings.Split(string(text), "\n") {
		command, root := strings.CutPrefix(l, "# ")
		user, isUser := strings.CutPrefix(l, "$ ")
		switch last := len(steps) - 1; {
		case l == "```console":
			in = true
		case strings.HasPrefix(l, "```"):
			in = false
		case !in:
		case isUser:
			steps = append(steps, guideStep{line: i + 1, command: user})
		case root && !(last >= 0 && isOutput(steps[last].command, command)):
			steps = append(steps, guideStep{line: i + 1, root: true, command: command})
		case last < 0:
			t.Fatalf("docs/crac.md:%d: output of no command", i+1)
		case l != "":
			steps[last].output = append(steps[last].output, l)
		}
	}
	return steps
}

// isOutput: crac-env prints lines that begin with the prompt of root.
func isOutput(command, line string) bool {
	return command == "criuhook crac-env" && !regexp.MustCompile(`^(export|java|jcmd|kill|eval|unset) `).MatchString(line)
}

// shell is a shell that executes the guide's commands, as one user.
type shell struct {
	in     io.Writer
	output string // file
	dir    string
	n      int
}

func newShell(t *testing.T, u User, dir string) *shell {
	t.Helper()
	s := &shell{output: filepath.Join(dir, "terminal"), dir: dir}
	// A file: a pipe to us would be a connection out of the tree.
	out, err := os.OpenFile(s.output, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("/bin/bash")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if u.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.in = in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = fmt.Fprintln(in, `kill -KILL $(jobs -p) 2>/dev/null; wait`)
		in.Close()
		_ = cmd.Wait()
	})
	return s
}

// do executes a command and returns what it prints.
func (s *shell) do(t *testing.T, command string) string {
	t.Helper()
	before := len(contentsOf(s.output))
	s.n++
	mark := fmt.Sprintf("done-%d", s.n)
	// What a command that goes on says stands in its own file.
	if _, err := fmt.Fprintf(s.in, "%s\necho %s\n", command, mark); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(criuTime); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if text, _, ok := strings.Cut("\n"+contentsOf(s.output)[before:], "\n"+mark+"\n"); ok {
			return strings.TrimPrefix(text, "\n")
		}
	}
	t.Fatalf("%s does not end:\n%s", command, contentsOf(s.output)[before:])
	return ""
}

// settle waits for what a person sees before going on: the program is warm, the
// checkpoint has come to its end, as a CRaC JDK's jcmd waits for, or the program
// has been restored.
func (s *shell) settle(t *testing.T, command string, at int) {
	t.Helper()
	said := func(word string) bool {
		text := contentsOf(filepath.Join(s.dir, "log"))
		text = text[min(at, len(text)):]
		return strings.HasPrefix(text, word) || strings.Contains(text, "\n"+word)
	}
	switch {
	case strings.HasPrefix(command, "jcmd "):
		eventually(t, "the end of the checkpoint", func() bool {
			return said("refused") || said("checkpoint") && len(running("java"))+len(running("criuengine")) == 0
		})
	case strings.Contains(command, "CRaCRestoreFrom"):
		eventually(t, "the restore", func() bool { return said("restored 0") && said("round") })
		eventually(t, "the parent that passes signals on", func() bool { return len(running("restorewait")) == 1 })
	case strings.Contains(command, "CRaCCheckpointTo"):
		eventually(t, "the program to be warm", func() bool {
			return said("ready") && said("round 1 thread 0") && said("round 1 thread 1") && said("round 1 thread 2") && said("round 1 thread 3")
		})
	case strings.HasPrefix(command, "kill "):
		eventually(t, "the program's end", func() bool { return len(running("java"))+len(running("restorewait")) == 0 })
	}
}

// TestCRaCGuide executes docs/crac.md, command by command.
func TestCRaCGuide(t *testing.T) {
	need(t)
	startDaemons(t)
	prepareGuide(t)
	shells := map[bool]*shell{}
	for root, u := range map[bool]User{true: root, false: alice} {
		dir := folder(t)
		built, err := javaBuilt()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-r", built+"/.", dir).CombinedOutput(); err != nil {
			t.Fatal(err, string(out))
		}
		files := ownedFiles(t)
		if err := errors.Join(os.Rename(filepath.Dir(files[0]), filepath.Join(dir, "files")), os.Chmod(dir, 0o777)); err != nil {
			t.Fatal(err)
		}
		shells[root] = newShell(t, u, dir)
	}
	steps := guideSteps(t)
	if len(steps) < 40 {
		t.Errorf("only %d commands in the guide", len(steps))
	}
	for _, step := range steps {
		s := shells[step.root]
		begin, at := time.Now(), len(contentsOf(filepath.Join(s.dir, "log")))
		if strings.HasPrefix(step.command, "rm ") {
			at = 0
		}
		got := s.do(t, step.command)
		s.settle(t, step.command, at)
		t.Logf("%s (%v)\n%s", step.command, time.Since(begin).Round(time.Millisecond), got)
		missing := notPrinted(step.output, got)
		if strings.HasPrefix(step.command, "criuhook scan") { // it may have met a lookup
			eventually(t, "a moment in which the connections are idle", func() bool {
				if missing != "" {
					got = s.do(t, step.command)
					missing = notPrinted(step.output, got)
				}
				return missing == ""
			})
		}
		if missing != "" {
			t.Errorf("docs/crac.md:%d: %s\nprints\n%s\nwithout, in this order, the line\n%s\nconsole:\n%s\n%s", step.line, step.command, got, missing,
				contentsOf(filepath.Join(s.dir, "console")), Result{Log: contentsOf(filepath.Join(s.dir, "cr", "dump4.log"))}.tail())
		}
		if t.Failed() {
			t.Fatal("the rest would fail, too")
		}
	}
	nothingLeft(t)
}

// prepareGuide puts things where the guide has them.
func prepareGuide(t *testing.T) {
	t.Helper()
	j := newJDK(t, "21", cracengine.Executable)
	if err := os.Rename(j.home, guideHome); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(guideHome); os.RemoveAll("/opt/crac") })
	// The virtual machine is in the stock JDK; a CRaC JDK's knows these options.
	server := filepath.Join(guideHome, "lib", "server")
	if err := errors.Join(os.RemoveAll(server), os.Mkdir(server, 0o755),
		os.WriteFile(filepath.Join(server, "libjvm.so"), []byte("CRaCEngine\x00CRaCAllowedOpenFilePrefixes\x00"), 0o644)); err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{"/usr/local/bin/criuhook": criuhook, "/usr/local/bin/bundle-jdk": "../scripts/bundle-jdk"} {
		copyFile(t, from, to, 0o755)
		t.Cleanup(func() { os.Remove(to) })
	}
}

// notPrinted returns the first line of the guide's that is not in the output
// after the one before.
func notPrinted(want []string, got string) string {
	lines := bufio.NewScanner(bytes.NewReader([]byte(got)))
	for _, w := range want {
		parts := strings.Split(strings.Join(strings.Fields(w), " "), "…")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		pattern := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		found := false
		for !found && lines.Scan() {
			found = pattern.MatchString(strings.Join(strings.Fields(lines.Text()), " "))
		}
		if !found {
			return w
		}
	}
	return ""
}
