// SPDX-License-Identifier: Apache-2.0

package cracengine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// By these the launcher tells the virtual machine's half, and the engine it
// starts, what a CRaC virtual machine would know from its options.
const (
	envOptions = "CRACENGINE_OPTIONS"
	envTo      = "CRACENGINE_CHECKPOINT_TO"
	envHome    = "CRACENGINE_HOME"
	envProgram = "CRACENGINE_PROGRAM"
	envNewer   = "CRACENGINE_UPSTREAM"
)

// options are those of -XX:CRaCEngineOptions=KEY=VALUE,…
// (linux/native/libcriuengine/criuengine.cpp, CONFIGURE_OPTIONS).
type options struct {
	criu, args                                  string
	keepRunning, noDirectMap, legacy, printLine bool
}

func (e *engine) options(text string) (o options, err error) {
	for _, kv := range strings.Split(text, ",") {
		key, value, _ := strings.Cut(kv, "=")
		on := value == "true"
		switch {
		case kv == "":
		case key == "criu_location" && filepath.IsAbs(value):
			o.criu = value
		case key == "criu_location":
			return o, fmt.Errorf("expected absolute path: %s", value)
		case key == "args":
			o.args = value
		case key == "keep_running":
			o.keepRunning = on
		case key == "direct_map":
			o.noDirectMap = !on
		case key == "legacy_criu" && e.generation == Upstream:
			o.legacy = on
		case key == "print_command" && e.generation == Upstream:
			o.printLine = on
		default:
			return o, fmt.Errorf("unknown configure option: %s", key)
		}
	}
	if e.generation == Library {
		o.legacy = true
	}
	return o, nil
}

// criu finds CRIU as each generation does: main() in criuengine.c, get_criu()
// in libcriuengine's criuengine.cpp.
func (e *engine) criu(o options) (string, error) {
	if o.criu == "" {
		o.criu = os.Getenv("CRAC_CRIU_PATH")
	}
	if o.criu != "" {
		return o.criu, nil
	}
	var candidates []string
	switch e.generation {
	case Executable:
		candidates = []string{e.lib("criu"), "/usr/sbin/criu"} // beside criuengine
	case Library:
		candidates = []string{e.lib("criu")}
	case Upstream:
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			candidates = append(candidates, dir+"/criu")
		}
	}
	for _, c := range candidates {
		if info, err := os.Stat(c); err == nil && info.Mode()&0o100 != 0 {
			return c, nil
		}
	}
	return "", errors.New("cannot find CRIU executable")
}

// slots is how many words CRIU is given, its name included: the array in
// criuengine.c and ArgsBuilder's have 32 places, the last for NULL. (The former
// can take one too many, criuengine.cpp has no limit: here it is 31 for all.)
const slots = 31

// line is a command line for CRIU.
type line []string

// add adds words, as many as fit.
func (l *line) add(words ...string) {
	*l = append(*l, words[:min(len(words), slots-len(*l))]...)
}

// split adds words of a user's text, which blanks separate; there are no quotes.
// keep is how many places are to be left.
func (l *line) split(from, text string, keep int) {
	for _, w := range strings.FieldsFunc(text, func(r rune) bool { return r == ' ' }) {
		if len(*l) >= slots-keep {
			fmt.Fprintf(os.Stderr, "Warning: too many arguments for CRIU (dropped '%s' from %s)\n", w, from)
			continue
		}
		l.add(w)
	}
}

// users adds what users want CRIU to be told: ArgsBuilder::append_all; the older
// engine knows the variable alone.
func (e *engine) users(l *line, o options, keep int) {
	l.split("CRAC_CRIU_OPTS", os.Getenv("CRAC_CRIU_OPTS"), keep)
	if e.generation != Executable {
		l.split("args option", o.args, keep)
	}
}
