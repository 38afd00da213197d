// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

func init() { acts["bind"] = bindMount }

// bindMount shows what is at one path at another, and hides a directory behind
// a third, as a container does that sees a socket through a bind mount.
func bindMount(arg string) {
	f := strings.Split(arg, "|")
	err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(f[0], f[1], "", unix.MS_BIND, ""), unix.Mount(f[2], f[3], "", unix.MS_BIND, ""))
	if err != nil {
		panic(err)
	}
	readyUntilEOF()
}

// TestScanPath: the name by which a process reaches a daemon that is bound to
// one that leads nowhere, or elsewhere, in the process' mount namespace.
func TestScanPath(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name string
		// from is mounted at to, both below the test's directory; the daemon is
		// bound to daemon/run/s or, by way of a link, to link/s.
		from, to string
		link     bool
		// anew: the daemon makes its socket file anew, before or after the mount.
		anew  string
		other bool // another daemon is at the name
		want  string
	}{
		{name: "the socket file", from: "daemon/run/s", to: "inside/file", want: "inside/file"},
		{name: "its directory", from: "daemon/run", to: "inside/dir", want: "inside/dir/s"},
		{name: "a directory above", from: "daemon", to: "inside/dir", want: "inside/dir/run/s"},
		{name: "by way of a link", from: "daemon", to: "inside/dir", link: true, want: "inside/dir/run/s"},
		{name: "blanks", from: "daemon/run", to: `inside/a\ b`, want: `inside/a\ b/s`},
		{name: "another at the name", from: "daemon/run", to: "inside/dir", other: true, want: "inside/dir/s"},
		{name: "made anew", from: "daemon/run", to: "inside/dir", anew: "before", want: "inside/dir/s"},
		{name: "made anew, the file", from: "daemon/run/s", to: "inside/file", anew: "before", want: "inside/file"},
		{name: "made anew later", from: "daemon/run", to: "inside/dir", anew: "after", want: "inside/dir/s"},
		{name: "made anew later, the file", from: "daemon/run/s", to: "inside/file", anew: "after", want: "inside/file"},
		{name: "not there", from: "inside", to: "inside/dir", want: ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			noLeak(t)
			dir := t.TempDir()
			in := func(name string) string { return filepath.Join(dir, name) }
			for _, d := range []string{"daemon/run", "inside/dir", `inside/a\ b`, "empty/run"} {
				check(t, os.MkdirAll(in(d), 0o755))
			}
			check(t, os.WriteFile(in("inside/file"), nil, 0o644))
			check(t, os.Symlink("daemon/run", in("link")))
			name := sockpeer.Name(in("daemon/run/s"))
			if tt.link {
				name = sockpeer.Name(in("link/s"))
			}
			l := listener(t, sockpeer.Stream, name)
			fd := connected(t, sockpeer.Stream, name)
			accept(t, l)
			makeAnew := func() {
				check(t, os.Remove(string(name)))
				listener(t, sockpeer.Stream, name)
			}
			if tt.anew == "before" {
				makeAnew()
			}
			if tt.other {
				listenAt(t, in("empty/run/s"))
			}
			p := given(t, "bind "+strings.Join([]string{in(tt.from), in(tt.to), in("empty"), in("daemon")}, "|"), fd)
			if tt.anew == "after" {
				makeAnew()
			}
			want := sockpeer.Name("")
			if tt.want != "" {
				want = sockpeer.Name(in(tt.want))
			}
			if c := only(t, p.pid); c.Peer.Path != want || c.Peer.Name != name || c.Peer.Elsewhere != tt.other {
				t.Errorf("%+v, expected the path %q", c.Peer, want)
			}
		})
	}
}

// TestScanPathSame: where the name leads to the peer, there is no other.
func TestScanPathSame(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := t.TempDir()
	name := sockpeer.Name(filepath.Join(dir, "s"))
	l := listener(t, sockpeer.Stream, name)
	fd := connected(t, sockpeer.Stream, name)
	accept(t, l)
	more := filepath.Join(dir, "more")
	check(t, os.Mkdir(more, 0o755))
	p := given(t, "bind "+strings.Join([]string{dir, more, more, more}, "|"), fd)
	if c := only(t, p.pid); c.Peer.Path != "" || c.Peer.Elsewhere {
		t.Errorf("%+v", c.Peer)
	}
}

// TestScanPathMounted: it is the daemon that sees its socket through a mount, and
// the process has another part of the same file system.
func TestScanPathMounted(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"volume/data", "run", "empty", "inside"} {
		check(t, os.MkdirAll(in(d), 0o755))
	}
	check(t, unix.Mount(in("volume/data"), in("run"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { check(t, unix.Unmount(in("run"), unix.MNT_DETACH)) })
	name := sockpeer.Name(in("run/s"))
	l := listener(t, sockpeer.Stream, name)
	for _, tt := range []struct{ from, want string }{
		{"empty", "volume/data/s"},
		{"volume", "inside/data/s"},
		{"volume/data", "inside/s"},
	} {
		fd := connected(t, sockpeer.Stream, name)
		accept(t, l)
		p := given(t, "bind "+strings.Join([]string{in(tt.from), in("inside"), in("empty"), in("run")}, "|"), fd)
		if c := only(t, p.pid); c.Peer.Path != sockpeer.Name(in(tt.want)) {
			t.Errorf("%s at inside: %+v", tt.from, c.Peer)
		}
	}
}
