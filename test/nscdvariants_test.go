// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"criuhook/proto"
)

// nscdVariant is how nscd keeps its database, and lets its clients see it.
type nscdVariant struct{ persistent, shared bool }

func (v nscdVariant) String() string {
	return "persistent " + yes(v.persistent) + ", shared " + yes(v.shared)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// caches are what a client has mapped.
func (v nscdVariant) caches() []*proto.Cache {
	switch {
	case !v.shared:
		return nil
	case v.persistent:
		return []*proto.Cache{ofNSCD}
	}
	return []*proto.Cache{{Path: "/run/nscd/db*", Unlinked: true, Mappings: 1}}
}

// start starts nscd anew, with a database so small that a hundred names make it
// grow. clean is the configuration to vary.
func (v nscdVariant) start(t testing.TB, d *daemons, clean string) {
	t.Helper()
	for _, change := range [][2]string{
		{"persistent		group		yes", "persistent		group		" + yes(v.persistent)},
		{"shared			group		yes", "shared			group		" + yes(v.shared)},
		{"suggested-size		group		211", "suggested-size		group		11"},
	} {
		if !strings.Contains(clean, change[0]) {
			t.Fatalf("nscd.conf does not say %q", change[0])
		}
		clean = strings.Replace(clean, change[0], change[1], 1)
	}
	d.do(t, "stop", "nscd")
	removeNSCD(t)
	d.write(t, "nscd.conf", clean)
	d.do(t, "start", "nscd")
}

func removeNSCD(t testing.TB) {
	t.Helper()
	files, _ := filepath.Glob("/var/cache/nscd/*")
	for _, f := range append(files, nscdSocket) {
		if err := os.RemoveAll(f); err != nil {
			t.Fatal(err)
		}
	}
}

// database is the size of the file that nscd keeps groups in.
func database(t testing.TB) int64 {
	t.Helper()
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", named(t, "nscd")))
	for _, link := range links {
		name, _ := os.Readlink(link)
		if info, err := os.Stat(link); err == nil && info.Mode().IsRegular() && strings.Contains(name, "/nscd/") && !strings.Contains(name, ".pid") {
			return info.Size()
		}
	}
	return 0 // it keeps them in memory
}

// grow asks for absent groups until nscd has made its database larger.
func grow(t testing.TB) {
	t.Helper()
	before := database(t)
	const ask = `my $name = "absent-" . shift; getgrnam($name . "x" x 150 . $_) for 1..100`
	for i := range 20 {
		if out, err := exec.Command("perl", "-e", ask, fmt.Sprint(i)).CombinedOutput(); err != nil {
			t.Fatalf("ask for groups: %v\n%s", err, out)
		}
		if database(t) > before {
			return
		}
	}
	t.Fatalf("nscd's database still has %d bytes after 2000 groups", before)
}

// TestNSCDVariants: however nscd keeps its database, and if it has grown, or
// nscd is not there at all where the process is restored, no lookup fails; not
// even one that was under way; nor in twenty cycles. The client could not open the
// database itself.
func TestNSCDVariants(t *testing.T) {
	ways(t, func(t *testing.T) {
		// What nscd does not answer, a file does, over no connection.
		d := startDaemonsWith(t, func(d *daemons) {
			d.edit(t, "nsswitch.conf", "group:    sss [UNAVAIL=return TRYAGAIN=return] files", "group:    files")
		})
		clean, err := os.ReadFile(filepath.Join(d.conf, "nscd.conf"))
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []nscdVariant{{true, true}, {true, false}, {false, true}, {false, false}} {
			t.Run(v.String(), func(t *testing.T) {
				v.start(t, d, string(clean))
				if v.persistent {
					if info, err := os.Stat(nscdCache); err != nil || info.Mode().Perm() != 0o600 {
						t.Errorf("nscd's database: %v, %v; expected one that only root may open", info, err)
					}
				}
				v.idle(t, d)
				v.start(t, d, string(clean))
				v.busy(t)
				v.start(t, d, string(clean))
				nscdCycles(t, "nscd", ", "+v.String(), v.idlePolicy())
				nothingLeft(t)
			})
		}
	})
}

func (v nscdVariant) observe(t testing.TB, policy, state string, l *Lookup, o Observation) {
	t.Helper()
	o.Failed = l.failed(t)
	l.wantFailed(t, state, 0)
	o.Client, o.Daemon, o.Policy, o.State = "glibc", "nscd, "+v.String(), policy, state
	observe(t, o)
}

// idlePolicy is what is done about an idle client.
func (v nscdVariant) idlePolicy() string {
	if v.shared {
		return "no connection, mapping emptied"
	}
	return "no connection"
}

func (v nscdVariant) idle(t *testing.T, d *daemons) {
	l := startLookup(t, "-p", "-g", "bob")
	fds := len(l.fds(t))
	dir := l.Dump(t)
	wantCaches(t, dir, v.caches()...)
	if n := len(record(t, dir).Connections); n != 0 {
		t.Errorf("%d connections recorded of an idle client", n)
	}
	back := l.keepStats(t)
	state := "idle"
	if v.persistent || v.shared { // there is a file
		grow(t)
		state += ", database grown"
	}
	l.Restore(t, dir)
	o := Observation{Longest: l.rounds(t, 5), FDsLeaked: len(l.fds(t)) - fds}
	if v.shared {
		l.rounds(t, nscdRetry)
		if !l.liveNSCD(t) {
			t.Errorf("the application has not mapped nscd's database anew: %+v", l.mappings(t))
		}
	}
	v.observe(t, v.idlePolicy(), state, l, o)
	l.Kill(t)

	back()
	d.do(t, "stop", "nscd")
	removeNSCD(t)
	l.Restore(t, dir)
	o = Observation{Longest: l.rounds(t, 5), FDsLeaked: len(l.fds(t)) - fds}
	v.observe(t, v.idlePolicy(), "idle, no nscd at the restore", l, o)
	l.Kill(t)
}

func (v nscdVariant) busy(t *testing.T) {
	l := startLookup(t, "-p", "-g", "carol")
	fds := len(l.fds(t))
	// What nscd has forgotten it must be asked for.
	if out, err := exec.Command("/usr/sbin/nscd", "-i", "group").CombinedOutput(); err != nil {
		t.Fatalf("nscd -i group: %v\n%s", err, out)
	}
	thaw := freezeAll(t, "nscd")
	l.ask(t)
	l.awaitBusy(t, nscdSocket)
	l.alive = nil // as long as nscd is frozen
	dir := l.Dump(t)
	thaw()
	n, _, _ := l.count(t)
	l.Restore(t, dir)
	o := Observation{Longest: l.awaitAnswer(t, n)}
	o.Longest = max(o.Longest, l.rounds(t, 5))
	o.FDsLeaked = len(l.fds(t)) - fds
	v.observe(t, "hangup", "busy", l, o)
	l.Kill(t)
}
