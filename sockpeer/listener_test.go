// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"criuhook/sockpeer"
)

func TestFindListener(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir) // a name relative to it is short enough
	bind := func(network, name string) {
		t.Helper()
		addr := &net.UnixAddr{Name: name, Net: network}
		if network == "unixgram" {
			c, err := net.ListenUnixgram(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return
		}
		l, err := net.ListenUnix(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	bind("unix", "stream")
	bind("unixgram", "dgram")
	abstract := "criuhook-test-" + filepath.Base(filepath.Dir(dir))
	bind("unix", "\x00"+abstract)
	if err := os.WriteFile("file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("stream", "link"); err != nil {
		t.Fatal(err)
	}
	gone, err := net.ListenUnix("unix", &net.UnixAddr{Name: "stale", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	gone.SetUnlinkOnClose(false)
	gone.Close()

	all, err := sockpeer.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) sockpeer.Name { return sockpeer.Name(filepath.Join(dir, name)) }
	for _, tt := range []struct {
		name          string
		to            sockpeer.Name
		typ           sockpeer.Type
		found, exists bool
	}{
		{"stream", path("stream"), sockpeer.Stream, true, true},
		{"through a link", path("link"), sockpeer.Stream, true, true},
		{"datagram", path("dgram"), sockpeer.Dgram, true, true},
		{"another type", path("dgram"), sockpeer.Stream, false, true},
		{"abstract", sockpeer.Name("\x00" + abstract), sockpeer.Stream, true, true},
		{"no abstract", sockpeer.Name("\x00" + abstract + "-not"), sockpeer.Stream, false, false},
		{"nothing", path("nothing"), sockpeer.Stream, false, false},
		{"below a file", path("file/s"), sockpeer.Stream, false, false},
		{"a file", path("file"), sockpeer.Stream, false, true},
		{"nobody", path("stale"), sockpeer.Stream, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, exists, err := sockpeer.FindListener(all, tt.to, tt.typ)
			if err != nil || (l != nil) != tt.found || exists != tt.exists {
				t.Fatalf("got %+v, %v, %v", l, exists, err)
			}
			if l != nil && (l.UID != int64(os.Geteuid()) || l.Type != tt.typ || l.Inode == 0) {
				t.Errorf("got %+v", l)
			}
		})
	}
}
