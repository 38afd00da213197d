// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	pb "google.golang.org/protobuf/proto"

	"criuhook/proto"
)

const (
	// RecordName is the file with the record, beside CRIU's images.
	RecordName = "criuhook.img"
	// PlanName is the file with the plan of a dump that is under way.
	PlanName = "criuhook.plan"

	recordMagic   = "CRIUHOOK"
	recordVersion = 1
	// maxPayload bounds the payload of a record, in bytes.
	maxPayload = 16 << 20
	headLen    = len(recordMagic) + 4 + 4 + sha256.Size
)

// What can be wrong with a record; for errors.Is.
var (
	// ErrNoRecord: the images were not made by criuhook.
	ErrNoRecord = errors.New("there is no record of criuhook")
	// ErrUnfinished: a dump by criuhook began and did not come to its end.
	ErrUnfinished = errors.New("the dump was never finished")
	// ErrDamaged: the record is not what criuhook wrote.
	ErrDamaged = errors.New("the record is damaged")
	// ErrNewer: a newer criuhook wrote the record.
	ErrNewer = errors.New("the record is from a newer criuhook")
)

// ReadRecord reads criuhook.img. Its errors tell apart ErrNoRecord,
// ErrUnfinished (no record, but a plan), ErrDamaged and ErrNewer.
func ReadRecord(dir string) (*proto.Record, error) {
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer f.close()
	rec, err := readForm(f, RecordName)
	if err == nil || !errors.Is(err, ErrNoRecord) {
		return rec, err
	}
	if _, serr := f.root.Lstat(PlanName); serr == nil {
		return nil, fmt.Errorf("%s: %w: there is %s, but no %s; dump again, or, if plain CRIU made these images since, remove %s",
			f.dir, ErrUnfinished, PlanName, RecordName, PlanName)
	}
	return nil, err
}

// ReadPlan reads criuhook.plan; the errors are those of ReadRecord.
func ReadPlan(dir string) (*proto.Record, error) {
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer f.close()
	return readForm(f, PlanName)
}

// WritePlan writes criuhook.plan in one step, with mode 0600, unless ctx has
// ended before.
func WritePlan(ctx context.Context, dir string, rec *proto.Record) error {
	f, err := changeFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	return writeForm(f, PlanName, rec)
}

// Commit writes criuhook.img in one step, with mode 0600, and removes the
// plan, unless ctx has ended before. It is the last step of a dump.
func Commit(ctx context.Context, dir string, rec *proto.Record) error {
	f, err := changeFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	if err := writeForm(f, RecordName, rec); err != nil {
		return err
	}
	if err := f.remove(PlanName); err != nil {
		return err
	}
	return f.sync()
}

// RemoveStale removes what an earlier dump left: record, plan and temporary
// files. It is the first step of a dump. Once ctx has ended, nothing is removed
// any more.
func RemoveStale(ctx context.Context, dir string) error {
	f, err := changeFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	names, err := f.names()
	if err != nil {
		return err
	}
	removed := false
	for _, n := range names {
		if n != RecordName && n != PlanName && !strings.HasPrefix(n, tempPrefix) {
			continue
		}
		if err := f.remove(n); err != nil {
			return err
		}
		removed = true
	}
	if !removed {
		return nil
	}
	return f.sync()
}

func readForm(f *folder, name string) (*proto.Record, error) {
	data, err := f.read(name, int64(headLen+maxPayload))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", f.path(name), ErrNoRecord)
	}
	if err != nil {
		return nil, err
	}
	rec, err := decodeRecord(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.path(name), err)
	}
	return rec, nil
}

func writeForm(f *folder, name string, rec *proto.Record) error {
	data, err := encodeRecord(rec)
	if err != nil {
		return fmt.Errorf("write %s: %w", f.path(name), err)
	}
	// A leftover's mode and owner must not live on in the new file.
	if err := f.remove(name); err != nil {
		return err
	}
	return f.replace([]write{{name, data}})
}

// encodeRecord gives the form of criuhook.img: magic, version, length,
// SHA-256 of the payload, payload; numbers are 32-bit little-endian.
func encodeRecord(rec *proto.Record) ([]byte, error) {
	if err := validate(rec); err != nil {
		return nil, fmt.Errorf("the record is not valid: %w", err)
	}
	payload, err := pb.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode the record: %w", err)
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("the record has %d bytes, more than the %d it may have", len(payload), maxPayload)
	}
	sum := sha256.Sum256(payload)
	data := make([]byte, 0, headLen+len(payload))
	data = append(data, recordMagic...)
	data = binary.LittleEndian.AppendUint32(data, recordVersion)
	data = binary.LittleEndian.AppendUint32(data, uint32(len(payload)))
	data = append(data, sum[:]...)
	return append(data, payload...), nil
}

func decodeRecord(data []byte) (*proto.Record, error) {
	damaged := func(what string) error {
		return fmt.Errorf("%w: %s; take the file from the original images, or dump again", ErrDamaged, what)
	}
	rest, ok := bytes.CutPrefix(data, []byte(recordMagic))
	if !ok {
		return nil, damaged("it does not begin as a record does")
	}
	if len(rest) < 4 {
		return nil, damaged("it ends within its head")
	}
	// The version comes first: all after it may differ in a newer form.
	if v := binary.LittleEndian.Uint32(rest); v != recordVersion {
		if v > recordVersion {
			return nil, fmt.Errorf("%w: its version is %d, this criuhook knows %d; restore with a criuhook at least as new as the one that dumped", ErrNewer, v, recordVersion)
		}
		return nil, damaged(fmt.Sprintf("there is no version %d", v))
	}
	if len(data) < headLen {
		return nil, damaged("it ends within its head")
	}
	n := binary.LittleEndian.Uint32(rest[4:])
	payload := data[headLen:]
	if uint64(n) != uint64(len(payload)) {
		return nil, damaged(fmt.Sprintf("it has %d bytes where it should have %d", len(payload), n))
	}
	if sum := sha256.Sum256(payload); !bytes.Equal(sum[:], rest[8:8+sha256.Size]) {
		return nil, damaged("its checksum is wrong")
	}
	rec := &proto.Record{}
	if err := pb.Unmarshal(payload, rec); err != nil {
		return nil, damaged(err.Error())
	}
	if err := validate(rec); err != nil {
		return nil, damaged(err.Error())
	}
	return rec, nil
}
