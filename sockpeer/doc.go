// SPDX-License-Identifier: Apache-2.0

// Package sockpeer tells who is at the other end of the unix sockets of a
// process tree, and connects sockets as somebody else.
//
// Scan reads the fd tables of all tasks of a tree and sock_diag(7) in each of
// their network namespaces, and returns the connections whose other half lies
// outside of the tree. It needs root (CAP_SYS_PTRACE, CAP_SYS_ADMIN for foreign
// network namespaces) and Linux 5.6 (pidfd_getfd(2)). The tree may run; then
// the result is what was there at some moment of the scan for each fd. A tree
// that is frozen gives an exact answer.
//
// # Network namespaces
//
// sock_diag shows the sockets of one network namespace. The accepted half of a
// connection is made in the namespace of the client, so both halves of an
// outbound connection are visible from the client's, whereever the daemon
// lives. A socket belongs to the namespace it was made in, which need not be
// the one its holder is in now.
package sockpeer
