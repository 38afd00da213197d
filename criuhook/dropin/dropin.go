// SPDX-License-Identifier: Apache-2.0

// Package dropin stands in for CRIU's command line: whoever calls "criu" need
// not know of it. A dump is made by RPC, with CRIU as a child that has all the
// options; a restore becomes CRIU, with sockets to inherit; swrk becomes CRIU, with
// a [Relay] between it and its client; any other command becomes CRIU at once.
package dropin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/criurpc"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/restore"
	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
	"criuhook/sockpeer"
	"criuhook/sockpeer/child"
)

// exitFailed is CRIU's exit status for nearly all failures.
const exitFailed = 1

// ReleaseVerb is the hidden verb of this program that runs [Release].
const ReleaseVerb = "release"

// Call is one call of CRIU's command line.
type Call struct {
	Arg0 string   // the name that we, and so CRIU, are called by
	Args []string // what CRIU is to get
	CRIU string   // path of the real CRIU
	// Self is the path of this program, for scripts and helpers.
	Self  string
	Rules func() (*rule.Set, error)
	// Log gets our messages: what is wrong, for CRIU's stderr, and all of it
	// by way of CRIULog.
	Log     *logrus.Logger
	CRIULog *swrk.CRIULog
	Version string
	// Again executes this program anew, with these arguments, if it was not
	// already. nil: it is not to be.
	Again func() error
}

// Run does what CRIU would do and returns CRIU's exit status, if it returns
// at all.
func (c *Call) Run(ctx context.Context) int {
	cmd := Parse(c.Args, System())
	var err error
	switch {
	case cmd.PassOn != "", cmd.hopeless():
		err = c.become(c.Args)
	case cmd.Name == "dump":
		return c.dump(ctx, cmd)
	case cmd.Name == "restore":
		err = c.restore(ctx, cmd)
	case cmd.Name == "swrk":
		return c.swrk(cmd)
	default:
		err = c.become(c.Args)
	}
	c.fail(cmd, err)
	return exitFailed
}

// fail says why CRIU was not even started, also where CRIU's log was to be.
func (c *Call) fail(cmd *Command, err error) {
	name := cmd.LogFile
	switch {
	case cmd.PassOn != "", name == "-":
		name = ""
	case name != "" && !filepath.IsAbs(name):
		name = filepath.Join(cmp.Or(cmd.WorkDir, cmd.ImagesDir), name)
	}
	c.failAt(name, err)
}

// failAt says it, and writes CRIU's log of that name, if there is one.
func (c *Call) failAt(name string, err error) {
	c.Log.Error(err)
	if name == "" || sockpeer.Elevated() {
		return
	}
	if e := c.CRIULog.Save(name); e != nil {
		c.Log.Error(e)
	}
}

// become makes this process CRIU.
func (c *Call) become(args []string) error {
	err := unix.Exec(c.CRIU, append([]string{c.Arg0}, args...), os.Environ())
	return fmt.Errorf("execute %s: %w", c.CRIU, err)
}

// Job is what CRIU is told by RPC.
func (c *Command) Job() swrk.Job {
	return swrk.Job{
		Options:   c.Options(),
		Keep:      c.FDs,
		ImagesDir: c.ImagesDir, WorkDir: c.WorkDir,
		LogFile: c.LogFile, LogLevel: int(c.LogLevel),
	}
}

func (c *Call) dump(ctx context.Context, cmd *Command) int {
	rules, err := c.Rules()
	if err != nil {
		c.fail(cmd, err)
		return exitFailed
	}
	d := swrk.Dump{Job: cmd.Job(), Tree: cmd.Tree, Rules: rules, Scripts: len(cmd.ActionScripts) > 0 && !cmd.LazyPages}
	d.CRIU, d.Arg0, d.Log, d.CRIULog, d.Version = c.CRIU, c.Arg0, c.Log, c.CRIULog, c.Version
	// What the terminal sends, CRIU gets too, and ends as it would without
	// us; what is sent to us alone is for CRIU.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)
	d.Signals = signals
	exit, err := d.Run(ctx)
	switch {
	case err != nil && !d.Started:
		c.fail(cmd, err)
	case err != nil:
		c.say(err)
	}
	if d.KilledBy != 0 { // so are we, for whoever waits for us
		dieBy(d.KilledBy)
	}
	return exit
}

