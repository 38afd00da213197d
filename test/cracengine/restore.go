// SPDX-License-Identifier: Apache-2.0

package cracengine

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// restore becomes CRIU: restore() in each of the sources.
func (e *engine) restore(dir string, o options) (int, error) {
	l, err := e.restoreLine(dir, o)
	if err != nil {
		return 1, err
	}
	o.print(l)
	// crexec.cpp, restore(); criuengine.cpp, restore()
	if err := os.Setenv("CRAC_NEW_ARGS_ID", newArgsID()); err != nil {
		return 1, err
	}
	return 1, fmt.Errorf("exec %s: %w", l[0], unix.Exec(l[0], l, os.Environ()))
}

// restoreLine is CRIU's command line.
func (e *engine) restoreLine(dir string, o options) (l line, err error) {
	criu, err := e.criu(o)
	if err != nil {
		return nil, err
	}
	helper := e.lib("criuhelper")
	switch e.generation {
	case Executable:
		helper = e.lib("criuengine")
		err = e.executableRestore(&l, criu, helper, dir)
	default:
		err = e.libraryRestore(&l, criu, helper, dir, o)
	}
	if err != nil {
		return nil, err
	}
	tail := []string{"--exec-cmd", "--", helper, "restorewait"}
	keep := 0 // ArgsBuilder looks when it is too late
	if e.generation == Executable {
		keep = len(tail)
	}
	if e.users(&l, o, keep); len(l) > slots-len(tail) {
		return nil, errors.New("too many arguments to CRIU")
	}
	l.add(tail...)
	return l, nil
}

// newArgsID is the number that comes with the signal, of the shared memory in
// which the virtual machine finds its new arguments. Here a test sets it.
func newArgsID() string {
	if id := os.Getenv("CRACENGINE_VALUE"); id != "" {
		return id
	}
	return "0"
}

func (e *engine) executableRestore(l *line, criu, self, dir string) error {
	cppath, err := os.ReadFile(filepath.Join(dir, "cppath"))
	if err != nil {
		return err
	}
	l.add(criu, "restore", "-W", ".", "--shell-job", "--action-script", self, "-D", dir, "-v1")
	fd, err := unix.Open(filepath.Join(dir, "perfdata"), unix.O_RDWR, 0)
	if err == nil { // not close-on-exec: for CRIU
		l.add("--inherit-fd", fmt.Sprintf("fd[%d]:%s/perfdata", fd, strings.TrimPrefix(string(cppath), "/")))
	}
	return nil
}

func (e *engine) libraryRestore(l *line, criu, helper, dir string, o options) error {
	if _, err := os.ReadFile(filepath.Join(dir, "tags")); err != nil { // image_constraints_validate()
		return err
	}
	if o.legacy && e.generation == Library {
		l.add(criu, "restore", "-W", ".", "--shell-job", "--action-script", helper, "-D", dir, "--cpu-cap=none", "-v1")
	} else {
		l.add(criu, "restore", "-W", ".", "--action-script", helper, "-D", dir, "--cpu-cap=none", "-v1")
		_, err := os.Stat(filepath.Join(dir, "tty-info.img"))
		switch {
		case o.legacy:
			l.add("--shell-job")
		case err == nil:
			l.add("--unprivileged", "--shell-job")
		default:
			l.add("--unprivileged")
			for i, name := range []string{"stdin", "stdout", "stderr"} {
				l.add("--inherit-fd", fmt.Sprintf("fd[%d]:/memfd:crac_fake_%s", i, name))
			}
		}
	}
	if o.noDirectMap {
		l.add("--no-mmap-page-image")
	}
	return nil
}

// script is what CRIU calls at each stage: post_resume() in criuengine.c and in
// criuhelper.c.
func (e *engine) script() (int, error) {
	if os.Getenv("CRTOOLS_SCRIPT_ACTION") != "post-resume" {
		return 0, nil
	}
	pid, err := strconv.Atoi(os.Getenv("CRTOOLS_INIT_PID"))
	if err != nil {
		return 1, fmt.Errorf("CRTOOLS_INIT_PID: %w", err)
	}
	value, _ := strconv.Atoi(os.Getenv("CRAC_NEW_ARGS_ID"))
	if err := kick(pid, value); err != nil {
		return 1, err
	}
	return 0, nil
}

// nameThread names the calling thread: the main one, as this is called from an
// init function.
func nameThread(name string) error {
	b, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0)
}

// restoreWait is the parent of what was restored: restorewait() in criuengine.c
// and in criuhelper.c. It passes signals on and ends as its child does.
func restoreWait() (int, error) {
	pid, err := strconv.Atoi(os.Getenv("CRTOOLS_INIT_PID"))
	if err != nil {
		return 1, fmt.Errorf("CRTOOLS_INIT_PID: %w", err)
	}
	signals := make(chan os.Signal, 64)
	for sig := unix.Signal(1); sig <= 31; sig++ {
		switch sig {
		case unix.SIGKILL, unix.SIGSTOP:
		case unix.SIGURG: // Go's own runtime sends it
		default:
			signal.Notify(signals, sig)
		}
	}
	// The real one is ready as soon as it runs; a test waits for this name.
	if err := nameThread("restorewait"); err != nil {
		return 1, err
	}
	go func() {
		for s := range signals {
			_ = unix.Kill(pid, s.(unix.Signal))
		}
	}()
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return 1, fmt.Errorf("waitpid: %w", err)
		}
	}
	if status.Signaled() {
		signal.Reset(status.Signal())
		_ = unix.Kill(os.Getpid(), status.Signal())
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}
