// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/relay"
	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
)

// Relay is what takes part in the conversation of a client and "criu swrk", in a
// process of its own.
type Relay struct {
	PID     int    // of the process that becomes CRIU
	CRIU    string // path of the real CRIU
	Arg0    string
	Options []string // of the command line, before swrk
	Rules   func() (*rule.Set, error)
	Log     *logrus.Logger
	CRIULog *swrk.CRIULog
	Version string
}

// Run serves the client until CRIU has ended, on descriptors that swrk gave us. What
// went wrong before it wanted a CRIU it tells who waits to become that.
func (r *Relay) Run(ctx context.Context) error {
	boot := &bootstrap{pid: r.PID}
	err := r.run(ctx, boot)
	if !boot.over {
		o := order{Over: true}
		if err != nil {
			o.Err = err.Error()
		}
		_ = sendTo(relayBoot, &o) // it may have ended
	}
	return err
}

func (r *Relay) run(ctx context.Context, boot *bootstrap) error {
	for _, fd := range []int{relayClient, relayBoot, relayPIDFD} {
		unix.CloseOnExec(fd)
	}
	client := os.NewFile(relayClient, "the client's connection")
	peer, done, err := relay.NewPeer(client)
	if err != nil {
		return err
	}
	defer done()
	var failed error
	ended := make(chan struct{})
	go func() { // whoever is to become CRIU may end before
		defer close(ended)
		fds := []unix.PollFd{{Fd: relayPIDFD, Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	line := Parse(append(slices.Clone(r.Options), "swrk", "0"), System())
	session := relay.Relay{
		Client: client, Peer: peer,
		CRIU: r.CRIU, Start: boot,
		Probe: &relay.Child{Path: r.CRIU, Arg0: r.Arg0, Options: r.Options},
		Rules: r.Rules, Log: r.Log, CRIULog: r.CRIULog, Version: r.Version,
		Served: func(d relay.Served) {
			switch {
			case d.Err == nil:
			case !boot.over:
				failed = fmt.Errorf("%s: %w", d.Type, d.Err)
			case r.Log.Out != io.Writer(r.CRIULog): // CRIU's log has it
				r.Log.Errorf("%s: %v", d.Type, d.Err)
			}
		},
		Draining:  ended,
		ExtUnixSk: line.ExtUnixSk, JoinsNS: len(line.JoinNS) > 0, LogFile: line.LogFile,
	}
	for _, given := range line.InheritFD {
		_, key, _ := strings.Cut(given, ":")
		session.Inherits = append(session.Inherits, key)
	}
	err = errors.Join(session.Run(ctx), failed)
	client.Close()
	if boot.execCmd {
		// CRIU is that command now, or ends; the restore is over, whatever became of it.
		err = errors.Join(err, ReleaseBy(ctx, r.PID, relayPIDFD))
	}
	return err
}

// bootstrap starts CRIU by telling a process that waits for it to become one.
type bootstrap struct {
	pid     int
	over    bool // it has been told
	execCmd bool
}

// errSecond: the process is CRIU already.
var errSecond = errors.New("this connection had its CRIU: make another one")

func (b *bootstrap) Start(job relay.Job) (relay.Worker, error) {
	if b.over {
		return nil, errSecond
	}
	b.over, b.execCmd = true, job.ExecCmd
	defer unix.Close(relayBoot)
	fds := []int{int(job.Socket.Fd())}
	for _, f := range job.Files {
		fds = append(fds, int(f.Fd()))
	}
	o := order{Used: job.Used}
	for len(fds) > 0 {
		n := min(len(fds), maxRights)
		o.More = n < len(fds)
		if err := sendTo(relayBoot, &o, fds[:n]...); err != nil {
			return nil, fmt.Errorf("tell process %d to become CRIU: %w", b.pid, err)
		}
		fds, o.Used = fds[n:], nil
	}
	w := &bootWorker{pid: b.pid}
	for {
		var got reply
		_, err := receiveFrom(relayBoot, &got)
		switch {
		case errors.Is(err, io.EOF):
			return w, nil // it is CRIU now, or has ended
		case err != nil:
			return nil, fmt.Errorf("hear from process %d, which was to become CRIU: %w", b.pid, err)
		case got.Err != "":
			return nil, errors.New(got.Err)
		}
		w.fds = got.FDs
	}
}

type bootWorker struct {
	pid int
	fds []int
}

func (w *bootWorker) PID() int   { return w.pid }
func (w *bootWorker) PIDFD() int { return relayPIDFD }

func (w *bootWorker) FD(i int) int {
	if i < len(w.fds) {
		return w.fds[i]
	}
	return -1 // it has ended before it had them
}

// Close leaves CRIU to whoever called it.
func (w *bootWorker) Close(time.Duration, bool, bool) error { return nil }
