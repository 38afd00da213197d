// SPDX-License-Identifier: Apache-2.0

package cracengine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// java is the launcher. With -XX:CRaCRestoreFrom=DIR it becomes CRIU, else the
// real java. The options that only a CRaC JDK knows do not reach the latter.
func (e *engine) java(args []string) (int, error) {
	var from, to, engineOptions string
	mine := func(word string) bool {
		option, ok := strings.CutPrefix(word, "-XX:CRaC")
		if !ok {
			return false
		}
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "RestoreFrom":
			from = value
		case "CheckpointTo":
			to = value
		case "EngineOptions":
			engineOptions = value
		}
		return true
	}
	for _, name := range []string{"JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"} {
		text, ok := os.LookupEnv(name)
		if !ok {
			continue
		}
		var rest []string
		for _, w := range strings.Fields(text) {
			if !mine(w) {
				rest = append(rest, w)
			}
		}
		if err := os.Setenv(name, strings.Join(rest, " ")); err != nil {
			return 1, err
		}
		if len(rest) == 0 {
			_ = os.Unsetenv(name)
		}
	}
	var rest []string
	for _, w := range args {
		if !mine(w) {
			rest = append(rest, w)
		}
	}
	if from != "" {
		o, err := e.options(engineOptions)
		if err != nil {
			return 1, err
		}
		return e.restore(from, o)
	}
	program := e.lib("libcriuengine.so")
	if e.generation == Executable {
		program = e.lib("criuengine")
	}
	env := map[string]string{envHome: e.home, envProgram: program, envTo: to, envOptions: engineOptions}
	if o, err := e.options(engineOptions); err != nil {
		return 1, err
	} else if e.generation == Upstream && !o.legacy {
		env[envNewer] = "1"
	}
	for k, v := range env {
		if err := os.Setenv(k, v); err != nil {
			return 1, err
		}
	}
	if to != "" { // os/crac.cpp makes it when the virtual machine starts
		if err := os.MkdirAll(to, 0o700); err != nil {
			return 1, err
		}
	}
	// A CRaC virtual machine blocks the engine's signal in every thread
	// (hotspot, os/posix/signals_posix.cpp). The mask is kept over exec, and new
	// threads take it over.
	runtime.LockOSThread()
	var set unix.Sigset_t
	set.Val[0] = 1 << (restoreSignal - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return 1, fmt.Errorf("block the engine's signal: %w", err)
	}
	java := filepath.Join(e.real, "bin", "java")
	argv := append([]string{java, "--enable-native-access=ALL-UNNAMED"}, rest...)
	return 1, fmt.Errorf("exec %s: %w", java, unix.Exec(java, argv, os.Environ()))
}

// jcmd asks a virtual machine for a checkpoint.
func (e *engine) jcmd(args []string) (int, error) {
	if len(args) != 2 || args[1] != "JDK.checkpoint" {
		return 1, errors.New("usage: jcmd PID JDK.checkpoint")
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return 1, err
	}
	// A CRaC JDK's jcmd waits for an answer, which is the program's log here.
	if err := unix.Kill(pid, unix.SIGWINCH); err != nil {
		return 1, fmt.Errorf("process %d: %w", pid, err)
	}
	return 0, nil
}
