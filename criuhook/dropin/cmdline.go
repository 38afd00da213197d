// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"fmt"
	"slices"
	"strings"
)

// Command is what a command line of CRIU means, CRIU's configuration files
// included, as far as it concerns who stands in for CRIU.
type Command struct {
	// Name is the command word: dump, restore, swrk, check…; "" if there is none.
	Name string
	// PassOn, if not "", says why the real CRIU must be executed with the
	// arguments untouched. Where CRIU refuses the arguments, its own message and
	// exit status are the right ones. The other fields may then be incomplete.
	PassOn string
	// Help and Version: that is all CRIU will print. PassOn is set.
	Help, Version bool

	Tree      int    // -t, a pid; 0: not given
	ImagesDir string // -D, default "."
	WorkDir   string // -W; "": the images directory
	// LogFile is -o, seen from WorkDir; "-": stdout, "": stderr.
	LogFile  string
	LogLevel int32 // as CRIU counts -v; the default is 2
	LogPid   bool  // a log file for each restored process

	Detach       bool // -d
	Sibling      bool // -S
	LeaveRunning bool // -R, unless a later -s
	LeaveStopped bool // -s, unless a later -R
	Stream       bool // images go through criu-image-streamer, ImagesDir has its sockets
	PageServer   bool
	LazyPages    bool
	ShellJob     bool

	// ExtUnixSk is -x, with the inodes it names, if any.
	ExtUnixSk       bool
	ExtUnixSkInodes []uint32

	ExecCmd       []string // what a restore becomes
	JoinNS        []string // TYPE:FILE[,OPTIONS]
	InheritFD     []string // fd[N]:RESOURCE
	External      []string // KEY
	ActionScripts []string // in the order given; CRIU runs the last one first
	GhostLimit    uint64   // bytes
	Pidfile       string
	Root          string

	// FDs are the descriptors that the command line names, be it to use or to
	// close them (--inherit-fd, --close, --status-fd, --ps-socket). CRIU must not
	// be given others of these numbers.
	FDs []int
	// SwrkFD is the argument of swrk.
	SwrkFD int

	args    []string
	posix   bool
	scanned scanned

	execCmd, mntnsCompat bool
	hasWorkDir, hasLog   bool // -W and -o were given, maybe empty
	psSocket             int
}

// defaultGhostLimit and defaultLogLevel are init_opts' of criu/config.c.
const (
	defaultGhostLimit = 1 << 20 // bytes
	defaultLogLevel   = 2       // warnings
)

// Parse tells what CRIU, given args (without argv[0]), would do. It follows
// criu/config.c and criu/crtools.c of 3.17 to 4.2, which are alike.
//
// # A dump by RPC
//
// "criu OPTIONS swrk FD" reads its configuration files and options as "criu
// OPTIONS dump" does and keeps them: setup_opts_from_req in cr-service.c changes
// only what the request has, apart from the following, which the request must
// carry so that nothing differs:
//
//   - pid: Tree. Without it CRIU dumps the sender.
//   - images_dir_fd: ImagesDir, opened by the sender. -D is not looked at.
//   - work_dir_fd: WorkDir, if there is one, or the images directory. Only to be
//     safe: without it CRIU takes -W, then the images directory.
//   - log_level: LogLevel. It is always overwritten, by 2 if not sent.
//   - log_to_stderr: true if LogFile is "", else unset; without either, CRIU logs
//     to criu.log. Not log_file: it refuses a "/", which -o may have.
//   - notify_scripts. Action scripts of the command line are still run, after the
//     notification of the same stage.
//
// Nothing else may be sent. Above all not what looks like the default:
// leave_running and leave_stopped can only be set, ps takes the address away,
// manage_cgroups knows fewer modes, ghost_limit is cut to 32 bits, and
// config_file forgets -o, -W and -D and runs scripts twice.
//
// What remains different:
//
//   - --stream is ignored when the images directory is opened, and aborts CRIU
//     later: PassOn.
//   - The exit status. The command line's is 255 if an action script failed at
//     post-dump, whatever the script's own, else 0 or 1; swrk's is 0 or 1. A dump
//     that fails after we agreed to post-dump, with ActionScripts and without
//     LazyPages, failed by such a script: 255 can be restored.
//   - main's own checks are not made: more words than the command (taken for
//     swrk's), no pid, --exec-cmd and --inherit-fd on a dump. PassOn covers them.
//   - An error before the log file is open is worded a little differently: if the
//     log file cannot be made ("Can't initiate log" is added), or if
//     --prev-images-dir does not exist ("Can't open images directory" instead of
//     "Couldn't open image dir"). If an option has a bad value that Parse does not
//     look at, CRIU says so on stderr and ends with status 1 without reading the
//     request. What CRIU refuses at once else is passed on, see hopeless.
//   - Capabilities are checked after the log file is opened, not before, so the
//     complaint is in the log.
//   - The log lacks "Will do snapshot from" (--prev-images-dir); has the first
//     lines of RPC. The process title is "dump --rpc -t PID".
//   - CRIU_FAULT=127 (FI_CANNOT_MAP_VDSO, for CRIU's tests) has no effect.
//   - CRIU is a child of ours: what it is to its parent (signals, wait, the
//     terminal's foreground group) we must be in its place.
//
// --pidfile has no effect on a dump in either way, --close takes place in CRIU
// alone, before the request is read.
//
// # A restore
//
// Is executed as it is, see [Command.Insert]. With Stream its images come through
// a socket, once, so that nobody but CRIU can read them.
func Parse(args []string, env Environment) *Command {
	_, posix := env.LookupEnv("POSIXLY_CORRECT")
	c := &Command{
		ImagesDir: ".", LogLevel: defaultLogLevel, GhostLimit: defaultGhostLimit,
		args: slices.Clone(args), posix: posix, psSocket: -1,
	}
	c.PassOn = c.parse(env)
	return c
}

