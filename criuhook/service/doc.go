// SPDX-License-Identifier: Apache-2.0

// Package service is CRIU's RPC service on a unix socket, as "criu service" is:
// clients connect (libcriu's criu_set_service_address), send a request, answer
// notifications, and get the answer. What is done about unix connections to
// processes outside of a checkpoint is done on the way (package relay); each
// request has a CRIU of its own, "criu swrk".
//
// PROTOCOL.md, beside this file, says what differs from CRIU's service.
//
// # Access
//
// Root may do everything. The users and groups that the configuration names may
// have their own processes dumped, and ask what CRIU can do. For them CRIU runs
// with their ids, and with CAP_CHECKPOINT_RESTORE as its only capability: so it
// is the kernel that decides, at the moment of each access, what CRIU may trace,
// read and write. What is checked before serves to refuse with a reason.
// Files of theirs that this process touches by itself, it touches with their
// rights, too ([Client.Do]). A restore is refused to them: see Policy.
package service
