// SPDX-License-Identifier: Apache-2.0

// Package criurpc is a client of "criu swrk", CRIU's RPC for one client: it
// starts CRIU as a child, sends requests and handles the notifications that
// CRIU sends on the way. The messages are those of go-criu's package rpc.
//
// [Run] makes one request; [Start] and [Client.Do] make several of one CRIU.
//
// # Protocol
//
// From CRIU's images/rpc.proto and criu/cr-service.c:
//
//   - Client and CRIU share a SOCK_SEQPACKET socketpair; one message is one
//     packet. The client sends a CriuReq, CRIU answers with one CriuResp.
//   - With notify_scripts, CRIU sends answers of type NOTIFY in between, and
//     waits after each for a CriuReq of type NOTIFY. If that does not have
//     notify_success, or the client is gone, CRIU gives the dump or restore
//     up: it lets a dumped tree run on and kills a half restored one. There
//     are exceptions, see [StagePreResume].
//   - The answer to [StageQueryExtFiles] may carry opts, of which CRIU reads
//     external.
//   - After its answer CRIU ends, unless the request had keep_open; it allows
//     that for VERSION, FEATURE_CHECK, CPUINFO_* and PAGE_SERVER*. After a
//     PRE_DUMP it waits for another PRE_DUMP or a DUMP in any case.
//   - images_dir_fd, work_dir_fd and status_fd are fds of the client: CRIU
//     opens /proc/PID/fd/N, PID being who made the socketpair (SO_PEERCRED).
//     So they must stay open until the answer came.
//   - inherit_fd and ps.fd are fds of CRIU, which it must have had from its
//     start on: see [Config.Files] and [InheritFd]. CRIU takes no fd by
//     SCM_RIGHTS. It sends one with [StageOrphanPTSMaster].
//   - cr_errmsg is the first error that CRIU logged, on success too.
//
// # Cancellation
//
// CRIU cleans up only as long as it lives: killed in the middle of a dump, it
// leaves network locks, link remaps, frozen cgroups and sockets in repair mode
// behind. So when the context of a request ends, the notification under way
// is answered as failed, no other one is, and CRIU, which looks at its socket
// only at notifications, has [Config.Grace] to come to an end by itself. Only
// then is it killed, with its children and what it has restored so far. A dump
// or restore that CRIU reports as done in spite of the cancellation counts
// as done.
package criurpc
