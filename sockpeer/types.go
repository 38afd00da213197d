// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Type is the type of a socket: one of the kernel's SOCK_ constants.
type Type uint8

// The types a unix socket can have.
const (
	Stream    Type = unix.SOCK_STREAM
	Dgram     Type = unix.SOCK_DGRAM
	Seqpacket Type = unix.SOCK_SEQPACKET
)

func (t Type) String() string {
	switch t {
	case Stream:
		return "stream"
	case Dgram:
		return "dgram"
	case Seqpacket:
		return "seqpacket"
	}
	return "type " + strconv.Itoa(int(t))
}

// MarshalText makes a Type readable in JSON and YAML.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// State is the state of a socket as sock_diag tells it: a TCP_ constant of
// the kernel's include/net/tcp_states.h, which unix sockets share.
type State uint8

// The states a unix socket can have.
const (
	Established State = 1
	Closed      State = 7
	Listening   State = 10
)

func (s State) String() string {
	switch s {
	case Established:
		return "established"
	case Closed:
		return "closed"
	case Listening:
		return "listening"
	}
	return "state " + strconv.Itoa(int(s))
}

// MarshalText makes a State readable in JSON and YAML.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Direction tells which end of a connection called connect().
type Direction uint8

// Outbound: the peer has the name. Inbound: we have it, or took it over.
const (
	Outbound Direction = iota
	Inbound
)

func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// MarshalText makes a Direction readable in JSON and YAML.
func (d Direction) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Name is what a socket is bound to, byte for byte: a path, or, if it starts
// with a NUL byte, an abstract name (unix(7)). Empty: not bound.
type Name string

// Abstract reports whether the name lives in the abstract namespace.
func (n Name) Abstract() bool { return n != "" && n[0] == 0 }

// Pattern is the name as rules match it: the leading NUL of an abstract name
// is written as @, all other bytes stay.
func (n Name) Pattern() string {
	if n.Abstract() {
		return "@" + string(n[1:])
	}
	return string(n)
}

