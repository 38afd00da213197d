// SPDX-License-Identifier: Apache-2.0

package action_test

import (
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/action"
	"criuhook/criuhook/dump"
	"criuhook/criuhook/image"
	"criuhook/proto"
)

// blocked is a log that nobody reads.
type blocked struct {
	came chan struct{} // closed when something was logged
	over chan struct{}
}

func (blocked) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel} }

func (b blocked) Fire(*logrus.Entry) error {
	close(b.came)
	<-b.over
	return nil
}

// What hangs after the dump does not keep the tree frozen: here it is the warning
// that a connection has gone while CRIU dumped.
func TestPostDumpHangs(t *testing.T) {
	dir := t.TempDir()
	id, err := dump.ID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	err = image.WritePlan(t.Context(), dir, &proto.Record{DumpId: id, Connections: []*proto.Connection{{
		Inode: 1, Type: unix.SOCK_STREAM, Action: proto.Action_ACTION_RECONNECT,
		Peer: &proto.Peer{Inode: 2, Name: []byte("/run/d"), Uid: -1}, Holders: []*proto.Holder{{Pid: 1, Fd: 3}},
		Reconnect: &proto.Reconnect{To: []byte("/run/d"), Prelude: "none", ListenerUid: -1},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	hook := blocked{make(chan struct{}), make(chan struct{})}
	defer close(hook.over)
	log.AddHook(hook)
	s := &action.Script{Stage: "post-dump", ImagesDir: dir, Root: os.Getpid(), CRIU: os.Getpid(), Log: log}
	s.SetLimit(5 * time.Second) // for what does not hang
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	select {
	case err = <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the script hangs")
	}
	if err == nil || !strings.Contains(err.Error(), "finish the images of the tree of process") || !strings.Contains(err.Error(), "not done in 5s") {
		t.Errorf("post-dump: %v", err)
	}
	select {
	case <-hook.came:
	default:
		t.Error("it hung somewhere else")
	}
	// The next restore must not take these images for complete, nor for unfinished ones
	// of a dump that may still go on.
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}
