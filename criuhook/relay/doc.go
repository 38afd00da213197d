// SPDX-License-Identifier: Apache-2.0

// Package relay stands between one client of CRIU's RPC and one "criu swrk": it
// lets everything pass that the two say to each other, and takes part in dumps
// and restores so that connections to daemons do not stand in the way. "criu
// swrk" of the drop-in and "criuhook serve" are built on it.
//
// # What is changed
//
// Of a DUMP, in a request:
//
//   - notify_scripts is set.
//   - pid is the client's, where none is given: CRIU would take the process at the
//     other end of its socket, which is the Relay's.
//   - images_dir_fd, work_dir_fd, status_fd and pidfd_store_sk are numbers of the
//     client's descriptors, which CRIU looks up in the process at the other
//     end of its socket. The Relay has the same files, under numbers of its own.
//   - external has our entries added if this CRIU does not ask query-ext-files.
//
// Of a RESTORE: notify_scripts, the numbers, and inherit_fd has the sockets that
// are made before CRIU starts. Of a PRE_DUMP or any other request that has
// options: pid and the numbers only. What CRIU answers is not changed at all.
// A message that needs no change passes byte for byte; one that is changed
// keeps the fields that this program does not know. SCM_RIGHTS pass with both.
//
// # Notifications
//
// CRIU sends all of them to the Relay. The client gets them if it has asked for
// them (notify_scripts), in the same order and as they were, and its answers go
// to CRIU as they are, with these exceptions:
//
//	pre-dump         the client first; then a rule's wait for idle connections
//	query-ext-files  the client first; its opts.external gets our entries added
//	post-dump        ours first: the client sees the images in their final form
//	post-restore     ours first: the client finds the connections made
//
// Where ours fails, CRIU is told that the notification has failed, and the client
// does not see it any more, or its own answer counts for nothing. The reason is in
// CRIU's log; the client gets what CRIU answers then. The same is done with what
// goes wrong before CRIU has started, such as rules that cannot be read: it fails
// at the first notification, so that there is a log to say it.
//
// Where the client's fails, CRIU is told so, and ours is not done, but at
// post-dump: criuhook.img is removed again when CRIU reports that it has failed, or
// ends before all have agreed. It is there when the client hears of post-dump, since
// clients copy images to another host then, and restore them there. After all have
// agreed, CRIU ends the tree: what it wrote stays, even if no answer comes.
//
// # Ends
//
// A client that is gone: CRIU finds nobody at the next notification that the
// client had asked for, or goes on to the end if it had not, as without us. A
// CRIU that is gone: what it said last goes to the client, then the connection
// ends. A Relay that is gone: CRIU finds nobody at the next notification, and
// the client the end of its connection; killed while the client is at post-dump, it
// leaves criuhook.img, beside images that are complete, as CRIU leaves those of
// any dump that fails then.
package relay
