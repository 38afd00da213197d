// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"fmt"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	pb "google.golang.org/protobuf/proto"

	"criuhook/sockpeer"
)

// MarkService makes of sockets that CRIU was told are external those of CRIU's
// service: by them the tree asked for its own dump, and on restore CRIU puts the
// answer into them (criu/sk-unix.c, USK_SERVICE). No other way is it
// known that the answer is due. Once ctx has ended, nothing changes any more.
func MarkService(ctx context.Context, dir string, inodes []uint32) error {
	if len(inodes) == 0 {
		return nil
	}
	f, err := changeFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	e, err := newEdit(f)
	if err != nil {
		return err
	}
	wanted, left := map[uint32]bool{}, map[uint32]bool{}
	for _, inode := range inodes {
		wanted[inode] = true
	}
	for _, r := range e.files {
		u := r.unix()
		if u == nil || u.GetUflags()&uskExtern != 0 || !wanted[u.GetIno()] {
			continue
		}
		delete(wanted, u.GetIno())
		entry := pb.Clone(r.entry).(*fdinfo.FileEntry)
		u = entry.GetUsk()
		if p := u.GetPeer(); p != 0 {
			left[p] = true
		}
		u.Peer, u.State, u.Shutdown = pb.Uint32(0), pb.Uint32(uint32(sockpeer.Closed)), nil
		u.Uflags = pb.Uint32(u.GetUflags() | uskService)
		e.changed[r] = entry
	}
	for inode := range wanted {
		return fmt.Errorf("the images in %s do not hold socket %d, by which this dump was asked for: dump again", f.dir, inode)
	}
	e.dropPeers(left)
	writes, err := e.writes()
	if err != nil {
		return err
	}
	return f.replace(writes)
}
