// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const statusText = "Name:\tsssd_nss: x\\n\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4242\nPid:\t4242\nPPid:\t1\nTracerPid:\t0\n" +
	"Uid:\t1000\t1001\t1002\t1003\nGid:\t2000\t2001\t2002\t2003\nFDSize:\t64\nGroups:\t4 24 4294967294 \n" +
	"NSpid:\t4242\t17\t1\nCapInh:\t0000000000000000\nCapPrm:\t000001ffffffffff\nCapEff:\t00000000a80425fb\nSeccomp:\t0\n"

func TestParseStatus(t *testing.T) {
	got, err := parseStatus(strings.NewReader(statusText))
	if err != nil {
		t.Fatal(err)
	}
	want := Process{Comm: `sssd_nss: x\n`, NSPID: []int{4242, 17, 1}, Identity: Identity{
		UID: 1001, GID: 2001, Groups: []uint32{4, 24, 4294967294}, CapEff: 0xa80425fb}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	// The most a task can be in.
	many := strings.Replace(statusText, "Groups:\t", "Groups:\t"+strings.Repeat("4294967294 ", 65533), 1)
	if got, err := parseStatus(strings.NewReader(many)); err != nil || len(got.Identity.Groups) != 65536 {
		t.Errorf("%d groups, %v", len(got.Identity.Groups), err)
	}
	for _, bad := range []struct{ old, new string }{
		{"Uid:\t1000\t1001", "Uid:\t1000\t-1"},
		{"Uid:\t1000\t1001\t1002\t1003", "Uid:\t1000"},
		{"Gid:\t2000\t2001", "Gid:\t2000\t4294967296"},
		{"24 ", "x "},
		{"\t17\t", "\t?\t"},
		{"a80425fb", "a80425fz"},
		{"Groups:", "Gruppen:"},
		{"CapEff:", "CapXXX:"},
	} {
		if got, err := parseStatus(strings.NewReader(strings.Replace(statusText, bad.old, bad.new, 1))); err == nil {
			t.Errorf("%q instead of %q: %+v", bad.new, bad.old, got)
		}
	}
}

func TestParseStatPPID(t *testing.T) {
	for in, want := range map[string]int{
		"1 (init) S 0 1 1":                 0,
		"42 (a) S (b) 7) R 99 42 42 0":     99,
		"42 (new\nline) S 41 42":           41,
		"42 (tail) S":                      -1,
		"42 no name S 1":                   -1,
		"42 (x) S notanumber":              -1,
		"":                                 -1,
		"3 (kworker/0:0H-kb) I 2 0 0 0 -1": 2,
	} {
		got, ok := parseStatPPID(in)
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, ok, want)
		}
	}
}

func TestBelow(t *testing.T) {
	up := map[int]int{1: 0, 2: 1, 3: 2, 10: 11, 11: 10, 20: 99}
	for _, c := range []struct {
		pid, root int
		want      bool
	}{{3, 1, true}, {3, 3, true}, {1, 3, false}, {2, 3, false}, {10, 1, false}, {10, 11, true}, {20, 1, false}} {
		if got := below(up, c.pid, c.root); got != c.want {
			t.Errorf("below(%d, %d) = %v", c.pid, c.root, got)
		}
	}
}

func TestParseSyscall(t *testing.T) {
	nr, args, ok := parseSyscall("7 0x7ffd0 0x1 0xffffffffffffffff 0x0 0x8 0x0 0x7ffdc 0x7f2c\n")
	if !ok || nr != 7 || args != [6]uint64{0x7ffd0, 1, ^uint64(0), 0, 8, 0} {
		t.Error(nr, args, ok)
	}
	for _, bad := range []string{"running\n", "-1 0x7ffdc 0x7f2c\n", "-1 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0", "", "0 0x3 0x1",
		"0 0x3 0xzz 0x1 0x0 0x0 0x0 0x0 0x0", "read 0x3 0x1 0x1 0x0 0x0 0x0 0x0 0x0"} {
		if nr, _, ok := parseSyscall(bad); ok {
			t.Errorf("%q: %d", bad, nr)
		}
	}
}

func TestPollFDs(t *testing.T) {
	var b []byte
	for _, p := range []struct {
		fd     int32
		events uint16
	}{{3, 1}, {-1, 1}, {4, 0}, {5, 4}, {6, 0x8000}} {
		b = binary.NativeEndian.AppendUint32(b, uint32(p.fd))
		b = binary.NativeEndian.AppendUint16(b, p.events)
		b = append(b, 0xff, 0xff)
	}
	if got := pollFDs(append(b, 7, 0, 0, 0, 1, 0, 0)); !slices.Equal(got, []int{3, 5}) {
		t.Error(got)
	}
}

func TestParseSocketLink(t *testing.T) {
	for in, want := range map[string]uint32{"socket:[4294967295]": 4294967295, "socket:[7]": 7} {
		if got, ok := parseSocketLink(in); !ok || got != want {
			t.Errorf("%q: %d, %v", in, got, ok)
		}
	}
	for _, bad := range []string{"pipe:[7]", "socket:[x]", "socket:[4294967296]", "/socket:[1]", "socket:[]", ""} {
		if got, ok := parseSocketLink(bad); ok {
			t.Errorf("%q: %d", bad, got)
		}
	}
}