// String is the name for people: like Pattern, with every byte that a
// terminal could misread as a Go escape.
func (n Name) String() string {
	q := strconv.QuoteToASCII(n.Pattern())
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// MarshalText makes a Name readable in JSON and YAML.
func (n Name) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// Connection is one open socket description in the tree whose other half is
// outside of it.
type Connection struct {
	Inode     uint32    `json:"inode"`
	Type      Type      `json:"type"`
	State     State     `json:"state"`
	Direction Direction `json:"direction"`
	// Name is what our half is bound to; clients rarely are.
	Name Name `json:"name,omitempty"`
	// Netns is the inode of the network namespace the socket was made in.
	Netns uint64 `json:"netns"`
	// Flags are the file status flags (O_NONBLOCK, O_ASYNC …), as in
	// /proc/PID/fdinfo, without close-on-exec.
	Flags    int  `json:"flags"`
	Shutdown int  `json:"shutdown"` // bit 0: receive, bit 1: send
	Peer     Peer `json:"peer"`
	// Holders are all fds in the tree that refer to this description,
	// ordered by process and fd. Never empty.
	Holders []Holder `json:"holders"`
	// RecvQueue is what we have not read, SendQueue what the peer has not:
	// bytes, or for the send queue the kernel's memory for them (unix_diag).
	RecvQueue uint32 `json:"recv_queue"`
	SendQueue uint32 `json:"send_queue"`
	// Unaccepted: still in the listener's backlog.
	Unaccepted bool `json:"unaccepted"`
	// Waiters are the threads of the tree that are blocked on it.
	Waiters []Waiter `json:"waiters,omitempty"`
}

// Busy says why the connection is busy, or returns "" for an idle one.
func (c *Connection) Busy() string {
	switch {
	case c.Unaccepted:
		return "the peer has not accepted it yet"
	case len(c.Waiters) > 0:
		return c.Waiters[0].String()
	case c.RecvQueue > 0:
		return fmt.Sprintf("%d bytes not yet read by us", c.RecvQueue)
	case c.SendQueue > 0:
		return "bytes not yet read by the peer"
	}
	return ""
}

// Holder is one fd that refers to a connection.
type Holder struct {
	PID int `json:"pid"`
	// TID is PID, or the thread whose own fd table holds the fd
	// (unshare(CLONE_FILES)).
	TID     int  `json:"tid"`
	FD      int  `json:"fd"`
	Cloexec bool `json:"cloexec"`
}

// Peer is the other half.
type Peer struct {
	Inode uint32 `json:"inode,omitempty"` // 0: not accepted yet
	// Name is the name as the peer bound it, in its own mount namespace.
	Name Name `json:"name,omitempty"`
	// Path is the name by which the first holder reaches the peer, below its
	// own root, if Name leads it elsewhere or nowhere, as in a container that
	// sees the socket file through a bind mount; empty: none, or the same.
	Path Name `json:"path,omitempty"`
	// VFS is the file of a path name; the zero value: none, or not visible.
	VFS VFS `json:"vfs"`
	// PID is a process that holds the peer's half, else the one that
	// called listen(); 0: not visible from this pid namespace.
	PID int `json:"pid,omitempty"`
	// UID is the user who called listen(), as SO_PEERCRED tells, or, for
	// datagrams, who made the socket; -1: not known.
	UID int64 `json:"uid"`
	// Exe is the program of PID, if that holds the peer's half or listens.
	Exe string `json:"exe,omitempty"`
	// Elsewhere: to the first holder the name, a path, leads to the socket
	// file of another than the peer, or perhaps: the file system did not
	// answer in time. False where one of the files is missing.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// VFS names a socket file (unix_diag's UDIAG_SHOW_VFS).
type VFS struct {
	Dev   uint32 `json:"dev,omitempty"`
	Inode uint32 `json:"inode,omitempty"`
}

// Waiter is a thread that is blocked in a system call on a connection.
type Waiter struct {
	PID     int    `json:"pid"`
	TID     int    `json:"tid"`
	FD      int    `json:"fd"`
	Syscall string `json:"syscall"`
}

func (w Waiter) String() string {
	if w.Syscall == unknownCall || w.Syscall == compatCall {
		return fmt.Sprintf("thread %d may wait on fd %d, in %s", w.TID, w.FD, w.Syscall)
	}
	return fmt.Sprintf("thread %d waits in %s on fd %d", w.TID, w.Syscall, w.FD)
}

// Identity is what the kernel shows a daemon of a client, and what it lets
// the client do.
type Identity struct {
	UID    uint32   `json:"uid"` // effective
	GID    uint32   `json:"gid"` // effective
	Groups []uint32 `json:"groups"`
	CapEff uint64   `json:"cap_eff"` // effective capabilities, a bit each
}

// Process is what a scan says of a process that holds connections.
type Process struct {
	PID int `json:"pid"`
	// NSPID is its pid in each pid namespace from ours to its own (NSpid
	// of /proc/PID/status).
	NSPID    []int    `json:"nspid"`
	Comm     string   `json:"comm"`
	Exe      string   `json:"exe,omitempty"`
	Identity Identity `json:"identity"`
	// MixedIdentity: a thread has another identity than the first one, which
	// Identity tells.
	MixedIdentity bool `json:"mixed_identity,omitempty"`
	// Mapped are the files of which it has mapped code: its program and its
	// libraries, each once, as /proc/PID/maps names them; nil: not known. Only
	// a scan tells it.
	Mapped []string `json:"mapped,omitempty"`
}

// Pending tells of clients outside of the tree that wait in the backlog of a
// listener in it, not yet accepted. No image holds them: a dump drops them,
// with what they have sent.
type Pending struct {
	Listener Holder `json:"listener"` // its first holder
	Name     Name   `json:"name"`     // what it listens at
	Count    int    `json:"count"`    // how many wait
}

// Snapshot is the result of a scan.
type Snapshot struct {
	Connections []Connection `json:"connections"` // ordered by holder
	// Processes are the holders and, of a tree, its root.
	Processes map[int]Process `json:"processes"`
	// Netns are the network namespaces of the tree's tasks.
	Netns []uint64 `json:"netns"`
	// Pending are the listeners in whose backlog somebody waits, by holder.
	Pending []Pending `json:"pending,omitempty"`
}
