// SPDX-License-Identifier: Apache-2.0

// Package crac knows JDKs with CRaC (coordinated restore at checkpoint): how
// each generation of them finds CRIU and hands options to it, and what has to be
// set for criuhook. It reads files of the JDK and nothing else; it starts neither
// Java nor CRIU.
//
// A release number does not tell the generation, since vendors port changes back
// to older releases: the files of the JDK do. Sources, all of
// https://github.com/openjdk/crac:
//
//   - [Program]: src/java.base/unix/native/criuengine/criuengine.c and .cpp;
//   - [ProgramByLibrary]: the same, and src/java.base/share/native/libcrexec/crexec.cpp;
//   - [Library], [LibraryByPath]: src/java.base/linux/native/libcriuengine/criuengine.cpp;
//   - the JVM's own check of open files: src/hotspot/os/linux/crac_linux.cpp.
package crac

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Engine is how a JDK's checkpoints and restores reach CRIU.
type Engine int

const (
	// Program: the JVM starts lib/criuengine, which starts lib/criu, or
	// /usr/sbin/criu where there is none. CRAC_CRIU_PATH names another one,
	// CRAC_CRIU_OPTS has options for it.
	Program Engine = iota
	// ProgramByLibrary is Program, started by lib/libcrexec.so. The option
	// -XX:CRaCEngineOptions=args= is for lib/criuengine itself, which knows none
	// of CRIU's but -v and -o: those of CRIU still go into CRAC_CRIU_OPTS.
	ProgramByLibrary
	// Library: lib/libcriuengine.so starts lib/criu. The option
	// -XX:CRaCEngineOptions has criu_location= and args= for CRIU; the variables
	// are deprecated, and without effect from JDK 28 on.
	Library
	// LibraryByPath is Library, but takes the first criu of PATH. It expects an
	// ordinary CRIU, 4.0 or newer.
	LibraryByPath
)

// String describes the engine in a few words.
func (e Engine) String() string {
	switch e {
	case Program:
		return "lib/criuengine"
	case ProgramByLibrary:
		return "lib/criuengine by way of lib/libcrexec.so"
	case Library:
		return "lib/libcriuengine.so"
	case LibraryByPath:
		return "lib/libcriuengine.so, with CRIU from PATH"
	}
	return fmt.Sprintf("Engine(%d)", int(e))
}

// JDK is what the files of a JDK with CRaC tell.
type JDK struct {
	Home    string // absolute
	Version string // JAVA_VERSION of the release file; "" if that is missing
	Vendor  string // IMPLEMENTOR, and IMPLEMENTOR_VERSION where there is one
	Engine  Engine

	// CRIU is the JDK's own lib/criu, "" if it has none or does not use it.
	CRIU string
	// SetUID: lib/criu runs as its owner, whoever starts it.
	SetUID bool
	// Owner is the uid of lib/criu.
	Owner uint32
	// Bundled: lib/criu is criuhook, with CRIU beside it as criu.real
	// (scripts/bundle-jdk).
	Bundled bool
	// Warp: Azul's engine of that name is there too, which may be the default; it
	// takes no part in what this package is about.
	Warp bool

	flags map[string]bool // of those below, what this JVM knows
}

// Flags of HotSpot. A JVM does not start with one it does not know, and they
// have changed their names; so each is looked for in libjvm.so.
const (
	flagPrefixes    = "CRaCAllowedOpenFilePrefixes"
	flagOldPrefixes = "CRAllowedOpenFilePrefixes" // since November 2023, https://github.com/openjdk/crac/pull/137
	flagEngine      = "CRaCEngine"
	flagOldEngine   = "CREngine"
)

// ErrNoCRaC: the directory has a JDK, but one without CRaC's CRIU engine.
var ErrNoCRaC = errors.New("this JDK has no CRaC with CRIU: neither lib/criuengine nor lib/libcriuengine.so is in it")

// marker is in every build of criuhook: Go writes the path of the main package
// into the program (debug/buildinfo).
const marker = "path\tcriuhook/cmd/criuhook\n"

// Inspect looks at the JDK whose home directory is given.
func Inspect(home string) (*JDK, error) {
	home, err := filepath.Abs(home)
	if err != nil {
		return nil, fmt.Errorf("look at the JDK: %w", err)
	}
	j := &JDK{Home: home}
	if err := j.inspect(); err != nil {
		return nil, fmt.Errorf("look at the JDK in %s: %w", home, err)
	}
	return j, nil
}

