// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_packet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-packet"
	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

// fuzzed are the images that FuzzOpen makes, in the order of its arguments.
var fuzzed = []string{"inventory.img", "pstree.img", "ids-7.img", "fdinfo-2.img", "files.img", "mm-7.img", "pagemap-7.img",
	"remap-fpath.img", "sk-queues.img", "core-7.img", "core-8.img", image.RecordName}

// kinds are what they are, but for the record, which has no records of CRIU's.
var kinds = []string{"INVENTORY", "PSTREE", "IDS", "FDINFO", "FILES", "MM", "PAGEMAP", "REMAP_FPATH", "SK_QUEUES", "CORE", "CORE"}

// loose cuts head and lengths off an image's records and puts two bytes in the
// place of each length that fit any data: a mutation need not keep them right.
func loose(data []byte, head int) (out []byte) {
	for rest := data[min(head, len(data)):]; len(rest) >= 4; {
		n := min(int(binary.LittleEndian.Uint32(rest)), len(rest)-4, 1<<16-1)
		out = binary.LittleEndian.AppendUint16(out, uint16(n))
		out = append(out, rest[4:4+n]...)
		rest = rest[4+n:]
	}
	return out
}

// tight is the reverse of loose.
func tight(head, rest []byte) []byte {
	out := bytes.Clone(head)
	for len(rest) >= 2 {
		n := min(int(binary.LittleEndian.Uint16(rest)), len(rest)-2)
		out = binary.LittleEndian.AppendUint32(out, uint32(n))
		out = append(out, rest[2:2+n]...)
		rest = rest[2+n:]
	}
	return out
}

func fuzzSeeds(f *testing.F) {
	half := &images{}
	half.sock(1, 100, 1, 1, 200, 0, "")
	half.sock(2, 200, 2, 10, 0, 1, "/run/d\x00")
	half.fd(5, 1, fdinfo.FdTypes_UNIXSK)
	half.queues = []*sk_packet.SkPacketEntry{{IdFor: pb.Uint32(1), Length: pb.Uint32(0), Scm: []*sk_packet.ScmEntry{{Type: pb.Uint32(1), Rights: []uint32{3}}}}}
	cache := &images{}
	cache.sock(1, 100, 1, 1, 0, 0, "")
	cache.client(4, 3)
	cache.reg(9, "/dev/null")
	cache.remap(3, 1, remap_file_path.RemapType_GHOST)
	for _, im := range []*images{half, cache} {
		dir := im.write(f)
		threads(f, dir, core(), core())
		for _, raw := range []bool{true, false} {
			args := []any{raw}
			for _, n := range fuzzed {
				b, err := os.ReadFile(filepath.Join(dir, n))
				if err != nil {
					b = nil
				}
				if i := slices.Index(fuzzed, n); !raw && i < len(kinds) {
					b = loose(b, len(stream(kinds[i])))
				}
				args = append(args, b)
			}
			f.Add(args...)
		}
	}
}

// FuzzOpen reads and edits images of any content: nothing may panic, hang or
// take memory without bound, and what Normalize has edited can be read again.
func FuzzOpen(f *testing.F) {
	fuzzSeeds(f)
	heads := make([][]byte, len(kinds))
	for i, k := range kinds {
		heads[i] = stream(k)
	}
	f.Fuzz(func(t *testing.T, raw bool, inv, tree, ids, fds, files, mm, pages, remaps, queues, core7, core8, rec []byte) {
		dir := t.TempDir()
		for i, data := range [][]byte{inv, tree, ids, fds, files, mm, pages, remaps, queues, core7, core8, rec} {
			if len(data) == 0 {
				continue // there is none
			}
			if !raw && i < len(kinds) {
				data = tight(heads[i], data)
			}
			put(t, dir, fuzzed[i], data)
		}
		_, _ = image.ReadRecord(dir)
		s, err := image.Open(dir)
		if err == nil {
			use(s)
		}
		for _, rec := range []*proto.Record{{}, of(s)} {
			if image.Normalize(t.Context(), dir, rec) != nil {
				continue
			}
			again, err := image.Open(dir)
			if err != nil {
				t.Fatalf("after Normalize: %v", err)
			}
			use(again)
			if err := again.Match(rec); err != nil {
				t.Fatalf("after Normalize: %v", err)
			}
		}
	})
}

// use asks all there is to ask.
func use(s *image.Set) {
	s.Sockets()
	s.External()
	s.Caches()
	s.OwnNetns()
	s.RootPID()
	for _, pid := range s.PIDs() {
		_, _ = s.Creds(pid)
		_, _ = s.Comm(pid)
		calls, _ := s.Calls(pid)
		for _, c := range calls {
			_ = c.MayWait(0)
		}
	}
}

// of is a record that reconnects every second half connection of the images.
func of(s *image.Set) *proto.Record {
	rec := &proto.Record{}
	if s == nil {
		return rec
	}
	for i, x := range s.External() {
		c := &proto.Connection{Inode: x.Socket.Inode, Type: uint32(x.Socket.Type), Action: proto.Action_ACTION_HANGUP}
		if i%2 == 0 {
			c.Action, c.Reconnect = proto.Action_ACTION_RECONNECT, &proto.Reconnect{To: []byte("/run/d"), Prelude: "none"}
		}
		for _, h := range x.Socket.Holders {
			c.Holders = append(c.Holders, &proto.Holder{Pid: int32(h.PID), Fd: int32(h.FD)})
		}
		rec.Connections = append(rec.Connections, c)
	}
	if image.Validate(rec) != nil {
		return &proto.Record{}
	}
	return rec
}
