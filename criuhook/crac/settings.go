// SPDX-License-Identifier: Apache-2.0

package crac

import (
	"fmt"
	"path/filepath"
	"strings"
	"unicode"
)

// Phase is one of the two runs of a JVM that CRaC is about.
type Phase int

const (
	Checkpoint Phase = iota // java -XX:CRaCCheckpointTo=DIR …
	Restore                 // java -XX:CRaCRestoreFrom=DIR
)

func (p Phase) String() string {
	if p == Restore {
		return "restore"
	}
	return "checkpoint"
}

// Way is how criuhook takes part where it is not bundled.
type Way struct {
	// Script is criuhook as CRIU's action script, an absolute path.
	Script string
	// DropIn, if not "", is criuhook in place of CRIU instead: an absolute path of
	// the name criu.
	DropIn string
}

// Setting is one thing to set: an environment variable, or an option of java.
type Setting struct {
	Variable string // "" for an option of java
	Value    string // of the variable; or the whole option
	Comment  string // what it is for, one line
}

// String is the setting as a person writes it.
func (s Setting) String() string {
	if s.Variable != "" {
		return s.Variable + "=" + s.Value
	}
	return s.Value
}

// Names of environment variables.
const (
	VariableOptions = "CRAC_CRIU_OPTS" // options for CRIU, of Program and ProgramByLibrary
	variablePath    = "CRAC_CRIU_PATH"
	variableReal    = "CRIUHOOK_CRIU"
)

const scriptOption = "--action-script="

// Settings returns what has to be set for a run of java. A JVM started for a
// restore refuses options that can only be set from the beginning; so each phase
// has its own list.
func (j *JDK) Settings(p Phase, w Way) ([]Setting, error) {
	list, err := j.forCRIU(w)
	if err != nil {
		return nil, err
	}
	if j.Warp {
		list = append(list, Setting{Value: "-XX:" + j.engineFlag() + "=criuengine",
			Comment: "CRIU's engine, where the default may be Azul's Warp, which does not use CRIU"})
	}
	if p == Restore {
		return list, nil
	}
	flag, err := j.prefixFlag()
	if err != nil {
		return nil, err
	}
	// Values of such flags add up, and the built-in one stays: to restate it does
	// no harm where they should not. One flag for each value, as the separator
	// within one is not the same everywhere.
	return append(list,
		Setting{Value: "-XX:" + flag + "=socket:",
			Comment: "the JVM's own check lets sockets of native code pass: criuhook decides about them"},
		Setting{Value: "-XX:" + flag + "=/var/lib/sss/mc/",
			Comment: "the same for sssd's caches, which criuhook leaves out of the image"},
	), nil
}

// forCRIU returns what makes CRIU call criuhook, or criuhook CRIU.
func (j *JDK) forCRIU(w Way) ([]Setting, error) {
	switch {
	case j.Bundled:
		return nil, nil
	case w.DropIn != "":
		return j.forDropIn(w.DropIn)
	}
	if err := CheckPath(w.Script); err != nil {
		return nil, err
	}
	s := Setting{Value: scriptOption + w.Script, Comment: "CRIU calls criuhook as its action script"}
	if j.byOption() {
		s.Value = "-XX:CRaCEngineOptions=args=" + s.Value
	} else {
		s.Variable = VariableOptions
	}
	return []Setting{s}, nil
}

func (j *JDK) forDropIn(path string) ([]Setting, error) {
	if err := CheckDropIn(path); err != nil {
		return nil, err
	}
	s := Setting{Variable: variablePath, Value: path, Comment: "criuhook stands in the place of CRIU"}
	if j.byOption() {
		s.Variable, s.Value = "", "-XX:CRaCEngineOptions=criu_location="+path
	}
	list := []Setting{s}
	if j.CRIU != "" {
		list = append(list, Setting{Variable: variableReal, Value: j.CRIU,
			Comment: "the CRIU that criuhook calls: the JDK's own"})
	}
	return list, nil
}

// byOption: options for CRIU go into -XX:CRaCEngineOptions, not into a variable.
func (j *JDK) byOption() bool { return j.Engine == Library || j.Engine == LibraryByPath }

func (j *JDK) engineFlag() string {
	if !j.flags[flagEngine] && j.flags[flagOldEngine] {
		return flagOldEngine
	}
	return flagEngine
}

// prefixFlag is the flag that lets open files pass the JVM's check.
func (j *JDK) prefixFlag() (string, error) {
	switch {
	case j.flags[flagPrefixes]:
		return flagPrefixes, nil
	case j.flags[flagOldPrefixes]:
		return flagOldPrefixes, nil
	}
	return "", fmt.Errorf("the JVM in %s knows neither -XX:%s nor -XX:%s, and refuses every socket of native code before CRIU is called: take a newer release of this JDK",
		j.Home, flagPrefixes, flagOldPrefixes)
}

// Words is how many options for CRIU there is room for, ours included. The engine
// has 31 places and fills some itself, most of them on a restore.
func (j *JDK) Words() int {
	if j.Engine == LibraryByPath {
		return 9 // --unprivileged, three --inherit-fd
	}
	return 15
}

// CheckDropIn refuses a path by which criuhook cannot stand in the place of CRIU.
func CheckDropIn(path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	if filepath.Base(path) != "criu" {
		return fmt.Errorf("%s: in place of CRIU, criuhook has to be called by the name criu: make a link of that name to it", path)
	}
	return nil
}

// CheckPath refuses a path that cannot be handed to CRIU by way of CRaC.
func CheckPath(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path: CRIU is started in another directory", path)
	}
	bad := strings.IndexFunc(path, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || r == unicode.ReplacementChar || strings.ContainsRune(",\"'`\\$", r)
	})
	if bad < 0 {
		return nil
	}
	return fmt.Errorf("%q cannot be told to CRaC, which splits options at blanks and commas and knows no quoting: "+
		"link to it from a path without blanks, commas, quotes, backslashes and dollar signs, and name that", path)
}
