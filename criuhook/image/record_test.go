// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	pb "google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

// recordsOf cuts an image as CRIU does.
func recordsOf(t *testing.T, dir, name string) [][]byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for b = b[8:]; len(b) > 0; {
		n := binary.LittleEndian.Uint32(b)
		out = append(out, b[4:4+n])
		b = b[4+n:]
	}
	return out
}

func TestRecordLifecycle(t *testing.T) {
	dir := t.TempDir()
	old := syscall.Umask(0o777)
	defer syscall.Umask(old)
	rec := record(connection(100, 200, 1, proto.Action_ACTION_RECONNECT))
	if _, err := image.ReadRecord(dir); !errors.Is(err, image.ErrNoRecord) {
		t.Fatalf("empty: %v", err)
	}
	if err := image.WritePlan(t.Context(), dir, rec); err != nil {
		t.Fatal(err)
	}
	if _, err := image.ReadRecord(dir); !errors.Is(err, image.ErrUnfinished) {
		t.Fatalf("plan only: %v", err)
	}
	if got, err := image.ReadPlan(dir); err != nil || !pb.Equal(got, rec) {
		t.Fatalf("plan: %v %v", got, err)
	}
	for range 2 {
		if err := image.Commit(t.Context(), dir, rec); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := image.ReadRecord(dir); err != nil || !pb.Equal(got, rec) {
		t.Fatalf("record: %v %v", got, err)
	}
	if info, err := os.Stat(filepath.Join(dir, image.RecordName)); err != nil || info.Mode() != 0o600 {
		t.Fatalf("mode %v %v", info, err)
	}
	if es, _ := os.ReadDir(dir); len(es) != 1 {
		t.Fatalf("files: %v", es)
	}
	if err := os.WriteFile(filepath.Join(dir, ".criuhook-tmp-X"), nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := image.RemoveStale(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if es, _ := os.ReadDir(dir); len(es) != 0 {
		t.Fatalf("files: %v", es)
	}
}

func TestDamagedRecord(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, image.RecordName)
	if err := image.Commit(t.Context(), dir, record(connection(100, 200, 1, proto.Action_ACTION_HANGUP))); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	check := func(data []byte, want error) {
		t.Helper()
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := image.ReadRecord(dir); !errors.Is(err, want) {
			t.Errorf("error %v, want %v", err, want)
		}
	}
	for n := range good {
		check(good[:n], image.ErrDamaged)
	}
	check(append(good[:len(good):len(good)], 0), image.ErrDamaged)
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 0x40
		want := image.ErrDamaged
		if i >= 8 && i < 12 {
			want = image.ErrNewer
		}
		check(bad, want)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", name); err != nil {
		t.Fatal(err)
	}
	if _, err := image.ReadRecord(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("symlink: %v", err)
	}
}

func TestInvalidRecord(t *testing.T) {
	for name, change := range map[string]func(*proto.Connection){
		"inode":       func(c *proto.Connection) { c.Inode = 0 },
		"type":        func(c *proto.Connection) { c.Type = 3 },
		"action":      func(c *proto.Connection) { c.Action = 9 },
		"how missing": func(c *proto.Connection) { c.Reconnect = nil },
		"how unasked": func(c *proto.Connection) { c.Action = proto.Action_ACTION_HANGUP },
		"name":        func(c *proto.Connection) { c.Name = make([]byte, 109) },
		"to":          func(c *proto.Connection) { c.Reconnect.To = nil },
		"other to":    func(c *proto.Connection) { c.Reconnect.OrTo = make([]byte, 109) },
		"path":        func(c *proto.Connection) { c.Peer = &proto.Peer{Path: make([]byte, 109)} },
		"prelude":     func(c *proto.Connection) { c.Reconnect.Prelude = "x" },
		"timeout":     func(c *proto.Connection) { c.Reconnect.TimeoutNs = 600e9 + 1 },
		"uid":         func(c *proto.Connection) { c.Reconnect.ListenerUid = 1 << 32 },
		"holders":     func(c *proto.Connection) { c.Holders = nil },
		"groups":      func(c *proto.Connection) { c.Identity = &proto.Identity{Groups: make([]uint32, 65537)} },
	} {
		c := connection(100, 200, 1, proto.Action_ACTION_RECONNECT)
		change(c)
		if err := image.WritePlan(t.Context(), t.TempDir(), record(c)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDamagedImages(t *testing.T) {
	im := &images{}
	im.sock(1, 100, 1, 1, 200, 0, "")
	good := stream("FILES", list(im.files)...)
	for name, data := range map[string][]byte{
		"empty":           {},
		"other magic":     stream("MM"),
		"truncated":       good[:len(good)-1],
		"trailing":        append(good[:len(good):len(good)], 1, 2),
		"oversize":        append(good[:8:8], 0xff, 0xff, 0xff, 0xff),
		"not a message":   append(good[:8:8], 1, 0, 0, 0, 0xff),
		"fields missing":  append(good[:8:8], 0, 0, 0, 0),
		"half the magic":  good[:6],
		"no common magic": good[4:],
	} {
		t.Run(name, func(t *testing.T) {
			dir := im.write(t)
			if err := os.WriteFile(filepath.Join(dir, "files.img"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := image.Open(dir); err == nil || !strings.Contains(err.Error(), "files.img") {
				t.Errorf("error %v", err)
			}
		})
	}
	for _, missing := range []string{"files.img", "pstree.img", "inventory.img"} {
		dir := im.write(t)
		if err := os.Remove(filepath.Join(dir, missing)); err != nil {
			t.Fatal(err)
		}
		if _, err := image.Open(dir); err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
}

func TestMagicLink(t *testing.T) {
	dir := (&images{}).write(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	link := filepath.Join("/proc/self/fd", strconv.Itoa(int(d.Fd())))
	if _, err := image.Open(link); err != nil {
		t.Error(err)
	}
	if err := image.Commit(t.Context(), link, record()); err != nil {
		t.Error(err)
	}
}
