// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"criuhook/criuhook/image"
	"criuhook/proto"
)

// wantCaches checks which caches a record lists.
func wantCaches(t testing.TB, dir string, want ...*proto.Cache) {
	t.Helper()
	got := record(t, dir).Caches
	for _, w := range want {
		found := false
		for _, c := range got {
			same := c.Path == w.Path || strings.HasSuffix(w.Path, "*") && strings.HasPrefix(c.Path, strings.TrimSuffix(w.Path, "*"))
			found = found || same && c.Unlinked == w.Unlinked && c.Mappings == w.Mappings && c.Fds == w.Fds
		}
		if !found {
			t.Errorf("the record does not list %v, but %v", w, got)
		}
	}
	if len(got) != len(want) {
		t.Errorf("the record lists %d caches, expected %d: %v", len(got), len(want), got)
	}
	set, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if left := set.Caches(); len(left) > 0 {
		t.Errorf("the images still refer to %+v", left)
	}
	if ghosts, _ := filepath.Glob(filepath.Join(dir, "ghost-file-*")); len(ghosts) > 0 {
		t.Errorf("the images hold ghosts: %v", ghosts)
	}
}

var (
	ofSSSD = &proto.Cache{Path: sssdCache, Mappings: 1, Fds: 1}
	ofNSCD = &proto.Cache{Path: nscdCache, Mappings: 1}
	// nscdRetry is after how many lookups glibc surely asks nscd again
	// (nscd/nscd-client.h, NSS_NSCD_RETRY).
	nscdRetry = 110
)

// withoutDaemons restores images with stock CRIU alone, after both daemons and
// all their files are gone. Files has the names, so lookups go on.
func (l *Lookup) withoutDaemons(t testing.TB, d *daemons, dir string, before []mapping) {
	t.Helper()
	back := l.keepStats(t)
	failed := l.failed(t)
	d.do(t, "stop")
	removeCaches(t)
	l.RestoreStock(t, dir)
	l.wantEmpty(t, before)
	l.rounds(t, 5)
	l.wantFailed(t, "stock CRIU, without daemons", failed)
	l.Kill(t)
	back()
}

