// SPDX-License-Identifier: Apache-2.0

package crac

import (
	"fmt"
	"slices"
	"strings"
)

// VariableJava has options for the launcher java, which puts them before those of
// its command line (JDK 9 and newer). Other launchers, jcmd for one, do not read
// it, as they do JAVA_TOOL_OPTIONS.
const VariableJava = "JDK_JAVA_OPTIONS"

// Options are the settings that are options of java, in one line for
// JDK_JAVA_OPTIONS or a command line.
func Options(list []Setting) string {
	var options []string
	for _, s := range list {
		if s.Variable == "" {
			options = append(options, s.Value)
		}
	}
	return strings.Join(options, " ")
}

// Environment returns the settings of a phase as variables only, for an
// environment that may have some of them already, by getenv: what is there stays,
// but for options of ours that the phase does not take. A variable whose value is
// "" is to be unset. Doing it again changes nothing.
func (j *JDK) Environment(p Phase, w Way, getenv func(string) string) ([]Setting, error) {
	list, err := j.Settings(p, w)
	if err != nil {
		return nil, err
	}
	if w.DropIn != "" && !j.Bundled {
		list = keepCRIU(list, w.DropIn, getenv)
	}
	var vars []Setting
	for _, s := range list {
		switch s.Variable {
		case "":
			continue
		case VariableOptions:
			s.Value = joined(getenv(VariableOptions), s.Value)
			if n := len(strings.Fields(s.Value)); n > j.Words() {
				return nil, fmt.Errorf("%s has %d options with criuhook's, and %s has room for %d, beyond which it leaves out or fails: have fewer in it",
					VariableOptions, n, j.Engine, j.Words())
			}
		}
		vars = append(vars, s)
	}
	before := getenv(VariableJava)
	after := before
	if p == Restore {
		other, err := j.Settings(Checkpoint, w)
		if err != nil {
			return nil, err
		}
		for _, s := range other {
			if s.Variable == "" && !slices.Contains(list, s) {
				after = without(after, s.Value)
			}
		}
	}
	var comments []string
	for _, s := range list {
		if s.Variable != "" {
			continue
		}
		if err := notTwice(after, s.Value); err != nil {
			return nil, err
		}
		after = joined(after, s.Value)
		comments = append(comments, s.Comment)
	}
	switch {
	case len(comments) > 0:
		vars = append(vars, Setting{Variable: VariableJava, Value: after, Comment: strings.Join(comments, "; ")})
	case after != before:
		vars = append(vars, Setting{Variable: VariableJava, Value: after, Comment: "without what only a checkpoint takes"})
	}
	return vars, nil
}

// keepCRIU lets a drop-in call the CRIU that the environment names already.
func keepCRIU(list []Setting, dropIn string, getenv func(string) string) []Setting {
	named, by := getenv(variableReal), variableReal
	if named == "" {
		named, by = getenv(variablePath), variablePath
	}
	if named == "" || named == dropIn {
		return list
	}
	list = slices.DeleteFunc(slices.Clone(list), func(s Setting) bool { return s.Variable == variableReal })
	return append(list, Setting{Variable: variableReal, Value: named, Comment: "the CRIU that criuhook calls, as " + by + " had it"})
}

// joined adds a word to a line of words, once.
func joined(line, word string) string {
	switch {
	case strings.TrimSpace(line) == "":
		return word
	case slices.Contains(strings.Fields(line), word):
		return line
	}
	return line + " " + word
}

// without takes a word out of a line of words, and leaves the blanks between
// others alone: they may stand in quotes.
func without(line, word string) string {
	padded := " " + line + " "
	for strings.Contains(padded, " "+word+" ") {
		padded = strings.ReplaceAll(padded, " "+word+" ", " ")
	}
	return strings.TrimSpace(padded)
}

// notTwice refuses a second value for the same key of -XX:CRaCEngineOptions: the
// JVM takes the last one, with a warning.
func notTwice(line, option string) error {
	const engineOptions = "-XX:CRaCEngineOptions="
	ours, ok := strings.CutPrefix(option, engineOptions)
	if !ok {
		return nil
	}
	key, _, _ := strings.Cut(ours, "=")
	for _, word := range strings.Fields(line) {
		theirs, ok := strings.CutPrefix(strings.Trim(word, `"'`), engineOptions)
		if !ok || theirs == ours {
			continue
		}
		for _, o := range strings.Split(theirs, ",") {
			if k, v, _ := strings.Cut(o, "="); k == key {
				return fmt.Errorf("%s has %s%s=%s already, and of two values for %s the JVM takes the last: make one of both by hand, %s%s",
					VariableJava, engineOptions, k, v, key, engineOptions, ours)
			}
		}
	}
	return nil
}