func TestParseFdinfoFlags(t *testing.T) {
	if got, err := parseFdinfoFlags(strings.NewReader("pos:\t0\nflags:\t02004002\nmnt_id:\t9\n")); err != nil || got != 0o2004002 {
		t.Errorf("%o, %v", got, err)
	}
	for _, bad := range []string{"", "pos:\t0\n", "flags:\t9\n", "flags:\n"} {
		if got, err := parseFdinfoFlags(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %d", bad, got)
		}
	}
}

// captured is an answer of Linux 6.18 for one socket, without its header.
func captured(t testing.TB, name string) []byte {
	b, err := os.ReadFile(filepath.Join("testdata/diag", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseDiag(t *testing.T) {
	file := VFS{Dev: 266338304, Inode: 10019763}
	for name, want := range map[string]diagSocket{
		"listener":       {inode: 752839, typ: Stream, state: Listening, name: "/tmp/cap/s", vfs: file, icons: []uint32{752841}, rqueue: 1, wqueue: 5},
		"connected":      {inode: 752840, typ: Stream, state: Established, peer: 752842, wqueue: 768, shutdown: 1},
		"unaccepted":     {inode: 752841, typ: Stream, state: Established},
		"accepted":       {inode: 752842, typ: Stream, state: Established, name: "/tmp/cap/s", vfs: file, peer: 752840, rqueue: 5, shutdown: 2},
		"abstract-dgram": {inode: 752843, typ: Dgram, state: Closed, name: "\x00abs\x00\xff name"},
	} {
		b := captured(t, name)
		if got, err := parseDiag(b); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n%+v, want\n%+v", name, err, got, want)
		}
		// Before Linux 5.3 there is no uid, the last attribute but one.
		for n := range len(b) {
			parseDiag(b[:n]) // cut anywhere: no panic
		}
	}
	for _, bad := range [][]byte{nil, make([]byte, 15), append([]byte{2}, make([]byte, 15)...)} {
		if got, err := parseDiag(bad); err == nil {
			t.Errorf("%v: %+v", bad, got)
		}
	}
	b := captured(t, "connected")
	b[unixDiagMsgLen] = 3 // shorter than its own header
	if _, err := parseDiag(b); err == nil {
		t.Error("a malformed attribute is accepted")
	}
	if got, err := parseDiag(captured(t, "connected")[:unixDiagMsgLen]); err != nil || got.uid != -1 || got.peer != 0 {
		t.Errorf("no attributes: %+v, %v", got, err)
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct {
		raw, pattern, shown string
		abstract            bool
	}{
		{"/run/x.sock", "/run/x.sock", "/run/x.sock", false},
		{"/run/x.sock\x00\x00junk", "/run/x.sock", "/run/x.sock", false},
		{"/a \"b\"\n\\", "/a \"b\"\n\\", `/a "b"\n\\`, false},
		{"/\x80\xff ", "/\x80\xff ", `/\x80\xff `, false},
		{"/caf\u00e9\u202e", "/caf\u00e9\u202e", `/caf\u00e9\u202e`, false},
		{"/\x1b[31m", "/\x1b[31m", `/\x1b[31m`, false},
		{"\x00dbus", "@dbus", "@dbus", true},
		{"\x00a\x00b\x00", "@a\x00b\x00", `@a\x00b\x00`, true},
		{"\x00", "@", "@", true},
		{"@real", "@real", "@real", false},
		{"", "", "", false},
	} {
		n := cleanName([]byte(c.raw))
		text, err := n.MarshalText()
		if n.Pattern() != c.pattern || n.String() != c.shown || n.Abstract() != c.abstract || string(text) != c.shown || err != nil {
			t.Errorf("%q: %q, %q, %v, %q, %v", c.raw, n.Pattern(), n.String(), n.Abstract(), text, err)
		}
		sa := append(binary.NativeEndian.AppendUint16(nil, 1), c.raw...)
		if got := nameFromSockaddr(sa); got != n {
			t.Errorf("as an address: %q, want %q", got, n)
		}
	}
	for _, sa := range [][]byte{nil, {1}, {1, 0}, {2, 0, 'x'}} {
		if n := nameFromSockaddr(sa); n != "" {
			t.Errorf("%v: %q", sa, n)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	for _, name := range []string{"listener", "connected", "unaccepted", "accepted", "abstract-dgram"} {
		f.Add(captured(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		s, err := parseDiag(b)
		if !bytes.Equal(b, before) {
			t.Error("changed what it read")
		}
		if err != nil {
			return
		}
		if len(s.icons)*4 > len(b) || len(s.name) > len(b) {
			t.Errorf("%+v of %d bytes", s, len(b))
		}
		if !s.name.Abstract() && strings.Contains(string(s.name), "\x00") {
			t.Errorf("path %q", s.name)
		}
	})
}

func FuzzParseProc(f *testing.F) {
	f.Add(statusText)
	f.Add("42 (a) b) S 7 1 1")
	f.Add("7 0x7ffd0 0x1 0xffffffffffffffff 0x0 0x8 0x0 0x7ffdc 0x7f2c\n")
	f.Add("tfd:        5 events:       1d data:                5  pos:0 ino:3f1c sdev:8\n")
	f.Fuzz(func(t *testing.T, s string) {
		parseStatus(strings.NewReader(s))
		parseStatPPID(s)
		parseSyscall(s)
		parseEpoll(strings.NewReader(s))
		is32([]byte(s))
		parseFdinfoFlags(strings.NewReader(s))
		parseSocketLink(s)
		for _, fd := range pollFDs([]byte(s)) {
			if fd < 0 {
				t.Error(fd)
			}
		}
	})
}
