// SPDX-License-Identifier: Apache-2.0

// Package swrk dumps and restores by CRIU's RPC, as "criu OPTIONS swrk FD":
// CRIU keeps the options of its command line, so that all that a caller knows
// of them goes on to work, and the request sets only what has to be (cr_service_work
// and setup_opts_from_req in criu/cr-service.c).
//
// CRIU asks in a dump, with the tree frozen, which files are external
// (query-ext-files): that is when the connections are found. An older CRIU does
// not ask; then they are found before the dump, and the images tell afterwards
// whether any came meanwhile.
package swrk
