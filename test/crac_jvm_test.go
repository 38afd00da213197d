// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// endStatus is what the Java program ends with after SIGTERM.
const endStatus = 43

// JVM is a running test/java/Owners.java.
type JVM struct {
	*Process
	jdk *jdk
	// dir is where the images are, work where the restore runs.
	dir, work string
	log       string // what it tells, see Owners.java
	console   string // its stdout and stderr, and those of what it starts
	threads   int
}

// ownedFiles makes files named like their owners: three that sssd knows, one
// that it does not, for which it is always asked.
func ownedFiles(t testing.TB) (files []string) {
	t.Helper()
	dir := folder(t)
	for name, uid := range map[string]int{"alice": 1000, "bob": 1001, "carol": 1002, "54321": 54321} {
		f := filepath.Join(dir, name)
		err := os.WriteFile(f, []byte(strings.Repeat("whose is it? "+name+"\n", 100)), 0o644)
		if err == nil {
			err = os.Chown(f, uid, -1)
		}
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return files
}

// jvmOptions keep a virtual machine small and its dump quick, and spare it a file in
// /tmp that is mapped shared, which a CRaC virtual machine puts among the images.
var jvmOptions = []string{"-Xmx48m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:TieredStopAtLevel=4", "-Xshare:auto"}

// startJVM starts the program by the JDK's java, as its user would: env and
// options are what he sets.
func startJVM(t testing.TB, u User, j *jdk, env, options []string) *JVM {
	t.Helper()
	return startJVMIn(t, u, j, "/", env, options)
}

// startJVMIn starts it in a directory.
func startJVMIn(t testing.TB, u User, j *jdk, cwd string, env, options []string) *JVM {
	t.Helper()
	built, err := javaBuilt()
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	v := &JVM{
		jdk: j, dir: filepath.Join(dir, "cr"), work: filepath.Join(dir, "work"),
		log: filepath.Join(dir, "log"), console: filepath.Join(dir, "console"), threads: 4,
	}
	if err := os.Mkdir(v.work, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(v.work, 0o777); err != nil {
		t.Fatal(err)
	}
	console, err := os.OpenFile(v.console, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	args := append([]string{"-XX:CRaCCheckpointTo=" + v.dir}, options...)
	args = append(append(args, jvmOptions...), "-cp", built, "Owners", v.log, strconv.Itoa(endStatus), strconv.Itoa(v.threads))
	cmd := exec.Command(filepath.Join(j.home, "bin", "java"), append(args, ownedFiles(t)...)...)
	cmd.Dir, cmd.Env = cwd, append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if u.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v.Process = &Process{PID: cmd.Process.Pid, User: u, started: cmd}
	t.Cleanup(func() {
		v.Kill(t)
		if t.Failed() {
			t.Logf("console:\n%s\nlog:\n%s", contentsOf(v.console), lastLines(contentsOf(v.log), 30))
		}
	})
	v.await(t, 0, "ready")
	v.awaitRounds(t, 0)
	return v
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// said is what it has told after a place in the log.
func (v *JVM) said(after int) []string {
	b, _ := os.ReadFile(v.log)
	if len(b) < after {
		return nil
	}
	text := string(b[after:])
	return strings.Split(text[:strings.LastIndexByte(text, '\n')+1], "\n")
}

// now is the place in the log for what comes.
func (v *JVM) now() int {
	b, _ := os.ReadFile(v.log)
	return len(b)
}

// await waits for a line that begins with a word, and returns the rest.
func (v *JVM) await(t testing.TB, after int, word string) (rest string) {
	t.Helper()
	for end := time.Now().Add(2 * patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for _, l := range v.said(after) {
			if l == word || strings.HasPrefix(l, word+" ") {
				return strings.TrimPrefix(strings.TrimPrefix(l, word), " ")
			}
		}
	}
	t.Fatalf("the Java program, process %d, did not say %q:\n%s\nconsole:\n%s", v.PID, word, lastLines(contentsOf(v.log), 20), contentsOf(v.console))
	return ""
}

// awaitRounds waits until every thread has looked all files' owners up, and
// returns the longest that each thread's first round took for one.
func (v *JVM) awaitRounds(t testing.TB, after int) []time.Duration {
	t.Helper()
	var first []time.Duration
	eventually(t, "a round of each thread", func() bool {
		first = make([]time.Duration, v.threads)
		n := 0
		for _, l := range v.said(after) {
			var round, thread, us int
			if k, _ := fmt.Sscanf(l, "round %d thread %d us %d", &round, &thread, &us); k == 3 && first[thread] == 0 {
				first[thread] = time.Duration(us) * time.Microsecond
				n++
			}
		}
		return n == v.threads
	})
	return first
}

// wantNoTrouble checks that every owner was right, and that nothing was thrown.
func (v *JVM) wantNoTrouble(t testing.TB) {
	t.Helper()
	for _, l := range v.said(0) {
		if strings.HasPrefix(l, "exception") || strings.HasPrefix(l, "wrong") {
			t.Errorf("the Java program says: %s", l)
		}
	}
}

// jcmd asks for a checkpoint, as people do.
func (v *JVM) jcmd(t testing.TB) {
	t.Helper()
	cmd := exec.Command(filepath.Join(v.jdk.home, "bin", "jcmd"), strconv.Itoa(v.PID), "JDK.checkpoint")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

// dumpLog is CRIU's log of the dump.
func (v *JVM) dumpLog() string { return contentsOf(filepath.Join(v.dir, "dump4.log")) }

// Checkpoint makes one; the virtual machine is gone then.
func (v *JVM) Checkpoint(t testing.TB) {
	t.Helper()
	at := v.now()
	v.jcmd(t)
	v.await(t, at, "checkpoint")
	gone := make(chan struct{})
	go func() {
		if v.started != nil {
			_ = v.started.Wait()
		}
		close(gone)
	}()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		select {
		case <-gone:
			v.started = nil
			v.Gone(t)
			v.engineGone(t)
			awaitFree(t, v.dumpedThreads(v.dir))
			return
		default:
		}
		for _, l := range v.said(at) {
			if strings.HasPrefix(l, "refused") || time.Now().After(end) {
				t.Fatalf("no checkpoint: %s\nconsole:\n%s\n%s", l, contentsOf(v.console), Result{Log: v.dumpLog()}.tail())
			}
		}
	}
}

// engineGone waits until the engine, which CRIU is a child of, has ended.
func (v *JVM) engineGone(t testing.TB) {
	t.Helper()
	eventually(t, "the engine has ended", func() bool {
		return len(running("criuengine"))+len(running("libcriuengine.s")) == 0
	})
}

// Restored is a restore under way: the parent of the virtual machine.
type Restored struct {
	*JVM
	cmd    *exec.Cmd
	output string // file
	at     int    // in the log
}

// Restore begins a restore of images, as people do.
func (v *JVM) Restore(t testing.TB, env, options []string, dir string) *Restored {
	t.Helper()
	return v.restoreBy(t, v.restoreCommand(env, options, dir))
}

func (v *JVM) restoreCommand(env, options []string, dir string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(v.jdk.home, "bin", "java"), append([]string{"-XX:CRaCRestoreFrom=" + dir}, options...)...)
	cmd.Dir, cmd.Env = v.work, append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if v.User.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: v.User.UID, Gid: v.User.GID, Groups: v.User.Groups}
	}
	return cmd
}

func (v *JVM) restoreBy(t testing.TB, cmd *exec.Cmd) *Restored {
	t.Helper()
	out, err := os.CreateTemp(v.work, "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout = out
	if cmd.Stderr == nil {
		cmd.Stderr = out
	}
	r := &Restored{JVM: v, cmd: cmd, output: out.Name(), at: v.now()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // where the test has not come to its end
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return r
}

// wantRestored checks that the virtual machine runs, was told so by the
// engine's signal with its value, and looks owners up.
func (r *Restored) wantRestored(t testing.TB, value string) (first []time.Duration) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if text := strings.Join(r.said(r.at), "\n"); strings.Contains(text, "restored "+value+"\n") {
			break
		}
		if s := stateOf(r.cmd.Process.Pid); s == "Z" || s == "" || time.Now().After(end) {
			t.Fatalf("no restore (the command's state is %q): %s\n%s", s, contentsOf(r.output), lastLines(contentsOf(r.log), 5))
		}
	}
	return r.awaitRounds(t, r.at)
}

// awaitParent waits until CRIU has become the engine's helper, which passes
// signals on.
func (r *Restored) awaitParent(t testing.TB) {
	t.Helper()
	eventually(t, "the helper in CRIU's place", func() bool {
		return contentsOf(fmt.Sprintf("/proc/%d/comm", r.cmd.Process.Pid)) == "restorewait\n"
	})
}

// end ends it, and waits until its numbers can be had anew.
func (r *Restored) end(t testing.TB) {
	t.Helper()
	r.terminate(t)
	r.wantEnd(t)
	r.Gone(t)
	awaitFree(t, r.dumpedThreads(r.dir))
}

// terminate sends SIGTERM to the parent.
func (r *Restored) terminate(t testing.TB) {
	t.Helper()
	r.awaitParent(t)
	if err := unix.Kill(r.cmd.Process.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// wantEnd checks that the virtual machine has got the signal, told its results,
// and that its status has come back through the parent.
func (r *Restored) wantEnd(t testing.TB) {
	t.Helper()
	_ = r.cmd.Wait()
	if got := r.cmd.ProcessState.ExitCode(); got != endStatus {
		t.Errorf("the restore ended with %s, expected exit status %d: %s", r.cmd.ProcessState, endStatus, contentsOf(r.output))
	}
	r.wantResults(t)
	r.wantNoTrouble(t)
}

// wantResults checks what was computed across the checkpoint.
func (r *Restored) wantResults(t testing.TB) {
	t.Helper()
	r.await(t, r.at, "end")
	var steps, sum, count, heap uint64
	if n, _ := fmt.Sscanf(r.await(t, r.at, "checksum"), "%d %d", &steps, &sum); n != 2 {
		t.Errorf("no checksum: %s", r.await(t, r.at, "checksum"))
	}
	want := uint64(0xcbf29ce484222325)
	for i := range steps {
		want = (want ^ i&0xff) * 0x100000001b3
	}
	if sum != want || steps == 0 {
		t.Errorf("the checksum of %d steps is %d, expected %d", steps, sum, want)
	}
	var wantHeap uint64
	for i := range int64(20000) {
		wantHeap += uint64(int64(int32(i*2654435761%997)) * i)
	}
	if n, _ := fmt.Sscanf(r.await(t, r.at, "heap"), "%d %d", &count, &heap); n != 2 || count != 20000 || heap != wantHeap {
		t.Errorf("the heap holds %d numbers, %d; expected 20000, %d", count, heap, wantHeap)
	}
	if r.await(t, r.at, "read") == "0" {
		t.Error("nothing was read of the open file")
	}
}
