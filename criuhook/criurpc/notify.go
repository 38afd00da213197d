// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"context"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
)

// Stage is the name of a notification: the "script" of CriuNotify. A CRIU newer
// than this package may send others.
type Stage string

// The notifications of CRIU (criu/action-scripts.c), in the order in which they
// come: first those of a dump, then those of a restore.
const (
	// StagePreDump: nothing has happened yet, the tree runs.
	StagePreDump Stage = "pre-dump"
	// StageNetworkLock: the tree is frozen and CRIU asks to lock its network. Only
	// for a tree with a network namespace of its own.
	StageNetworkLock Stage = "network-lock"
	// StageQueryExtFiles: the tree is frozen and none of its files dumped. The
	// handler may return opts, of which CRIU takes external. Since CRIU 3.19, see
	// [QueriesExtFiles].
	StageQueryExtFiles Stage = "query-ext-files"
	// StagePostDump: all images are written, the tree is frozen. Comes only if all
	// went well so far. If it fails, the tree runs on and the dump has failed.
	StagePostDump Stage = "post-dump"
	// StageNetworkUnlock: the network is to be unlocked again. CRIU does not care
	// for the answer.
	StageNetworkUnlock Stage = "network-unlock"

	// StagePreRestore: nothing has happened yet.
	StagePreRestore Stage = "pre-restore"
	// StageSetupNamespaces: the root task and its namespaces exist; has its pid.
	StageSetupNamespaces Stage = "setup-namespaces"
	// StagePostSetupNamespaces: the namespaces are set up.
	StagePostSetupNamespaces Stage = "post-setup-namespaces"
	// StagePostRestore: all tasks exist, none runs; has the pid of the root task.
	// The last stage at which a failure undoes the restore.
	StagePostRestore Stage = "post-restore"
	// StagePreResume: the tasks are about to run. CRIU only logs a failure of this
	// stage and the next and goes on.
	StagePreResume Stage = "pre-resume"
	// StagePostResume: the tasks run.
	StagePostResume Stage = "post-resume"

	// StageOrphanPTSMaster carries the master of a terminal that the restore made,
	// if the request has orphan_pts_master.
	StageOrphanPTSMaster Stage = "orphan-pts-master"
	// StageStatusReady: a page server or lazy-pages daemon listens.
	StageStatusReady Stage = "status-ready"
)

// Notification is a question of CRIU, which waits for the answer.
type Notification struct {
	Stage Stage
	// PID of the restored root task as CRIU sees it, where the stage has one; else 0.
	PID int
	// Files came with the notification. They are closed when Notify returns, but
	// for those in whose place the handler has put nil: these are the handler's.
	Files []*os.File
	// Message is the whole message, with fields that this package does not know.
	Message *rpc.CriuResp
}

// Handler answers the notifications of one request, one after the other, on
// the goroutine that called [Client.Do]. It must not use the Client.
//
// An error is answered as failed, see [Stage] for what CRIU does then; the
// options are sent with the answer and may be nil. When ctx ends, CRIU is told
// at once that the notification has failed, and what Notify returns later is
// no longer sent. Do waits for Notify all the same, so Notify should return soon;
// a CRIU that hangs is not killed before.
type Handler interface {
	Notify(ctx context.Context, n *Notification) (*rpc.CriuOpts, error)
}

// HandlerFunc is a function as a [Handler].
type HandlerFunc func(ctx context.Context, n *Notification) (*rpc.CriuOpts, error)

// Notify calls f.
func (f HandlerFunc) Notify(ctx context.Context, n *Notification) (*rpc.CriuOpts, error) {
	return f(ctx, n)
}

// External makes the answer to [StageQueryExtFiles] out of keys such as
// "unix[INODE]" and "file[MNTID:INODE]", as with CRIU's --external.
func External(keys ...string) *rpc.CriuOpts {
	return &rpc.CriuOpts{External: keys}
}
