// SPDX-License-Identifier: Apache-2.0

// Package app is the application that the tests checkpoint: a process with
// unix connections that does what a test tells it through a control socket.
// The test binary is started again as the application (see Main).
package app

// Command is what a test asks of the application. One command per control
// connection, which ends with the answer: an open one could not be dumped.
type Command struct {
	Op   string
	Conn string // name the test gave to a connection
	// Open
	Type     int    // SOCK_ constant
	To       string // path, or @ and an abstract name
	ToBytes  []byte // instead of To: a name that is no UTF-8
	Nonblock bool
	// Set options
	Level, Option, Value int
	// Request, Hammer
	Threads int
	Text    string
	// Dup
	As string
}

// Answer is what it answers. Err is the errno's name or a message; "": done.
type Answer struct {
	Err   string
	FD    int
	Text  string
	Conn  Details
	Count Counters
}

// Details are what can be seen of a connection from inside.
type Details struct {
	FD       int
	Flags    int // F_GETFL
	Cloexec  bool
	SndBuf   int
	RcvBuf   int
	PassCred int
	RcvTimeo string
	SndTimeo string
	Inode    uint64
	OwnerPID int
	Signal   int
	PeerName string
	SockName string
}

// Counters are of all hammering threads together.
type Counters struct {
	Requests int64
	Failed   int64
	LastErr  string
	FDs      int // open descriptors of the process
	Threads  int // tasks of the process
	Signals  int64
}
