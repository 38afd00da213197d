// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"fmt"
	"strings"
)

// argument says whether an option takes one, as in getopt_long(3).
type argument uint8

const (
	none argument = iota
	required
	optional // only as -oVALUE or --option=VALUE
)

// option is an entry of CRIU's table, or one of its two when it can be negated.
// Entries of one name do the same.
type option struct {
	long  string
	short byte // 0: none
	takes argument
	off   bool // the --no-… form
}

// options of CRIU 3.17 to 4.2 (long_opts in criu/config.c), in its order. Nothing was removed in between; 3.18 added skip-file-rwx-check,
// unprivileged and ghost-fiemap, 4.2 allow-uprobes. mmap-page-image is of
// CRaC's fork. An option of a newer CRIU is unknown, see [Command.PassOn].
var options = table(
	"tree=t:", "leave-stopped=s", "leave-running=R", "restore-detached!", "restore-sibling!",
	"daemon!", "images-dir=D:", "work-dir=W:", "log-file=o:", "join-ns=J:", "root=r:",
	"ext-unix-sk=x?", "help=h", "tcp-established!", "close:", "log-pid!", "version=V",
	"evasive-devices!", "pidfile:", "veth-pair:", "action-script:", "link-remap!", "shell-job!",
	"file-locks!", "page-server!", "address:", "port:", "prev-images-dir:", "ms", "track-mem!",
	"auto-dedup!", "libdir=L:", "cpu-cap?", "force-irmap!", "ext-mount-map=M:", "exec-cmd",
	"manage-cgroups?", "cgroup-root:", "inherit-fd:", "feature:", "skip-mnt:", "enable-fs:",
	"enable-external-sharing", "enable-external-masters", "freeze-cgroup:", "ghost-limit:",
	"irmap-scan-path:", "lsm-profile:", "timeout:", "external:", "empty-ns:", "lazy-pages",
	"extra!", "experimental!", "all", "cgroup-props:", "cgroup-props-file:",
	"cgroup-dump-controller:", "skip-in-flight!", "deprecated!", "display-stats!",
	"weak-sysctls!", "status-fd:", "tcp-close!", "verbosity=v?", "ps-socket:", "stream!",
	"config:", "no-default-config", "tls-cacert:", "tls-cacrl:", "tls-cert:", "tls-key:", "tls!",
	"tls-no-cn-verify", "cgroup-yard:", "pre-dump-mode:", "file-validation:",
	"skip-file-rwx-check!", "lsm-mount-context:", "network-lock:", "mntns-compat-mode!",
	"unprivileged!", "ghost-fiemap!", "allow-uprobes!", "mmap-page-image",
)

// shorts are the one-letter options: those of the table, and four that are the
// same as a negatable one.
var shorts = func() map[byte]option {
	letters := map[byte]option{
		'd': {long: "restore-detached"},
		'S': {long: "restore-sibling"},
		'j': {long: "shell-job"},
		'l': {long: "file-locks"},
	}
	for _, o := range options {
		if o.short != 0 {
			letters[o.short] = o
		}
	}
	return letters
}()

// table reads entries of the form NAME[=LETTER][KIND], where KIND is ":" for an
// argument, "?" for an optional one, "!" for one that has a --no-… form.
func table(entries ...string) []option {
	var all []option
	for _, entry := range entries {
		var o option
		name := strings.TrimRight(entry, ":?!")
		switch entry[len(name):] {
		case ":":
			o.takes = required
		case "?":
			o.takes = optional
		}
		long, letter, ok := strings.Cut(name, "=")
		if o.long = long; ok {
			o.short = letter[0]
		}
		all = append(all, o)
		if strings.HasSuffix(entry, "!") {
			all = append(all, option{long: long, off: true})
		}
	}
	return all
}

func (o option) name() string {
	if o.off {
		return "no-" + o.long
	}
	return o.long
}

// lookup finds a long option by its name or an abbreviation of it. Abbreviated,
// two entries are ambiguous. (Not so to glibc if has_arg, flag and val are equal;
// no abbreviation matches only entries of CRIU's of which that is true.)
func lookup(name string) (option, error) {
	var found []option
	for _, o := range options {
		switch full := o.name(); {
		case full == name:
			return o, nil
		case strings.HasPrefix(full, name):
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return option{}, fmt.Errorf("unknown option --%s", name)
	case 1:
		return found[0], nil
	}
	return option{}, fmt.Errorf("option --%s is ambiguous: --%s or --%s", name, found[0].name(), found[1].name())
}

// OptionNames lists the long options of CRIU's command line that Parse knows,
// without the dashes.
func OptionNames() []string {
	var names []string
	for _, o := range options {
		names = append(names, o.name())
	}
	return names
}

// given is an option as it was given.
type given struct {
	option
	value    string
	hasValue bool
}

// scanned is what getopt_long makes of a list of arguments.
type scanned struct {
	given      []given
	positional []int // indices of the non-options
	terminator int   // index of "--", or -1
}

// scan does what glibc's getopt_long does with CRIU's table: options may stand
// between and behind the non-options, unless posix (POSIXLY_CORRECT is set); it
// stops at "--". At an error it returns what it has so far.
func scan(args []string, posix bool) (scanned, error) {
	s := scanned{terminator: -1}
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			s.terminator = i
			s.rest(args, i+1)
			return s, nil
		}
		if len(arg) < 2 || arg[0] != '-' {
			if posix {
				s.rest(args, i)
				return s, nil
			}
			s.positional = append(s.positional, i)
			continue
		}
		var needs bool
		var err error
		if strings.HasPrefix(arg, "--") {
			needs, err = s.long(arg[2:])
		} else {
			needs, err = s.bundle(arg[1:])
		}
		if err != nil {
			return s, err
		}
		if needs {
			last := &s.given[len(s.given)-1]
			if i++; i == len(args) {
				s.given = s.given[:len(s.given)-1]
				return s, fmt.Errorf("option %s requires an argument", arg)
			}
			last.value, last.hasValue = args[i], true
		}
	}
	return s, nil
}

func (s *scanned) rest(args []string, from int) {
	for ; from < len(args); from++ {
		s.positional = append(s.positional, from)
	}
}

// long takes one --option, without the dashes; needs: its argument is the next
// element.
func (s *scanned) long(text string) (needs bool, err error) {
	name, value, ok := strings.Cut(text, "=")
	o, err := lookup(name)
	if err != nil {
		return false, err
	}
	if ok && o.takes == none {
		return false, fmt.Errorf("option --%s does not take an argument", o.name())
	}
	s.given = append(s.given, given{option: o, value: value, hasValue: ok})
	return o.takes == required && !ok, nil
}

// bundle takes the letters of one element.
func (s *scanned) bundle(letters string) (needs bool, err error) {
	for i := 0; i < len(letters); i++ {
		o, ok := shorts[letters[i]]
		if !ok {
			return false, fmt.Errorf("unknown option -%c", letters[i])
		}
		g := given{option: o}
		if o.takes != none && i+1 < len(letters) {
			g.value, g.hasValue = letters[i+1:], true
			i = len(letters)
		}
		s.given = append(s.given, g)
		needs = o.takes == required && !g.hasValue
	}
	return needs, nil
}