func (j *JDK) inspect() error {
	info, err := os.Stat(j.Home)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("not a directory; a JDK's home is the one that has bin and lib in it")
	}
	if err := j.findEngine(); err != nil {
		return err
	}
	if err := j.findFlags(); err != nil {
		return err
	}
	if err := j.readRelease(); err != nil {
		return err
	}
	names, err := os.ReadDir(filepath.Join(j.Home, "lib"))
	if err != nil {
		return err
	}
	for _, n := range names {
		j.Warp = j.Warp || strings.Contains(n.Name(), "warp")
	}
	return j.findCRIU()
}

// findEngine tells the generation by the engine's files and what they say.
func (j *JDK) findEngine() error {
	library := filepath.Join(j.Home, "lib", "libcriuengine.so")
	found, err := search(library, "criu_location", "CRIU executable on the PATH")
	switch {
	case err == nil && !found["criu_location"]:
		return fmt.Errorf("%s does not take criu_location=, as those known here do: a newer generation than this criuhook knows?", library)
	case err == nil:
		j.Engine = Library
		if found["CRIU executable on the PATH"] {
			j.Engine = LibraryByPath
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if _, err := os.Stat(filepath.Join(j.Home, "lib", "criuengine")); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(filepath.Join(j.Home, "bin", "java")); err != nil {
			return errors.New("no JDK is there: it has neither bin/java nor lib/criuengine")
		}
		return ErrNoCRaC
	}
	j.Engine = Program
	if _, err := os.Stat(filepath.Join(j.Home, "lib", "libcrexec.so")); err == nil {
		j.Engine = ProgramByLibrary
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// findFlags looks for the names of flags in the virtual machine.
func (j *JDK) findFlags() error {
	libs, err := filepath.Glob(filepath.Join(escape(j.Home), "lib", "*", "libjvm.so"))
	if err != nil {
		return err
	}
	if len(libs) == 0 {
		return errors.New("no libjvm.so below its lib, which tells the options that this JVM knows; is it a whole JDK?")
	}
	names := []string{flagPrefixes, flagOldPrefixes, flagEngine, flagOldEngine}
	terminated := make([]string, len(names))
	for i, name := range names {
		terminated[i] = name + "\x00"
	}
	// Which of several is started is the command line's; they are built alike.
	found, err := search(libs[0], terminated...)
	if err != nil {
		return err
	}
	j.flags = make(map[string]bool)
	for i, name := range names {
		j.flags[name] = found[terminated[i]]
	}
	return nil
}

// readRelease reads the file release, of lines such as JAVA_VERSION="21.0.2".
func (j *JDK) readRelease() error {
	f, err := os.Open(filepath.Join(j.Home, "release"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // jlink can leave it out
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var build string
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), "=")
		value = strings.Map(printable, strings.Trim(value, `"`))
		switch key {
		case "JAVA_VERSION":
			j.Version = value
		case "IMPLEMENTOR":
			j.Vendor = value
		case "IMPLEMENTOR_VERSION":
			build = value
		}
	}
	if build != "" {
		j.Vendor = strings.TrimSpace(j.Vendor + " " + build)
	}
	return lines.Err()
}

// findCRIU looks at lib/criu.
func (j *JDK) findCRIU() error {
	if j.Engine == LibraryByPath {
		return nil
	}
	file := filepath.Join(j.Home, "lib", "criu")
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", file)
	}
	j.CRIU, j.SetUID = file, info.Mode()&fs.ModeSetuid != 0
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		j.Owner = st.Uid
	}
	found, err := search(file, marker)
	_, noReal := os.Stat(file + ".real")
	if errors.Is(err, fs.ErrPermission) {
		// It may be executed and not read: criu.real tells, as well as can be told.
		j.Bundled = noReal == nil
		return nil
	}
	if err != nil || !found[marker] {
		return err
	}
	if err := noReal; err != nil {
		return fmt.Errorf("lib/criu is criuhook, but the JDK's own CRIU is not beside it: %w; reinstall the JDK's lib/criu", err)
	}
	j.Bundled = true
	return nil
}

// search tells which of the texts are in a file of any size.
func search(file string, texts ...string) (map[string]bool, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	longest := 0
	for _, text := range texts {
		longest = max(longest, len(text))
	}
	found := make(map[string]bool, len(texts))
	buf := make([]byte, 1<<20)
	kept := 0 // of the block before, as a text may stand across the border
	for len(found) < len(texts) {
		n, err := io.ReadFull(f, buf[kept:])
		block := buf[:kept+n]
		for _, text := range texts {
			if !found[text] && bytes.Contains(block, []byte(text)) {
				found[text] = true
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		kept = copy(buf, block[len(block)-min(longest, len(block)):])
	}
	return found, nil
}

// escape makes filepath.Glob take a name as it is.
func escape(name string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(name)
}

// printable leaves control characters out, which would reach a terminal.
func printable(r rune) rune {
	if r < ' ' || r == 0x7f {
		return -1
	}
	return r
}
