// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	pb "google.golang.org/protobuf/proto"
)

// Magic numbers of CRIU's images (criu/include/magic.h). An image begins with
// the common one and its own; the inventory with its own only.
const (
	magicCommon    uint32 = 0x54564319
	magicInventory uint32 = 0x58313116
	magicPstree    uint32 = 0x50273030
	magicIDs       uint32 = 0x54432030
	magicFiles     uint32 = 0x56303138
	magicFdinfo    uint32 = 0x56213732
	magicMM        uint32 = 0x57492820
	magicFS        uint32 = 0x51403912
	magicRemap     uint32 = 0x59133954
	magicSkQueues  uint32 = 0x56264026
	magicPagemap   uint32 = 0x56084025
	magicCore      uint32 = 0x55053847
)

// maxRecord bounds one record of an image, in bytes. The largest by far is
// the list of a task's mappings.
const maxRecord = 64 << 20

// records cuts an image into its records: each a 32-bit little-endian length
// and a protobuf message of that length. They share data's memory.
func records(data []byte, magic uint32) ([][]byte, error) {
	head := []uint32{magicCommon, magic}
	if magic == magicInventory {
		head = head[1:]
	}
	for _, want := range head {
		if len(data) < 4 {
			return nil, errors.New("it ends within its head: the image is truncated")
		}
		if got := binary.LittleEndian.Uint32(data); got != want {
			return nil, fmt.Errorf("it begins with the magic number %#x where %#x is expected: not an image, or one of an unknown form", got, want)
		}
		data = data[4:]
	}
	var out [][]byte
	for len(data) > 0 {
		if len(data) < 4 {
			return nil, fmt.Errorf("%d bytes are left over after record %d", len(data), len(out))
		}
		n := binary.LittleEndian.Uint32(data)
		data = data[4:]
		if n > maxRecord {
			return nil, fmt.Errorf("record %d claims %d bytes, more than the %d that are possible", len(out)+1, n, maxRecord)
		}
		if uint64(n) > uint64(len(data)) {
			return nil, fmt.Errorf("record %d should have %d bytes and %d are left: the image is truncated", len(out)+1, n, len(data))
		}
		out = append(out, data[:n:n])
		data = data[n:]
	}
	return out, nil
}

// assemble is the reverse of records.
func assemble(recs [][]byte, magic uint32) []byte {
	size := 8
	for _, r := range recs {
		size += 4 + len(r)
	}
	data := make([]byte, 0, size)
	data = binary.LittleEndian.AppendUint32(data, magicCommon)
	data = binary.LittleEndian.AppendUint32(data, magic)
	for _, r := range recs {
		data = binary.LittleEndian.AppendUint32(data, uint32(len(r)))
		data = append(data, r...)
	}
	return data
}

// records reads an image. CRIU does not create an image that would be empty:
// a missing one has no records, and found is false.
func (f *folder) records(name string, magic uint32) (recs [][]byte, found bool, err error) {
	data, err := f.read(name, maxImage)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	recs, err = records(data, magic)
	if err != nil {
		return nil, true, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	return recs, true, nil
}

// one reads an image of exactly one record.
func (f *folder) one(name string, magic uint32, m pb.Message) (found bool, err error) {
	recs, found, err := f.records(name, magic)
	if err != nil || !found {
		return found, err
	}
	if len(recs) != 1 {
		return true, fmt.Errorf("read %s: it has %d records where one is expected", f.path(name), len(recs))
	}
	if err := pb.Unmarshal(recs[0], m); err != nil {
		return true, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	return true, nil
}

// each reads an image of any number of records.
func each[M pb.Message](f *folder, name string, magic uint32, fresh func() M, use func(raw []byte, m M) error) (found bool, err error) {
	recs, found, err := f.records(name, magic)
	if err != nil {
		return found, err
	}
	for i, r := range recs {
		m := fresh()
		if err := pb.Unmarshal(r, m); err != nil {
			return found, fmt.Errorf("read %s: record %d: %w", f.path(name), i+1, err)
		}
		if err := use(r, m); err != nil {
			return found, fmt.Errorf("read %s: record %d: %w", f.path(name), i+1, err)
		}
	}
	return found, nil
}
