// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/dropin"
	"criuhook/criuhook/relay"
	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
)

// Relay is the Worker that has CRIU do the work (package relay).
type Relay struct {
	CRIU    string // path of the real CRIU
	Version string // ours, for the record
	// NewLog makes a logger whose messages go to CRIU's log.
	NewLog func(w io.Writer) (*logrus.Logger, error)
}

// systemPath is where CRIU looks for the programs that it runs (iptables, tar).
const systemPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Work carries out the requests of one client.
func (w *Relay) Work(ctx context.Context, s *Session) error {
	file, err := s.Conn.File()
	if err != nil {
		return fmt.Errorf("duplicate the connection: %w", err)
	}
	defer file.Close()
	peer, done, err := relay.NewPeer(file)
	if err != nil {
		return err
	}
	defer done()
	criuLog := &swrk.CRIULog{}
	log, err := w.NewLog(criuLog)
	if err != nil {
		return err
	}
	log.AddHook(copyTo{s.Log})

	r := &relay.Relay{
		Client: file, First: s.First, Peer: peer,
		CRIU:  w.CRIU,
		Start: w.starter(s.Client, s.Log),
		Rules: func() (*rule.Set, error) { return s.Rules, nil },
		Log:   log, CRIULog: criuLog, Version: w.Version,
		Check:      s.Allow,
		Served:     func(d relay.Served) { served(s.Log, d) },
		Standalone: true,
		MaxMessage: s.Limits.Message,
		Idle:       s.Limits.Idle,
		Draining:   s.Draining,
	}
	if s.Client.UID != 0 {
		// CRIU runs with the client's rights, and so does what we do with files.
		r.PlainAnswers, r.InheritDirs, r.Files = true, true, s.Client.Do
	}
	return r.Run(ctx)
}

// starter starts a CRIU with the client's rights.
func (w *Relay) starter(c *Client, log *logrus.Entry) relay.Starter {
	// Not our environment: systemd's variables are not CRIU's, and CRIU's own
	// (CRIU_CONFIG_FILE, HOME for ~/.criu) are for its command line.
	child := &relay.Child{
		Path: w.CRIU, Env: []string{systemPath}, Dir: "/",
		// What CRIU says before it has a log, and what it never logs.
		Stderr: &lines{log: log},
		// A terminal's Ctrl-C is for us: it lets CRIU come to its end.
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		Release:     dropin.ReleaseBy,
	}
	if c.UID != 0 {
		// The kernel checks what CRIU may trace, read and write. The capability is
		// what CRIU needs to look at processes of its own user at all.
		child.Path, child.Arg0 = "/proc/self/exe", "criuhook"
		child.Options = append(becomeOptions(c), w.CRIU, "--unprivileged")
		child.Stderr = nil
	}
	return child
}

// served says what became of a request.
func served(log *logrus.Entry, d relay.Served) {
	what := d.Type.String()
	if d.PID > 0 {
		what = fmt.Sprintf("%s of process %d", what, d.PID)
	}
	switch {
	case d.Success && d.Err == nil:
		level := logrus.InfoLevel
		if d.Type == rpc.CriuReqType_VERSION || d.Type == rpc.CriuReqType_FEATURE_CHECK {
			level = logrus.DebugLevel
		}
		log.Logf(level, "%s: done", what)
	case d.Success:
		log.Warnf("%s: done, but: %v", what, d.Err)
	case errors.Is(d.Err, unix.EPERM):
		log.Warnf("refused: %s: %v", what, d.Err)
	case d.Err != nil:
		log.Warnf("%s: failed: %v", what, d.Err)
	default:
		log.Warnf("%s: failed; CRIU's log, which the client has, says why", what)
	}
}

// copyTo has a message also said by the service.
type copyTo struct{ log *logrus.Entry }

// Levels are those of every message.
func (copyTo) Levels() []logrus.Level { return logrus.AllLevels }

// Fire copies one message.
func (c copyTo) Fire(e *logrus.Entry) error {
	c.log.Log(e.Level, e.Message)
	return nil
}

// lines logs what CRIU writes to its stderr.
type lines struct {
	log *logrus.Entry
	mu  sync.Mutex
	buf []byte
}

// Write logs what is complete of it.
func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, b...)
	for {
		line, rest, ok := strings.Cut(string(l.buf), "\n")
		if !ok && len(l.buf) < 4096 {
			return len(b), nil
		}
		l.buf = []byte(rest)
		if line = strings.TrimSpace(line); line != "" {
			l.log.Infof("CRIU: %s", line)
		}
	}
}
