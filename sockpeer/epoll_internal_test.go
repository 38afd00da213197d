// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestParseEpoll(t *testing.T) {
	text := "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1057\n" +
		"tfd:        5 events:       1d data:                5  pos:0 ino:3f1c sdev:8\n" +
		"tfd:        6 events: 80000004 data:     ffffffffff  pos:0 ino:3f1d sdev:8\n" + // output, edge-triggered
		"tfd:        7 events: 40000000 data:                7  pos:0 ino:3f1e sdev:8\n" + // EPOLLONESHOT that has shot
		"tfd:       10 events:        1 data:               10\n" + // an old kernel
		"tfd: x events: 1\ntfd: 11 events: zz\ntfd: 12\ntfd:\n"
	own, got := parseEpoll(strings.NewReader(text))
	want := []watch{{5, 0x3f1c, 8, true}, {6, 0x3f1d, 8, true}, {fd: 10}}
	if own != 1057 || !slices.Equal(got, want) {
		t.Errorf("%d, %+v", own, got)
	}
}

func TestResolve(t *testing.T) {
	const sock, other, own = 0x3f1c, 0xbeef, 1057
	dev := sockfs()
	table := newWaitTable(fdTable{
		sockets: map[int]uint32{50: sock, 51: sock, 6: other},
		anon:    map[int]bool{20: true, 21: true, 22: false},
	}, map[uint32]bool{sock: true, 77: true})
	for what, c := range map[string]struct {
		watches []watch
		sockets map[uint32]int
		epolls  []int
	}{
		"its own number":      {[]watch{{51, sock, dev, true}}, map[uint32]int{sock: 51}, nil},
		"number closed":       {[]watch{{5, sock, dev, true}}, map[uint32]int{sock: 50}, nil},
		"number used again":   {[]watch{{6, sock, dev, true}}, map[uint32]int{sock: 50}, nil},
		"another process'":    {[]watch{{9, 77, dev, true}}, map[uint32]int{77: 9}, nil},
		"another file":        {[]watch{{50, other, dev, true}}, nil, nil},
		"another device":      {[]watch{{5, sock, dev + 1, true}}, nil, nil},
		"old kernel":          {[]watch{{fd: 51}, {fd: 21}}, map[uint32]int{sock: 51}, []int{21}},
		"nested":              {[]watch{{21, own, dev + 1, true}}, nil, []int{21}},
		"not nested any more": {[]watch{{21, 99, dev + 1, true}}, nil, nil},
		"an eventfd":          {[]watch{{22, own, dev + 1, true}}, nil, nil},
		"lost":                {[]watch{{30, own, dev + 1, true}}, nil, []int{20, 21}},
	} {
		got := table.resolve(own, c.watches)
		slices.Sort(got.epolls)
		if !maps.Equal(got.sockets, c.sockets) || !slices.Equal(got.epolls, c.epolls) {
			t.Errorf("%s: %+v", what, got)
		}
	}
}

// TestReachCycle: whatever /proc says, an end is found.
func TestReachCycle(t *testing.T) {
	table := newWaitTable(fdTable{anon: map[int]bool{}, sockets: map[int]uint32{1: 7}}, map[uint32]bool{7: true})
	const many = 1000
	for fd := range many {
		table.anon[100+fd] = true
		var all []int
		for i := range many {
			all = append(all, 100+i)
		}
		table.read[100+fd] = watched{epolls: all}
	}
	table.read[100+many-1] = watched{sockets: map[uint32]int{7: 1}, epolls: []int{100}}
	if got := table.reach([]int{100}); !maps.Equal(got, map[uint32]int{7: 1}) {
		t.Error(got)
	}
}

func TestIs32(t *testing.T) {
	aux := func(words ...any) (b []byte) {
		for _, w := range words {
			var err error
			if b, err = binary.Append(b, binary.NativeEndian, w); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	type w = uint32
	type l = uint64
	for _, c := range []struct {
		auxv []byte
		want bool
	}{
		{aux(l(33), l(0x7ffd00000000), l(16), l(0xbfebfbff), l(6), l(4096), l(0), l(0)), false},
		{aux(l(6), l(1<<40), l(0), l(0), l(1<<40), l(0)), false}, // nothing counts after AT_NULL
		{aux(w(32), w(0xf7f00000), w(33), w(0xf7f00000), w(16), w(1), w(6), w(4096), w(0), w(0)), true},
		{aux(w(33), w(0), w(16), w(1), w(6), w(4096), w(17), w(100), w(0), w(0)), true}, // without a vDSO
		{nil, false},
		{[]byte{1, 2, 3}, false},
	} {
		if got := is32(c.auxv); got != c.want {
			t.Errorf("%s: %v", fmt.Sprint(c.auxv), got)
		}
	}
}