func removeCaches(t testing.TB) {
	t.Helper()
	for _, pattern := range []string{"/var/lib/sss/mc/*", "/var/cache/nscd/*"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// wantEmpty checks that where caches were mapped there are zeros, and that
// their fds are /dev/null, before the application has looked anything up.
func (l *Lookup) wantEmpty(t testing.TB, before []mapping) {
	t.Helper()
	if m := l.mappings(t); len(m) > 0 {
		t.Errorf("after the restore caches are mapped: %+v", m)
	}
	for _, m := range before {
		l.zeros(t, m)
	}
	for fd, name := range l.fds(t) {
		if _, _, ok := image.CachePath(name); ok {
			t.Errorf("fd %d is %s", fd, name)
		}
	}
}

// cacheFDs are the fds on caches.
func (l *Lookup) cacheFDs(t testing.TB) (out []int) {
	t.Helper()
	for fd, name := range l.fds(t) {
		if _, _, ok := image.CachePath(name); ok {
			out = append(out, fd)
		}
	}
	return out
}

// TestCaches: whatever becomes of the caches between dump and restore, no
// lookup fails, and the application has live ones soon after.
func TestCaches(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, c := range []struct {
			name    string
			between func(t *testing.T, d *daemons)
			later   func(t *testing.T, d *daemons) // once lookups went on
			// refused: the application asked nscd while it was away. glibc then
			// never maps a database again, with or without a checkpoint
			// (nscd/nscd_helper.c, NO_MAPPING), but asks over the socket.
			refused bool
		}{
			{name: "unchanged", between: func(*testing.T, *daemons) {}},
			{name: "replaced", between: func(t *testing.T, d *daemons) { d.do(t, "restart") }},
			{name: "resized", between: func(t *testing.T, d *daemons) {
				d.do(t, "stop")
				removeCaches(t)
				d.edit(t, "nscd.conf", "group		211", "group		1009")
				d.edit(t, "sssd.conf", "debug_level = 9", "debug_level = 9\nmemcache_size_passwd = 2")
				old := map[string]int64{sssdCache: 9253600, nscdCache: 217032}
				d.do(t, "start")
				for path, size := range old {
					if info, err := os.Stat(path); err != nil || info.Size() == size {
						t.Fatalf("%s is not resized: %v, %v", path, info, err)
					}
				}
			}},
			{name: "unlinked", between: func(t *testing.T, d *daemons) { removeCaches(t) },
				// nscd goes on with its unlinked file. Were it restarted now, glibc
				// could keep the old mapping for 300 s, checkpoint or not: at its end
				// nscd sets the time in it to 0, which its own threads may undo.
				later: func(t *testing.T, d *daemons) { d.do(t, "restart", "sssd") }},
			{name: "absent", between: func(t *testing.T, d *daemons) { d.do(t, "stop"); removeCaches(t) },
				later: func(t *testing.T, d *daemons) { d.do(t, "start") }, refused: true},
		} {
			t.Run(c.name, func(t *testing.T) {
				d := startDaemons(t)
				d.fallBack(t)
				l := startLookup(t, append(round, "-p")...)
				before := l.mappings(t)
				fds := l.cacheFDs(t)
				if len(before) != 2 || len(fds) != 1 {
					t.Fatalf("before the dump: mappings %+v, fds %v", before, fds)
				}
				dir := l.Dump(t)
				wantCaches(t, dir, ofSSSD, ofNSCD)
				c.between(t, d)

				l.Restore(t, dir)
				l.wantEmpty(t, before)
				if name := l.fds(t)[fds[0]]; name != os.DevNull {
					t.Errorf("fd %d, the cache's, is %q after the restore", fds[0], name)
				}
				l.rounds(t, 5)
				if c.later != nil {
					c.later(t, d)
				}
				l.rounds(t, nscdRetry)
				if !l.live(t, sssdCache) {
					t.Errorf("the application has not mapped %s anew: %+v", sssdCache, l.mappings(t))
				}
				if c.refused {
					thaw := freezeAll(t, "nscd")
					l.ask(t)
					l.awaitBusy(t, nscdSocket)
					thaw()
					l.rounds(t, 1)
				} else if !l.liveNSCD(t) {
					t.Errorf("the application has not mapped nscd's database anew: %+v", l.mappings(t))
				}
				l.wantFailed(t, "after the restore", 0)

				// Once more, of what it has become.
				before = l.mappings(t)
				dir = l.Dump(t)
				var want []*proto.Cache
				for _, m := range before {
					path, unlinked, _ := image.CachePath(m.path)
					want = append(want, &proto.Cache{Path: path, Unlinked: unlinked, Mappings: 1, Fds: uint32(strings.Count(path, "/sss/"))})
				}
				wantCaches(t, dir, want...)
				l.withoutDaemons(t, d, dir, before)
				nothingLeft(t)
			})
		}
	})
}

// TestCacheUnlinkedBeforeTheDump: sssd was restarted, the application still
// maps the old file, and the image must hold none of it. CRIU refuses it by its
// size, and an action script can only say which option to add; the other ways
// tell CRIU that the file is external.
func TestCacheUnlinkedBeforeTheDump(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := startDaemons(t)
		d.fallBack(t)
		l := startLookup(t, append(round, "-p")...)
		d.do(t, "restart", "sssd")
		before := l.mappings(t)

		var limit []string
		if wayOf(t) == byScript {
			limit = []string{"--ghost-limit", "9M"}
			dir := images(t)
			l.TryDump(t, dir).failed(t, dir, sssdCache, "--ghost-limit 9M")
			if m := l.mappings(t); len(m) != len(before) {
				t.Errorf("after the failed dump %+v is mapped, before %+v", m, before)
			}
		}

		dir := l.Dump(t, limit...)
		wantCaches(t, dir, &proto.Cache{Path: sssdCache, Unlinked: true, Mappings: 1, Fds: 1}, ofNSCD)
		back := l.keepStats(t)
		l.Restore(t, dir)
		l.wantEmpty(t, before)
		l.rounds(t, nscdRetry)
		if !l.live(t, sssdCache) {
			t.Errorf("the application has not mapped %s anew: %+v", sssdCache, l.mappings(t))
		}
		l.wantFailed(t, "after the restore", 0)
		l.Kill(t)
		back()
		l.withoutDaemons(t, d, dir, before)
		nothingLeft(t)
	})
}