// say writes what went wrong. What CRIU said is in its log already.
func (c *Call) say(err error) {
	var refused *dump.RefusedError
	var e *criurpc.Error
	var ended *criurpc.EndedError
	switch {
	case errors.As(err, &refused):
		err = refused // as it is, of several lines
	case errors.As(err, &e) && err == error(e) && errors.As(e.Err, &ended) && e.Err.Error() == ended.Error():
		return // CRIU has refused its options, on stderr; or its end says it
	case errors.As(err, &e) && err == error(e) && e.Err == nil && e.Response != nil:
		return
	}
	c.Log.Error(err)
}

func (c *Call) restore(ctx context.Context, cmd *Command) error {
	r, err := restore.Open(cmd.ImagesDir, c.Log, c.Rules)
	if err != nil {
		return err
	}
	for _, given := range cmd.InheritFD {
		_, key, _ := strings.Cut(given, ":")
		r.Leave(key)
	}
	if cmd.ExtUnixSk {
		r.LeaveDatagrams()
	}
	socks, err := c.inherit(ctx, cmd, r)
	if err != nil {
		return err
	}
	var extra []string
	for _, s := range socks {
		fd, err := handOver(s, cmd.FDs)
		if err != nil {
			return err
		}
		extra = append(extra, "--inherit-fd", fmt.Sprintf("fd[%d]:%s", fd, s.Key))
	}
	if r.InPlace() {
		extra = append(extra, "--action-script", c.Self)
	}
	return c.become(cmd.Insert(extra...))
}

// inherit makes the sockets for CRIU to inherit, and sees to it that it does not
// keep them.
func (c *Call) inherit(ctx context.Context, cmd *Command, r *restore.Restore) ([]restore.Inherited, error) {
	if len(cmd.JoinNS) > 0 {
		return nil, nil
	}
	if r.Connects() {
		// CRIU, which this process becomes, has no thread of ours. But the daemons
		// are to see the pids of the images, so none of ours may have them.
		r.StepAside(c.Again)
	}
	socks, err := r.Inherit(ctx)
	if err != nil || len(socks) == 0 || cmd.Detach {
		return socks, err
	}
	err = c.startRelease(r.MaxPID())
	switch {
	case err == nil:
		return socks, nil
	case r.TakeBack(socks):
		c.Log.Warnf("connections are made when their processes exist, as CRIU would keep them: %v", err)
		return nil, nil
	}
	c.Log.Warnf("as long as CRIU runs, daemons do not see that the application closes a connection: %v", err)
	return socks, nil
}

// handOver gives a socket a number that survives exec and that the command
// line does not use.
func handOver(s restore.Inherited, used []int) (int, error) {
	for from := s.Socket.FD(); ; {
		fd, err := unix.FcntlInt(uintptr(s.Socket.FD()), unix.F_DUPFD, from)
		if err != nil {
			return 0, fmt.Errorf("hand %s over to CRIU: %w", s.Socket.Name(), err)
		}
		if !slices.Contains(used, fd) {
			return fd, s.Socket.Close()
		}
		unix.Close(fd)
		from = fd + 1
	}
}

// openForOrphan opens what a process of ours that is not our child gets: /dev/null
// as its stdio, and a pidfd of the process that it is to watch.
func openForOrphan(pid int) (null *os.File, pidfd int, err error) {
	if null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return nil, -1, err
	}
	if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		null.Close()
		return nil, -1, fmt.Errorf("open our own process %d: %w", pid, err)
	}
	return null, pidfd, nil
}

// startRelease starts the process that runs [Release]. Not as a child: CRIU
// would wait for it. Nor under a pid up to most, and without threads before all
// tasks exist: a number that is to be restored has to be free.
func (c *Call) startRelease(most int) error {
	pid := os.Getpid()
	null, pidfd, err := openForOrphan(pid)
	if err != nil {
		return err
	}
	defer null.Close()
	defer unix.Close(pidfd)
	const self, pidfdThere = "/proc/self/exe", 3
	gate := child.Gate{PID: pid, PIDFD: pidfdThere, Files: []string{self, c.CRIU}}
	fd := int(null.Fd())
	args := []string{"criuhook", ReleaseVerb, "--criu-pid", strconv.Itoa(pid), "--pidfd", strconv.Itoa(pidfdThere)}
	// No environment: nothing of it is of use, and under a setuid CRIU it is
	// somebody else's.
	_, err = child.OrphanBehind(gate, most, self, args, nil, []int{fd, fd, fd, pidfd})
	return err
}
