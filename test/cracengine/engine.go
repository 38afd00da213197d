// SPDX-License-Identifier: Apache-2.0

// Package cracengine is a stand-in for the parts of a CRaC JDK that have to do
// with CRIU. It is NOT a CRaC JDK: no such JDK was at hand. It was written after
// the sources of openjdk/crac, which each function names, and behaves towards
// CRIU as the engines there do: processes, arguments, environment, files,
// signals. The virtual machine itself is a stock one. What a CRaC virtual
// machine does by itself in a checkpoint (closing files, org.crac's resources,
// giving memory back) is not here.
//
// Its program is that of the tests, see [Main]: a sandbox has no compiler for Go.
// It is called by several names, as the files of a JDK home are:
//
//	bin/java         blocks the engine's signal and becomes the real java; with
//	                 -XX:CRaCRestoreFrom=DIR, restores
//	bin/jcmd         PID JDK.checkpoint
//	lib/criuengine   the engine of the generation Executable
//	lib/libcriuengine.so   that of Library and Upstream, which in a CRaC JDK
//	                 is in the virtual machine's process
//	lib/criuhelper   what CRIU calls in these
//
// The half that is in the virtual machine's process is test/java/checkpoint.c.
package cracengine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Generation is how an engine is made.
type Generation string

const (
	// Executable: lib/criuengine does all. JDK 17 and 21; through libcrexec.so
	// also later. src/java.base/unix/native/criuengine/criuengine.c.
	Executable Generation = "executable"
	// Library: libcriuengine.so with lib/criuhelper and lib/criu, CRaC's own CRIU.
	// src/java.base/linux/native/libcriuengine/criuengine.cpp, of 2025.
	Library Generation = "library"
	// Upstream: the same of 2026, for an upstream CRIU, found in PATH.
	Upstream Generation = "upstream"
)

// About is the name of a file, in the lib directory of a JDK home, that says
// which generation this program is to be, and what the real JDK's home is.
const About = "cracengine"

// Write writes the file About of a JDK home.
func (g Generation) Write(home, realHome string) error {
	return os.WriteFile(filepath.Join(home, "lib", About), []byte(string(g)+"\n"+realHome+"\n"), 0o644)
}

// engine is one run of this program.
type engine struct {
	generation Generation
	home, real string
	self       string // by which we were called, as CRIU is to call us
}

// Main does what a file of a JDK home is for, and ends the process, if the
// process was called by such a file's name, in such a home. A Go program cannot fork without
// executing: where an engine forks, the program is started anew, with a first
// argument that begins with "@".
func Main() {
	name := filepath.Base(os.Args[0])
	var do func(e *engine, args []string) (status int, err error)
	switch name {
	case "java":
		do = (*engine).java
	case "jcmd":
		do = (*engine).jcmd
	case "criuengine", "libcriuengine.so":
		do = (*engine).engine
	case "criuhelper":
		do = (*engine).helper
	default:
		return
	}
	e, err := newEngine()
	if errors.Is(err, fs.ErrNotExist) {
		return // another program of that name
	}
	status := 1
	if err == nil {
		status, err = do(e, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s (stand-in): %v\n", name, err)
	}
	os.Exit(status)
}

func newEngine() (*engine, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	e := &engine{home: filepath.Dir(filepath.Dir(exe)), self: os.Args[0]}
	b, err := os.ReadFile(filepath.Join(e.home, "lib", About))
	if err != nil {
		return nil, fmt.Errorf("find out which JDK this is to be: %w", err)
	}
	words := strings.Fields(string(b))
	if len(words) != 2 {
		return nil, fmt.Errorf("%s/lib/%s says %q", e.home, About, b)
	}
	e.generation, e.real = Generation(words[0]), words[1]
	return e, nil
}

// lib is a file in the lib directory.
func (e *engine) lib(name string) string { return filepath.Join(e.home, "lib", name) }

// engine is called by the virtual machine, and by CRIU where it is all in one.
func (e *engine) engine(args []string) (int, error) {
	switch {
	case len(args) == 0:
		return e.script()
	case args[0] == "restorewait" && e.generation == Executable:
		return restoreWait()
	case args[0] == "checkpoint" && len(args) == 2:
		return e.checkpoint(args[1])
	case args[0] == "@child" && len(args) == 3:
		return e.child(args[1], args[2])
	case args[0] == "@grandchild" && len(args) == 4:
		return e.grandchild(args[1], args[2], args[3])
	}
	return 1, fmt.Errorf("unknown command-line action: %q", args)
}

// helper is called by CRIU. linux/native/libcriuengine/criuhelper.c
func (e *engine) helper(args []string) (int, error) {
	switch {
	case len(args) == 0:
		return e.script()
	case args[0] == "restorewait":
		return restoreWait()
	}
	return 1, fmt.Errorf("unknown command-line action: %s", args[0])
}
