// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"fmt"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	pb "google.golang.org/protobuf/proto"

	"criuhook/proto"
)

// ExternalFile is a file that CRIU was told to treat as external and that is
// a name-service cache without a name.
type ExternalFile struct {
	Key  string // as told to CRIU: "file[MNTID:INODE]", both hexadecimal
	Path string // where the file was
}

// Normalize brings the images that a dump just wrote into criuhook's one
// form. Each connection of the record becomes a dormant or a dead socket, and
// the caches of name-service daemons that clients map become zero pages; those
// it enters into rec.Caches. What already has that form stays as it is, byte for byte.
//
// Everything is worked out before the first file changes. A file changes in
// one step; should a later one fail, the images must not be used, and having
// no criuhook.img they are not. The error then fails the dump. Once ctx has
// ended, nothing changes any more.
func Normalize(ctx context.Context, dir string, rec *proto.Record, external ...ExternalFile) error {
	f, err := changeFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	e, err := newEdit(f)
	if err != nil {
		return err
	}
	if err := e.sockets(rec); err != nil {
		return fmt.Errorf("edit the sockets in %s: %w", f.dir, err)
	}
	caches, err := e.caches(external)
	if err != nil {
		return fmt.Errorf("edit the caches in %s: %w", f.dir, err)
	}
	writes, err := e.writes()
	if err != nil {
		return err
	}
	if err := f.replace(writes); err != nil {
		return err
	}
	for _, name := range e.ghosts() {
		if err := f.remove(name); err != nil {
			return err
		}
	}
	addCaches(rec, caches)
	return nil
}

// edit collects what is to change in a Set.
type edit struct {
	*Set
	changed map[*file]*fdinfo.FileEntry
	dropped map[*file]bool
	unmap   map[*remap]bool
	memory  map[*task]bool
	leaves  map[uint32]bool // ids of sockets that are connections of the record
}

func newEdit(f *folder) (*edit, error) {
	s, err := load(f)
	if err != nil {
		return nil, err
	}
	return &edit{Set: s, changed: map[*file]*fdinfo.FileEntry{}, dropped: map[*file]bool{}, unmap: map[*remap]bool{}, memory: map[*task]bool{}, leaves: map[uint32]bool{}}, nil
}

// writes encodes the images that change, in the order they are put in place.
// Between any two of them a restore works or fails, but gives nothing wrong:
// mappings first (nothing needs their files then), remaps before the files
// they belong to (a /dev/null must not meet the ghost of its predecessor).
func (e *edit) writes() ([]write, error) {
	var out []write
	for _, t := range e.tasks {
		if !e.memory[t] {
			continue
		}
		raw, err := pb.Marshal(t.mm)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", e.f.path(mmName(t.pid)), err)
		}
		out = append(out, write{mmName(t.pid), assemble([][]byte{raw}, magicMM)})
	}
	if len(e.unmap) > 0 {
		var recs [][]byte
		for _, r := range e.remap {
			if !e.unmap[r] {
				recs = append(recs, r.raw)
			}
		}
		out = append(out, write{remapName, assemble(recs, magicRemap)})
	}
	if len(e.changed)+len(e.dropped) == 0 {
		return out, nil
	}
	var recs [][]byte
	for _, r := range e.files {
		if e.dropped[r] {
			continue
		}
		raw := r.raw
		if entry := e.changed[r]; entry != nil {
			var err error
			if raw, err = pb.Marshal(entry); err != nil {
				return nil, fmt.Errorf("encode %s: %w", e.f.path(filesName), err)
			}
		}
		recs = append(recs, raw)
	}
	return append(out, write{filesName, assemble(recs, magicFiles)}), nil
}

// ghosts names the ghost files that nothing refers to any more.
func (e *edit) ghosts() []string {
	gone, used := map[uint32]bool{}, map[uint32]bool{}
	for _, r := range e.remap {
		if id, ok := r.ghost(); ok {
			if e.unmap[r] {
				gone[id] = true
			} else {
				used[id] = true
			}
		}
	}
	var out []string
	for id := range gone {
		if !used[id] {
			out = append(out, fmt.Sprintf("ghost-file-%x.img", id))
		}
	}
	return out
}

// addCaches enters caches into the record. An entry of an earlier run, which
// found the images not yet in form, is replaced or stays.
func addCaches(rec *proto.Record, caches []*proto.Cache) {
	for _, c := range caches {
		found := false
		for i, old := range rec.Caches {
			if old.GetPath() == c.GetPath() && old.GetUnlinked() == c.GetUnlinked() {
				rec.Caches[i], found = c, true
			}
		}
		if !found {
			rec.Caches = append(rec.Caches, c)
		}
	}
}
