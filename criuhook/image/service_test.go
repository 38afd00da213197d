// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

// TestMarkService: the socket becomes one of CRIU's service, its peer's pseudo
// entry goes, and the rest stays as it is.
func TestMarkService(t *testing.T) {
	im := &images{}
	im.sock(1, 100, 5, 1, 200, 0, "")
	im.sock(2, 200, 5, 10, 0, 1, "/run/criuhook/criu.sock")
	im.sock(3, 101, 1, 1, 201, 0, "")
	im.sock(4, 201, 2, 10, 0, 1, "/run/d")
	for i, id := range []uint32{1, 3} {
		im.fd(uint32(4+i), id, fdinfo.FdTypes_UNIXSK)
	}
	dir := im.write(t)
	before := content(t, dir)
	if err := image.MarkService(t.Context(), dir, nil); err != nil {
		t.Error(err)
	}
	if err := image.MarkService(t.Context(), dir, []uint32{100, 77}); err == nil || !strings.Contains(err.Error(), "socket 77") {
		t.Errorf("a socket that is not there: %v", err)
	}
	unchanged(t, dir, before)

	if err := image.MarkService(t.Context(), dir, []uint32{100}); err != nil {
		t.Fatal(err)
	}
	set, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	socks := set.Sockets()
	if len(socks) != 2 || !socks[0].Dormant() || socks[1].Peer != 201 {
		t.Errorf("%+v", socks)
	}
	if strings.Contains(content(t, dir)["files.img"], "criu.sock") {
		t.Error("the peer is still there")
	}
	// The mark is what Normalize leaves alone, and refuses to give another form.
	rec := record(connection(101, 201, 1, proto.Action_ACTION_HANGUP))
	if err := image.Normalize(t.Context(), dir, rec); err != nil {
		t.Error(err)
	}
	rec = record(connection(100, 200, 5, proto.Action_ACTION_HANGUP))
	if err := image.Normalize(t.Context(), dir, rec); err == nil || !strings.Contains(err.Error(), "flags 0x2") {
		t.Errorf("the mark: %v", err)
	}
}
