// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"

	"criuhook/criuhook/rule"
	"criuhook/criuhook/swrk"
)

// Relay serves one client until that has no more requests. Its fields are set
// before [Relay.Run] and not changed any more.
type Relay struct {
	// Client is the connection, of SOCK_SEQPACKET. Run reads and writes it without
	// regard to O_NONBLOCK, and neither closes it nor changes its flags.
	Client *os.File
	// First is a message that has been read from Client already; nil: none has.
	First []byte
	// Peer is who is at the other end of Client.
	Peer Peer

	// CRIU is the path of the real CRIU, to look whether it asks query-ext-files.
	CRIU string
	// Start starts it: as a child ([Child]), or some other way. Probe is for
	// requests after which another may come that a CRIU should be started anew
	// for: VERSION, FEATURE_CHECK and CPUINFO with keep_open. nil: Start does.
	Start, Probe Starter

	// What the options of CRIU's command line say, which a request adds to: keys of
	// what it inherits, that CRIU connects sockets itself, joins namespaces, and
	// the name of its log, seen from its work directory ("": not given).
	Inherits  []string
	ExtUnixSk bool
	JoinsNS   bool
	LogFile   string

	// Rules reads the configuration. It is called at most once for a request.
	Rules func() (*rule.Set, error)
	// Log gets our messages, of this Relay only. CRIULog, if not nil, is a writer
	// of that logger, which takes them to the log of the CRIU that works.
	Log     *logrus.Logger
	CRIULog *swrk.CRIULog
	Version string // ours, for the record

	// Check, if not nil, decides about a request before anything is done for it;
	// it may change the request. On an error the client gets an answer of the
	// request's type without success, with the error's text and its syscall.Errno
	// (EPERM if it has none), and Run returns.
	Check func(*rpc.CriuReq) error
	// Served, if not nil, is called after each request.
	Served func(Served)
	// PlainAnswers drops opts from the client's answers to notifications.
	PlainAnswers bool
	// Standalone refuses what CRIU refuses in a service, as opposed to swrk:
	// inherit_fd, rst_sibling and ps.fd mean descriptors and a parent that the
	// client does not share with CRIU.
	Standalone bool
	// InheritDirs: CRIU may not look into this process. The images and the work
	// directory are inherited, and named by paths below /proc/self/fd.
	InheritDirs bool
	// MaxMessage is the size in bytes of the largest message taken from the
	// client; 0: criurpc.MaxMessage.
	MaxMessage int

	// Files, if not nil, makes the calls that open the client's descriptors, and that
	// read or write in its directories. On a thread with the rights of the client no
	// symbolic link leads us where the client may not go, nor does a program with more
	// rights that the client's process has become since.
	Files func(func() error) error

	// Idle is how long to wait for a request; 0: for ever. Answers to
	// notifications have no limit, as with CRIU.
	Idle time.Duration
	// Draining, once closed, ends Run as soon as no request is under way.
	Draining <-chan struct{}
	// Grace is what CRIU gets to come to an end by itself when the context of Run
	// has ended, before it is killed; 0: criurpc.DefaultGrace.
	Grace time.Duration
}

// Peer is a client's process.
type Peer struct {
	PID int // as SO_PEERCRED tells it
	// Open opens the file at a descriptor of the client's, for CRIU to open
	// once more by way of /proc: O_PATH does. Duplicate makes a duplicate of the
	// descriptor, as pidfd_getfd(2) does. nil: as by [NewPeer].
	Open, Duplicate func(fd int) (*os.File, error)
}

// Starter starts a CRIU.
type Starter interface {
	Start(Job) (Worker, error)
}

// Job is what a CRIU is started with. The files are the caller's to close when
// Start has returned.
type Job struct {
	Socket *os.File   // for "swrk FD"
	Files  []*os.File // to inherit
	// WorkDir is the place in Files of the directory for -W; -1: none.
	WorkDir int
	// Used are numbers that the request names: Files must not have them.
	Used []int
	// ExecCmd: the request has exec_cmd, so this CRIU may become another program.
	ExecCmd bool
}

// Worker is a CRIU that works.
type Worker interface {
	PID() int
	// PIDFD becomes readable when it has ended.
	PIDFD() int
	// FD is the number that Job.Files[i] has in it.
	FD(i int) int
	// Close is called once, when its socket is closed, so that it ends by itself. It
	// waits for that where CRIU is a child, and kills it after grace. running:
	// it has not answered its last request; restoring: which is a restore.
	Close(grace time.Duration, running, restoring bool) error
}

// Served is a request that has been served.
type Served struct {
	Type    rpc.CriuReqType
	PID     int  // to be dumped, or the one restored; 0: none
	Success bool // as CRIU answered
	// Err is why not, as far as that is on our side: refused by Check, by a rule,
	// or a CRIU that ended without an answer. CRIU's own reason is in its log.
	Err error
}

// Run serves the client. The error is nil also if requests have failed, such as
// because no CRIU could be started, which is for Served to tell, and if the client is
// gone: it tells that a message was too large or not a request, that Idle or the
// context was over. When it
// returns, every CRIU that it has started has ended, as far as that is
// for the Starter to see to, and no descriptor of its own is open.
func (r *Relay) Run(ctx context.Context) error { return run(ctx, r) }
