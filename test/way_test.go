// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// way is how criuhook takes part in a dump or a restore.
type way int

const (
	byScript way = iota // as the action script of a stock CRIU
	byRPC               // by the verbs dump and restore
	byDropin            // in place of CRIU, with CRIU's command line
	byStock             // not at all
	bySwrk              // in place of "criu swrk", for a client of CRIU's RPC
)

var wayNames = []string{"script", "rpc", "dropin", "stock", "swrk"}

func (w way) String() string { return wayNames[w] }

// ways runs a scenario once by each way, as subtests of the ways' names.
func ways(t *testing.T, scenario func(*testing.T)) {
	t.Helper()
	eachWay(t, []way{byScript, byRPC, byDropin}, scenario)
}

func eachWay(t *testing.T, of []way, scenario func(*testing.T)) {
	t.Helper()
	need(t)
	for _, w := range bySwrkToo(t.Name(), of) {
		t.Run(w.String(), func(t *testing.T) {
			scenario(t)
		})
	}
}

// wayOf is the way of the subtest that t is or is in; outside of ways that of
// the action script.
func wayOf(t testing.TB) way {
	for _, name := range strings.Split(t.Name(), "/")[1:] {
		if i := slices.Index(wayNames, name); i >= 0 {
			return way(i)
		}
	}
	return byScript
}

// command is a program to run. args[0] is the name it is called by.
type command struct {
	by   way
	file string
	args []string
}

// stock is CRIU without us.
func stock(args ...string) command {
	return command{byStock, "criu", append([]string{"criu"}, args...)}
}

// dump is the command that dumps a process; options are CRIU's.
func (w way) dump(pid int, dir string, options ...string) command {
	target := strconv.Itoa(pid)
	switch w {
	case byRPC:
		args := []string{"criuhook", "dump", "--tree", target, "--images-dir", dir}
		const leave = "--leave-running" // the verb's own
		if slices.Contains(options, leave) {
			args = append(args, leave)
			options = slices.DeleteFunc(slices.Clone(options), func(o string) bool { return o == leave })
		}
		return command{w, criuhook, slices.Concat(args, []string{"--"}, options)}
	case byDropin: // under CRIU's name here, as a verb in restore
		return command{w, criuhook, append([]string{"criu", "dump", "-t", target, "-D", dir}, options...)}
	case bySwrk:
		return swrk(append([]string{"dump", "-t", target, "-D", dir}, options...)...)
	}
	return w.criu(append([]string{"dump", "-t", target, "-D", dir}, options...))
}

// restore is the command that restores images; options are CRIU's. detached,
// it ends when the process runs.
func (w way) restore(dir string, detached bool, options ...string) command {
	switch w {
	case byRPC:
		args := []string{"criuhook", "restore", "--images-dir", dir}
		if detached {
			args = append(args, "--detach")
		}
		return command{w, criuhook, slices.Concat(args, []string{"--"}, options)}
	case byDropin:
		args := []string{"criuhook", "criu", "restore", "-D", dir}
		if detached {
			args = append(args, "-d")
		}
		return command{w, criuhook, append(args, options...)}
	}
	args := []string{"restore", "-D", dir}
	if detached {
		args = append(args, "-d")
	}
	if w == bySwrk {
		return swrk(append(args, options...)...)
	}
	return w.criu(append(args, options...))
}

// criu is a stock CRIU, with our action script or without.
func (w way) criu(args []string) command {
	if w == byScript { // before a command for CRIU to execute
		args = slices.Insert(args, 1, "--action-script="+criuhook)
	}
	c := stock(args...)
	c.by = w
	return c
}

// as makes the command one that may dump u: with u's real ids, as if it were
// setuid root, since reading another user's limits takes CAP_SYS_RESOURCE,
// which this machine may lack.
func (c command) as(ctx context.Context, u User) *exec.Cmd {
	if u.UID == 0 {
		cmd := exec.CommandContext(ctx, c.file)
		cmd.Args = c.args
		return cmd
	}
	// Not setpriv, which looks the user up, in a name service that may be
	// stopped; nor a shell, which drops the euid.
	const asIfSetuid = `$( = shift; $< = shift; my $f = shift; exec { $f } @ARGV; die "run $f: $!"`
	cmd := exec.CommandContext(ctx, "perl", append([]string{
		"-e", asIfSetuid, "--", strconv.Itoa(int(u.GID)), strconv.Itoa(int(u.UID)), c.file,
	}, c.args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Groups: u.Groups}}
	return cmd
}

// run runs the command until it ends. log is where it makes CRIU's log.
func (c command) run(t testing.TB, u User, log string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd := c.as(ctx, u)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A restored process that kept the pipe would keep Wait waiting.
	cmd.WaitDelay = time.Second
	_ = cmd.Run() // the code says it
	return c.result(cmd, log, stdout.String(), stderr.String())
}

// result is how the command ended.
func (c command) result(cmd *exec.Cmd, log, stdout, stderr string) Result {
	b, _ := os.ReadFile(log)
	if c.by == bySwrk { // a client of CRIU's RPC sees only what CRIU answers
		stderr += string(b)
	}
	return Result{By: c.by, Code: cmd.ProcessState.ExitCode(), Stdout: stdout, Output: stdout + stderr, Log: string(b), restores: slices.Contains(c.args, "restore")}
}
