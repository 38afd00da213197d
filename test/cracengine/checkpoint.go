// SPDX-License-Identifier: Apache-2.0

package cracengine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// restoreSignal is RESTORE_SIGNAL, SIGRTMIN + 2 as glibc counts.
const restoreSignal = unix.Signal(34 + 2)

// kick is kickjvm() of criuengine.c and criuhelper.c: sigqueue(3).
func kick(pid, value int) error {
	var info struct {
		signo, errno, code int32
		_                  int32
		pid, uid           int32
		value              int64
		_                  [96]byte
	}
	const siQueue = -1
	info.signo, info.code = int32(restoreSignal), siQueue
	info.pid, info.uid = int32(os.Getpid()), int32(os.Getuid())
	info.value = int64(value)
	_, _, errno := unix.Syscall(unix.SYS_RT_SIGQUEUEINFO, uintptr(pid), uintptr(restoreSignal), uintptr(unsafe.Pointer(&info)))
	if errno != 0 {
		return fmt.Errorf("sigqueue: %w", errno)
	}
	return nil
}

// again starts this program anew, which stands for fork(). It inherits what we
// inherited.
func (e *engine) again(args ...string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: exe, Args: append([]string{e.self}, args...), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	return cmd, cmd.Start()
}

// checkpoint is the first process of the engine, a child of the virtual machine.
// Of Executable it waits for a child of its own (criuengine.c, checkpoint()); in
// a library the virtual machine has forked that itself (criuengine.cpp,
// execute_criu()).
func (e *engine) checkpoint(dir string) (int, error) {
	jvm := strconv.Itoa(os.Getppid())
	if e.generation != Executable {
		return e.child(jvm, dir)
	}
	c, err := e.again("@child", jvm, dir)
	if err != nil {
		return 1, err
	}
	_ = c.Wait() // wait(NULL)
	return 0, nil
}

// child ends at once, so that its child has left the tree of the virtual machine.
func (e *engine) child(jvm, dir string) (int, error) {
	if _, err := e.again("@grandchild", jvm, strconv.Itoa(os.Getpid()), dir); err != nil {
		return 1, err
	}
	return 0, nil
}

// grandchild runs CRIU and tells the virtual machine how that went, if it lives.
func (e *engine) grandchild(jvm, before, dir string) (int, error) {
	pid, err := strconv.Atoi(jvm)
	if err != nil {
		return 1, err
	}
	parent, err := strconv.Atoi(before)
	if err != nil {
		return 1, err
	}
	for range 300 {
		if os.Getppid() != parent {
			break
		}
		time.Sleep(time.Millisecond)
	}
	o, err := e.options(os.Getenv(envOptions))
	var l line
	switch {
	case err != nil:
	case os.Getppid() == parent:
		err = errors.New("can't move out of JVM process hierarchy")
	default:
		l, err = e.dumpLine(jvm, dir, o)
	}
	if err != nil {
		return 0, errors.Join(err, kick(pid, -1))
	}
	criu := &exec.Cmd{Path: l[0], Args: l, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	failed := criu.Run()
	if failed != nil && e.generation != Executable {
		fmt.Fprintf(os.Stderr, "CRaC engine (stand-in): CRIU failed with %v - check %s/dump4.log\nCommand: %s\n", failed, dir, strings.Join(l, " "))
	}
	_, running := os.LookupEnv("CRAC_CRIU_LEAVE_RUNNING")
	if e.generation != Executable {
		running = o.keepRunning
	}
	switch {
	case failed != nil:
		err = kick(pid, -1)
	case running:
		err = kick(pid, 0)
	}
	if e.generation == Executable { // create_cppath()
		real, e := filepath.EvalSymlinks(dir)
		if e == nil {
			e = os.WriteFile(filepath.Join(dir, "cppath"), []byte(real), 0o644)
		}
		err = errors.Join(err, e)
	}
	return 0, err
}

// dumpLine is CRIU's command line: checkpoint() in each of the sources.
func (e *engine) dumpLine(jvm, dir string, o options) (l line, err error) {
	criu, err := e.criu(o)
	if err != nil {
		return nil, err
	}
	if e.generation == Executable {
		l.add(criu, "dump", "-t", jvm, "-D", dir, "--shell-job", "-v4", "-o", "dump4.log")
		if _, running := os.LookupEnv("CRAC_CRIU_LEAVE_RUNNING"); running {
			l.add("-R")
		}
		e.users(&l, o, 0)
		return l, nil
	}
	// image_constraints_persist(), image_score_persist() (libcriuengine/README.md)
	for name, text := range map[string]string{"tags": "label:cpu.arch=amd64\n", "score": "vm.uptime=1.000000\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	l.add(criu, "dump", "-t", jvm, "-D", dir, "-v4", "-o", "dump4.log", "--shell-job")
	if o.keepRunning {
		l.add("-R")
	}
	if !o.legacy {
		l.add("--unprivileged")
	}
	e.users(&l, o, 0)
	o.print(l)
	return l, nil
}

// print is print_command.
func (o options) print(l line) {
	if o.printLine {
		fmt.Fprintln(os.Stderr, "criuengine: Command:", strings.Join(l, " "))
	}
}
