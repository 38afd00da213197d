// SPDX-License-Identifier: Apache-2.0

package dump

import (
	"slices"
	"strings"
	"testing"
)

func TestGhostLimit(t *testing.T) {
	for _, c := range []struct {
		args string
		want int64
		rpc  bool
	}{
		{"criu dump -t 1", 1 << 20, false},
		{"criu dump --ghost-limit 16M", 16 << 20, false},
		{"criu dump --ghost-limit=2048K -t 1", 2 << 20, false},
		{"criu dump --ghost-limit 1G --ghost-limit 4096", 4096, false},
		{"criu dump --ghost-l 3M", 3 << 20, false},
		{"criu dump --ghost-fiemap", 1 << 20, false},
		{"criu dump --ghost-limit", 0, false},
		{"criu dump --ghost-limit much", 0, false},
		{"criu dump --ghost-limit 99999999999G", 1 << 62, false},
		{"criu dump -- --", 1 << 20, false},
		{"criu --ghost-limit 5M swrk 3", 5 << 20, true},
		{"criu service", 1 << 20, true},
	} {
		limit, rpc := GhostLimit(strings.Fields(c.args))
		if limit != c.want || rpc != c.rpc {
			t.Errorf("%q: %d, %v; expected %d, %v", c.args, limit, rpc, c.want, c.rpc)
		}
	}
}

func TestUnlinkedMaps(t *testing.T) {
	const maps = `55d0c8a00000-55d0c8a01000 r--p 00000000 fe:01 131 /usr/bin/lookup
7f3c00000000-7f3c00021000 rw-p 00000000 00:00 0
7f3c0a000000-7f3c0a8d3000 r--s 00000000 00:2b 77 /var/lib/sss/mc/passwd (deleted)
7f3c0b000000-7f3c0b8d3000 r--s 00000000 00:2b 78 /var/lib/sss/mc/group
00400000-00435000 r--s 00000000 00:2b 79                         /run/nscd/dbAbCd12 (deleted)
7f3c0d000000-7f3c0d001000 rw-s 00000000 00:01 80 /memfd:x (deleted)
7f3c0e000000-7f3c0e001000 rw-s 00000000 00:2b 81 /tmp/passwd (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
`
	got := unlinkedMaps(strings.NewReader(maps))
	want := []unlinkedMap{
		{"7f3c0a000000-7f3c0a8d3000", "/var/lib/sss/mc/passwd"},
		{"400000-435000", "/run/nscd/dbAbCd12"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, expected %+v", got, want)
	}
}