// parse returns the reason to pass the command line on, or "".
func (c *Command) parse(env Environment) string {
	var err error
	c.scanned, err = scan(c.args, c.posix)
	if c.scanned.positional != nil && err == nil {
		c.Name = c.args[c.scanned.positional[0]]
	}
	// CRIU looks for these two in every word, before all else.
	if slices.Contains(c.args, "--help") || slices.Contains(c.args, "-h") {
		c.Help = true
		return "help was asked for"
	}
	for _, name := range configFiles(c.args, env) {
		if reason := c.config(name, env); reason != "" {
			return fmt.Sprintf("CRIU's configuration file %s: %s", name, reason)
		}
	}
	if reason := c.apply(c.scanned.given); reason != "" {
		return reason
	}
	if err != nil {
		return err.Error()
	}
	return c.check()
}

func (c *Command) config(name string, env Environment) string {
	data, err := env.ReadFile(name)
	if err != nil {
		if unopened(err) {
			return ""
		}
		return err.Error()
	}
	args, err := configArgs(data)
	if err != nil {
		return err.Error()
	}
	s, err := scan(args, c.posix)
	if reason := c.apply(s.given); reason != "" {
		return reason
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// apply takes options one by one as parse_options does; the last one counts.
func (c *Command) apply(options []given) string {
	for _, g := range options {
		if reason := c.set(g); reason != "" {
			return reason
		}
	}
	return ""
}

func (c *Command) set(g given) string {
	switch g.long {
	case "help":
		c.Help = true
		return "help was asked for"
	case "version":
		c.Version = true
		return "the version was asked for"
	case "ms":
		return "CRIU refuses --ms"
	case "feature":
		if g.value == "list" { // CRIU stops reading options, at no predictable place
			return "--feature list is for criu check"
		}
	case "tree":
		if c.Tree = atoi(g.value); c.Tree <= 0 {
			return fmt.Sprintf("-t %q is not a pid", g.value)
		}
	case "images-dir":
		c.ImagesDir = g.value
	case "work-dir":
		c.WorkDir, c.hasWorkDir = g.value, true
	case "log-file":
		c.LogFile, c.hasLog = g.value, true
	case "verbosity":
		switch {
		case !g.hasValue:
			c.LogLevel++
		case strings.HasPrefix(g.value, "v"):
			c.LogLevel += int32(len(g.value)) + 1
		default:
			c.LogLevel = int32(atoi(g.value))
		}
	case "leave-running":
		c.LeaveRunning, c.LeaveStopped = true, false
	case "leave-stopped":
		c.LeaveRunning, c.LeaveStopped = false, true
	case "restore-detached", "daemon":
		c.Detach = !g.off
	case "restore-sibling":
		c.Sibling = !g.off
	case "log-pid":
		c.LogPid = !g.off
	case "shell-job":
		c.ShellJob = !g.off
	case "stream":
		c.Stream = !g.off
	case "page-server":
		c.PageServer = !g.off
	case "lazy-pages":
		c.LazyPages = true
	case "mntns-compat-mode":
		c.mntnsCompat = !g.off
	case "exec-cmd":
		c.execCmd = true
	case "join-ns":
		c.JoinNS = append(c.JoinNS, g.value)
	case "external":
		c.External = append(c.External, g.value)
	case "action-script":
		c.ActionScripts = append(c.ActionScripts, g.value)
	case "pidfile":
		c.Pidfile = g.value
	case "root":
		c.Root = g.value
	case "ghost-limit":
		c.GhostLimit = size(g.value)
	case "ext-unix-sk":
		return c.extUnixSk(g.value)
	case "inherit-fd":
		return c.inherit(g.value)
	case "close":
		c.FDs = append(c.FDs, atoi(g.value))
	case "ps-socket":
		c.psSocket = atoi(g.value)
		c.FDs = append(c.FDs, c.psSocket)
	case "status-fd":
		fd, _, ok := integer(g.value)
		if !ok {
			return fmt.Sprintf("--status-fd %q is not a number", g.value)
		}
		c.FDs = append(c.FDs, int(int32(fd))) // cut as in CRIU
	}
	return ""
}

// extUnixSk follows unix_sk_ids_parse of sk-unix.c.
func (c *Command) extUnixSk(list string) string {
	c.ExtUnixSk = true
	for rest := list; rest != ""; {
		if rest[0] == ',' {
			rest = rest[1:]
			continue
		}
		number, after, _ := integer(rest)
		inode := uint32(number) // cut as in CRIU
		if inode == 0 {
			return fmt.Sprintf("--ext-unix-sk %q is not a list of inodes", list)
		}
		c.ExtUnixSkInodes = append(c.ExtUnixSkInodes, inode)
		rest = after
	}
	return ""
}

// inherit follows inherit_fd_parse of files.c. With debug[N]:TEXT CRIU writes
// the text to fd N, and that is all.
func (c *Command) inherit(value string) string {
	number, isFD := strings.CutPrefix(value, "fd[")
	if !isFD {
		number, _ = strings.CutPrefix(value, "debug[")
	}
	fd, _, ok := integer(number)
	_, resource, _ := strings.Cut(value, ":")
	if !ok || number == value || fd < 0 || fd > 1<<31-1 || resource == "" {
		return fmt.Sprintf("--inherit-fd %q is not fd[N]:RESOURCE", value)
	}
	c.FDs = append(c.FDs, int(fd))
	if isFD {
		c.InheritFD = append(c.InheritFD, value)
	}
	return ""
}

// check makes the checks that CRIU's main and check_options make before they do
// anything that concerns us.
func (c *Command) check() string {
	words := len(c.scanned.positional)
	if words == 0 {
		return "there is no command"
	}
	switch c.Name {
	case "swrk":
		if words != 2 {
			return "swrk takes one argument"
		}
		c.SwrkFD = atoi(c.args[c.scanned.positional[1]])
		return ""
	case "dump", "restore":
	case "pre-dump", "lazy-pages", "check", "page-server", "service", "dedup", "cpuinfo", "exec", "show":
		return "criu " + c.Name + " neither dumps nor restores sockets itself"
	default:
		return fmt.Sprintf("unknown command %q", c.Name)
	}
	restore := c.Name == "restore"
	switch {
	case c.execCmd && words == 1:
		return "--exec-cmd needs a command"
	case c.execCmd && !restore:
		return "--exec-cmd is for restore only"
	case c.execCmd && c.Detach:
		return "--exec-cmd and --restore-detached exclude each other"
	case !c.execCmd && words > 1:
		return "there are arguments after " + c.Name + " that are no options"
	case c.ImagesDir == "", c.hasWorkDir && c.WorkDir == "", c.hasLog && c.LogFile == "":
		return "the name of a directory or of the log file is empty"
	case c.Sibling && !c.Detach:
		return "--restore-sibling needs --restore-detached"
	case c.psSocket != -1 && c.psSocket <= 2 && c.Detach:
		return "--ps-socket is one of the standard descriptors"
	case restore:
		for _, i := range c.scanned.positional[1:] {
			c.ExecCmd = append(c.ExecCmd, c.args[i])
		}
		return ""
	case c.Tree == 0:
		return "no pid is given"
	case len(c.InheritFD) > 0:
		return "--inherit-fd is for restore only"
	case c.mntnsCompat:
		return "--mntns-compat-mode is for restore only"
	case c.Stream:
		return "a dump with --stream cannot be made by RPC"
	}
	return ""
}

// Options returns the arguments without the command word, what else is no
// option, and "--": to be put before "swrk FD".
func (c *Command) Options() []string {
	var options []string
	for i, arg := range c.args {
		if i == c.scanned.terminator {
			break
		}
		if !slices.Contains(c.scanned.positional, i) {
			options = append(options, arg)
		}
	}
	return options
}

// Insert returns all arguments with more options: right after the command word,
// or before it, where CRIU does not look for options behind it (the word is
// behind "--", or POSIXLY_CORRECT is set). PassOn must be "".
func (c *Command) Insert(extra ...string) []string {
	if len(c.scanned.positional) == 0 {
		return slices.Clone(c.args)
	}
	at := c.scanned.positional[0] + 1
	if c.posix {
		at--
	}
	if end := c.scanned.terminator; end >= 0 {
		at = min(at, end)
	}
	return slices.Insert(slices.Clone(c.args), at, extra...)
}
