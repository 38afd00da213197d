// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// TestScanElsewhere: what the peer's name means to who holds the connection.
func TestScanElsewhere(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name string
		// how the client's root differs; "": not at all.
		how string
		// there is what is at the name below the client's root; anew: the
		// daemon has made its socket file anew.
		there string
		anew  bool
		want  bool
	}{
		{name: "same root"},
		{name: "same root, made anew", anew: true},
		{name: "chroot, nothing there", how: "chroot"},
		{name: "chroot, a file there", how: "chroot", there: "file"},
		{name: "chroot, the same socket there", how: "chroot", there: "same"},
		{name: "chroot, another socket there", how: "chroot", there: "other", want: true},
		{name: "chroot, another socket there, made anew", how: "chroot", there: "other", anew: true, want: true},
		{name: "chroot, made anew in both", how: "chroot", there: "same", anew: true},
		{name: "mount, nothing there", how: "mount"},
		{name: "mount, the same socket there", how: "mount", there: "same"},
		{name: "mount, another socket there", how: "mount", there: "other", want: true},
		{name: "mount, another socket behind a link", how: "mount", there: "link", want: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			noLeak(t)
			dir, root := t.TempDir(), t.TempDir()
			name := sockpeer.Name(filepath.Join(dir, "s"))
			l := listener(t, sockpeer.Stream, name)
			fd := connected(t, sockpeer.Stream, name)
			accept(t, l)
			if tt.anew {
				check(t, os.Remove(string(name)))
				listener(t, sockpeer.Stream, name)
			}
			act := "hold"
			if tt.how != "" {
				act = "moved " + tt.how + " " + root + " " + dir
			}
			inside := filepath.Join(root, "s")
			if tt.how == "chroot" {
				inside = filepath.Join(root, string(name))
				check(t, os.MkdirAll(filepath.Dir(inside), 0o755))
			}
			switch tt.there {
			case "file":
				check(t, os.WriteFile(inside, nil, 0o644))
			case "same":
				check(t, os.Link(string(name), inside))
			case "other":
				listenAt(t, inside)
			case "link":
				listenAt(t, filepath.Join(root, "t"))
				check(t, os.Symlink(filepath.Join(dir, "t"), inside))
			}
			p := given(t, act, fd)
			if c := only(t, p.pid); c.Peer.Elsewhere != tt.want || c.Peer.Name != name {
				t.Errorf("%+v", c.Peer)
			}
		})
	}
}

// TestScanElsewhereUnknownPeer: nobody is seen to hold the peer's half.
func TestScanElsewhereUnknownPeer(t *testing.T) {
	needRoot(t)
	for what, want := range map[string]bool{"same": false, "other": true} {
		t.Run(what, func(t *testing.T) {
			noLeak(t)
			name := sockpeer.Name(filepath.Join(t.TempDir(), "s"))
			l := listener(t, sockpeer.Stream, name)
			// The peer's half is on its way in a message: no fd table has it.
			fd := connected(t, sockpeer.Stream, name)
			theirs, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			check(t, err)
			x, y := pair(t, sockpeer.Stream)
			closing(t, x, y)
			check(t, unix.Sendmsg(x, []byte{0}, unix.UnixRights(theirs), nil, 0))
			check(t, unix.Close(theirs))
			if want {
				check(t, os.Remove(string(name)))
				listener(t, sockpeer.Stream, name)
			}
			p := given(t, "hold", fd)
			if c := only(t, p.pid); c.Peer.Elsewhere != want || c.Peer.Exe != "" {
				t.Errorf("%+v", c.Peer)
			}
		})
	}
}

// listenAt is listener for paths too long to bind to.
func listenAt(t *testing.T, path string) {
	t.Helper()
	dir, err := os.Open(filepath.Dir(path))
	check(t, err)
	defer dir.Close()
	listener(t, sockpeer.Stream, sockpeer.Name(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))))
}

// TestScanElsewhereHangs: a file system that does not answer, as one whose
// server is frozen with the tree, does not hold a scan.
func TestScanElsewhereHangs(t *testing.T) {
	needRoot(t)
	noLeak(t)
	// Not /dev/fuse, which a container's /dev lacks.
	device := filepath.Join(t.TempDir(), "fuse")
	check(t, unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229)))) // admin-guide/devices.txt
	fuse, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("no FUSE here: ", err)
	}
	dir := t.TempDir()
	healthy := filepath.Join(t.TempDir(), "d")
	var conns []int
	for _, name := range []string{filepath.Join(dir, "a"), filepath.Join(dir, "b"), healthy} {
		l := listener(t, sockpeer.Stream, sockpeer.Name(name))
		conns = append(conns, connected(t, sockpeer.Stream, sockpeer.Name(name)))
		accept(t, l)
	}
	p := given(t, "hold", conns...)
	err = unix.Mount("sockpeer", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse))
	if err != nil {
		unix.Close(fuse)
		t.Skip("cannot mount FUSE here: ", err)
	}
	// Nobody serves it: whoever looks a name up waits for ever.
	type result struct {
		snap *sockpeer.Snapshot
		err  error
	}
	done := make(chan result, 1)
	go func() {
		s, err := sockpeer.Scan(p.pid)
		done <- result{s, err}
	}()
	var r result
	select {
	case r = <-done:
	case <-time.After(patience):
		t.Error("the scan waits for the file system")
	}
	check(t, unix.Close(fuse)) // whoever waits gets an error
	check(t, unix.Unmount(dir, unix.MNT_DETACH))
	if r.snap == nil {
		t.Fatal(r.err)
	}
	for _, c := range r.snap.Connections {
		// One that does not answer must not hide the others.
		if want := string(c.Peer.Name) != healthy; c.Peer.Elsewhere != want || c.Peer.PID != os.Getpid() {
			t.Errorf("elsewhere is to be %v: %+v", want, c)
		}
	}
	if len(r.snap.Connections) != len(conns) {
		t.Errorf("%d connections, want %d", len(r.snap.Connections), len(conns))
	}
}
