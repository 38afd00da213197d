// SPDX-License-Identifier: Apache-2.0

// Package interpose changes what CRIU reads from sock_diag(7).
//
// When CRIU dumps, it freezes the tree and then asks sock_diag for all unix
// sockets. A tracer follows CRIU's system calls from the pre-dump script up to
// that answer and edits it in CRIU's memory: a connection that leaves the tree
// is shown as a socket without a peer, which CRIU can dump. The application
// is not touched, and there is nothing to undo.
//
// Only PTRACE_GET_SYSCALL_INFO (Linux 5.3) and process_vm_readv(2) are used:
// nothing here depends on the architecture.
package interpose

import "errors"

// Form is how a socket shall stand in the image.
type Form uint8

// Dormant: unconnected. Dead: closed by the peer.
const (
	Dormant Form = iota + 1
	Dead
)

// ErrTraced: CRIU cannot be traced because somebody else does, or because the
// kernel does not allow it.
var ErrTraced = errors.New("CRIU cannot be traced")

// ErrEnded: CRIU ended before it asked for the sockets of a frozen tree.
var ErrEnded = errors.New("CRIU ended before it asked for unix sockets")