// TestGhostLimitIsEnough: no warning when the option is there already, nor
// when nothing is unlinked.
func TestGhostLimitIsEnough(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := startDaemons(t)
		l := startLookup(t, append(round, "-p")...)
		var dirs []string
		var backs []func()
		for _, args := range [][]string{{"--leave-running"}, {"--leave-running", "--ghost-limit=16M"}} {
			if len(args) > 1 {
				d.do(t, "restart", "sssd")
			}
			dirs = append(dirs, images(t))
			r := l.TryDump(t, dirs[len(dirs)-1], args...)
			r.want(t, "dump", 0)
			backs = append(backs, l.keepStats(t))
			if strings.Contains(r.Log, "unlinked") {
				t.Errorf("%v: a warning for nothing:\n%s", args, r.Output)
			}
		}
		l.rounds(t, 5)
		l.wantFailed(t, "after the dumps", 0)
		l.Kill(t)
		for i, dir := range dirs {
			backs[i]()
			l.Dumped(t, dir)
		}
		nothingLeft(t)
	})
}

// TestCacheNotPersistent: nscd's other way, an unlinked file. CRIU keeps it as a
// ghost, which glibc would trust for ever.
func TestCacheNotPersistent(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := startDaemons(t)
		d.fallBack(t)
		d.edit(t, "nscd.conf", "persistent		group		yes", "persistent		group		no")
		d.do(t, "stop", "nscd")
		d.do(t, "start", "nscd") // a restart takes no new configuration
		l := startLookup(t, append(round, "-p")...)
		before := l.mappings(t)
		dir := l.Dump(t)
		wantCaches(t, dir, ofSSSD, &proto.Cache{Path: "/run/nscd/db*", Unlinked: true, Mappings: 1})
		d.do(t, "restart", "nscd")
		back := l.keepStats(t)
		l.Restore(t, dir)
		l.wantEmpty(t, before)
		l.rounds(t, nscdRetry)
		l.wantFailed(t, "after the restore", 0)
		if !l.liveNSCD(t) {
			t.Errorf("the application has not mapped nscd's database anew: %+v", l.mappings(t))
		}
		l.Kill(t)
		back()
		l.withoutDaemons(t, d, dir, before)
		nothingLeft(t)
	})
}

// reads reads a file in two halves, the second once there is a file "go", and
// writes both to "copy".
const reads = `
my ($file, $dir) = @ARGV;
open(my $in, "<:raw", $file) or die;
sub copied { open(my $f, ">:raw", "$dir/new") or die; print $f shift; close $f; rename "$dir/new", "$dir/" . shift }
sysread($in, my $half, 64) or die;
copied($half, "half");
select(undef, undef, undef, 0.01) until -e "$dir/go";
$half .= $_ while sysread($in, $_, 1 << 20);
copied($half, "copy");
sleep 1000;
`

// TestCacheReadAsAFile: a backup is no client of sssd. It reads on where it was.
func TestCacheReadAsAFile(t *testing.T) {
	ways(t, func(t *testing.T) {
		startDaemons(t)
		dir := folder(t)
		p := start(t, root, nil, "perl", "-e", reads, sssdCache, dir)
		exists := func(name string) func() bool {
			return func() bool { _, err := os.Stat(filepath.Join(dir, name)); return err == nil }
		}
		eventually(t, "half a copy", exists("half"))
		imgs := p.Dump(t)
		if rec := record(t, imgs); len(rec.Caches) != 0 {
			t.Errorf("recorded: %v", rec.Caches)
		}
		p.Restore(t, imgs)
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the copy", exists("copy"))
		want, err := os.ReadFile(sssdCache)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "copy")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the copy of %d bytes is not the cache's %d: %v", len(got), len(want), err)
		}
		nothingLeft(t)
	})
}
