// SPDX-License-Identifier: Apache-2.0

package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// connections are those of the process that lead out of it, as sockpeer sees
// them.
func (l *Lookup) connections(t testing.TB) []sockpeer.Connection {
	t.Helper()
	snap, err := sockpeer.Scan(l.PID)
	if err != nil {
		t.Fatal(err)
	}
	return snap.Connections
}

// awaitBusy waits until a thread waits for an answer of the named peer.
func (l *Lookup) awaitBusy(t testing.TB, name sockpeer.Name) {
	t.Helper()
	eventually(t, "a thread that waits for "+name.String(), func() bool {
		return slices.ContainsFunc(l.connections(t), func(c sockpeer.Connection) bool {
			return c.Peer.Name == name && len(c.Waiters) > 0
		})
	})
}

// TestStockFailsOnSSSD: what users of CRIU run into, message by message. Of no
// way, since criuhook takes no part.
func TestStockFailsOnSSSD(t *testing.T) {
	need(t)
	startDaemons(t)
	l := startLookup(t, append(round, "-i", "5")...)
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "External socket is used. Consider using --ext-unix-sk option."},
		{[]string{"--ext-unix-sk"}, "Can't dump half of stream unix connection. name: (null); peer name: " + nssPipe},
	} {
		dir := images(t)
		r := run(t, alice, dir, "dump.log", append([]string{"dump", "-t", strconv.Itoa(l.PID)}, c.args...)...)
		if r.Code == 0 || !strings.Contains(r.Log, c.want) {
			t.Errorf("stock CRIU %v: exit code %d, expected a failure with %q\n%s", c.args, r.Code, c.want, r.tail())
		}
		l.more(t, 20)
	}
	l.wantFailed(t, "after both dumps", 0)
	nothingLeft(t)
}

// TestScanShowsSSSD: the connection before the dump, the one that criuhook made,
// and the application's own new one.
func TestScanShowsSSSD(t *testing.T) {
	ways(t, func(t *testing.T) {
		startDaemons(t)
		l := startLookup(t, append(round, "-p")...)
		verdicts := func(when string, n int) {
			t.Helper()
			out, err := exec.Command(criuhook, "scan", "--pid", strconv.Itoa(l.PID), "-o", "json").Output()
			if err != nil {
				t.Fatalf("%s: criuhook scan: %v", when, err)
			}
			var scan struct {
				Connections []struct {
					Is      string
					Peer    struct{ Name string }
					Verdict struct{ Action, Rule, Busy string }
				}
			}
			if err := json.Unmarshal(out, &scan); err != nil {
				t.Fatal(err)
			}
			if len(scan.Connections) != n {
				t.Errorf("%s: %d connections, expected %d: %s", when, len(scan.Connections), n, out)
			}
			for _, c := range scan.Connections {
				if c.Peer.Name != nssPipe || c.Verdict.Action != "reconnect" || c.Verdict.Rule != "sssd" || c.Verdict.Busy != "" {
					t.Errorf("%s: %+v", when, c)
				}
				if want := "sssd, name service (nss pipe), opened by libnss_sss.so.2"; c.Is != want {
					t.Errorf("%s: it is said to be %q, expected %q", when, c.Is, want)
				}
			}
		}
		verdicts("before the dump", 1)
		l.Restore(t, l.Dump(t))
		verdicts("after the restore", 1)
		l.rounds(t, 1)
		verdicts("after a lookup", 2)
		nothingLeft(t)
	})
}

// TestSSSDIdle: threads with a connection each, which come back greeted, as the
// application's user, and no lookup fails. Also when sssd was restarted.
func TestSSSDIdle(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, restart := range []bool{false, true} {
			t.Run("restart="+strconv.FormatBool(restart), func(t *testing.T) {
				t.Setenv("SSS_NSS_USE_MEMCACHE", "NO")
				d := startDaemons(t)
				const threads = 4
				l := startLookup(t, append(round, "-p", "-t", strconv.Itoa(threads))...)
				fds := len(l.fds(t))
				dir := l.Dump(t)
				rec := record(t, dir)
				if len(rec.Connections) != threads {
					t.Errorf("%d connections recorded, expected one per thread", len(rec.Connections))
				}
				for _, c := range rec.Connections {
					if c.Action != proto.Action_ACTION_RECONNECT || c.Rule != "sssd" || string(c.Peer.Name) != nssPipe || c.Identity.Uid != alice.UID {
						t.Errorf("recorded: %v", c)
					}
				}
				if restart {
					d.do(t, "restart", "sssd")
				}
				seen := len(clients(t))
				l.Restore(t, dir)

				var made []client
				eventually(t, "sssd's log to tell of the connections", func() bool {
					made = clients(t)[seen:]
					return len(made) >= threads
				})
				for _, c := range made {
					if c.uid != strconv.Itoa(int(alice.UID)) {
						t.Errorf("sssd saw uid %s: %+v", c.uid, c)
					}
					eventually(t, "sssd's log to tell of the greeting", func() bool { return greeted(t, c) })
				}
				for _, c := range l.connections(t) {
					if c.State != sockpeer.Established || c.Busy() != "" || c.Peer.Name != nssPipe {
						t.Errorf("after the restore: %+v", c)
					}
				}
				longest := l.rounds(t, 3)
				l.wantFailed(t, "after the restore", 0)
				uid, _ := strconv.Atoi(made[0].uid)
				observe(t, Observation{
					Client: "libnss_sss", Daemon: "sssd, nss", Policy: sssdPolicy, State: fmt.Sprintf("idle, %d threads", threads),
					Failed: l.failed(t), Longest: longest, FDsLeaked: len(l.fds(t)) - fds, Identity: seenAs(uint32(uid), alice),
				})
				nothingLeft(t)
			})
		}
	})
}

// TestSSSDMidRequest: the answer will never come, so that lookup fails, at
// once, and the next ones work.
func TestSSSDMidRequest(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, restart := range []bool{false, true} {
			t.Run("restart="+strconv.FormatBool(restart), func(t *testing.T) {
				t.Setenv("SSS_NSS_USE_MEMCACHE", "NO")
				d := startDaemons(t)
				l := startLookup(t, "-p", "-u", "alice")
				fds := len(l.fds(t))
				thaw := freezeAll(t, "sssd_nss")
				l.ask(t)
				l.awaitBusy(t, nssPipe)
				l.alive = nil // as long as sssd is frozen
				dir := l.Dump(t)
				rec := record(t, dir)
				if len(rec.Connections) != 1 || rec.Connections[0].Action != proto.Action_ACTION_HANGUP || !strings.Contains(rec.Connections[0].Busy, "waits in poll") {
					t.Errorf("recorded: %v; expected a hangup, because a thread waits", rec.Connections)
				}
				thaw()
				if restart {
					d.do(t, "restart", "sssd")
				}
				n, _, _ := l.count(t)
				back := l.keepStats(t)
				for _, restore := range []func(){
					func() { l.RestoreStock(t, dir) },
					func() { l.Restore(t, dir) },
				} {
					restore()
					longest := l.awaitAnswer(t, n)
					if f := l.failed(t); f > 1 {
						t.Errorf("%d lookups failed, one was under way", f)
					}
					t.Logf("%d of 1 lookup under way failed", l.failed(t))
					under := l.failed(t)
					longest = max(longest, l.rounds(t, 5))
					l.wantFailed(t, "later", under)
					observe(t, Observation{
						Client: "libnss_sss", Daemon: "sssd, nss", Policy: "hangup", State: "busy",
						Failed: under, Longest: longest, FDsLeaked: len(l.fds(t)) - fds,
					})
					l.Kill(t)
					back()
				}
				nothingLeft(t)
			})
		}
	})
}

// TestNSCD: its clients hold no connection between lookups; in the middle of
// one, here not yet accepted, they ask the sources themselves once it is hung up.
func TestNSCD(t *testing.T) {
	ways(t, func(t *testing.T) {
		startDaemons(t)
		t.Run("idle", func(t *testing.T) {
			l := startLookup(t, "-p", "-g", "bob")
			dir := l.Dump(t)
			rec := record(t, dir)
			if len(rec.Connections) != 0 || len(rec.Caches) != 1 || rec.Caches[0].Path != nscdCache {
				t.Errorf("recorded: %v", rec)
			}
			l.Restore(t, dir)
			l.rounds(t, 5)
			l.wantFailed(t, "after the restore", 0)
		})
		t.Run("mid-request", func(t *testing.T) {
			l := startLookup(t, "-p", "-g", "carol")
			// What nscd has forgotten it must be asked for.
			if out, err := exec.Command("/usr/sbin/nscd", "-i", "group").CombinedOutput(); err != nil {
				t.Fatalf("nscd -i group: %v\n%s", err, out)
			}
			thaw := freezeAll(t, "nscd")
			l.ask(t)
			l.awaitBusy(t, nscdSocket)
			l.alive = nil // as long as nscd is frozen
			dir := l.Dump(t)
			rec := record(t, dir)
			i := slices.IndexFunc(rec.Connections, func(c *proto.Connection) bool { return string(c.Peer.Name) == nscdSocket })
			if i < 0 || rec.Connections[i].Action != proto.Action_ACTION_HANGUP || rec.Connections[i].Busy == "" {
				t.Errorf("recorded: %v; expected a hangup of nscd's", rec.Connections)
			} else {
				t.Logf("busy: %s", rec.Connections[i].Busy)
			}
			thaw()
			n, _, _ := l.count(t)
			back := l.keepStats(t)
			for _, restore := range []func(){
				func() { l.RestoreStock(t, dir) },
				func() { l.Restore(t, dir) },
			} {
				restore()
				eventually(t, "the lookup that was under way", func() bool { now, _, _ := l.count(t); return now == n+1 })
				l.rounds(t, 5)
				l.wantFailed(t, "after the restore", 0)
				l.Kill(t)
				back()
			}
		})
		nothingLeft(t)
	})
}

// TestTwentyCycles: lookups all the time, at every dump and after every
// restore. Only one whose connection to sssd was hung up, because it was under
// way, may fail.
func TestTwentyCycles(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, c := range []struct{ name, memcache string }{{"caches", "YES"}, {"connections", "NO"}} {
			t.Run(c.name, func(t *testing.T) {
				t.Setenv("SSS_NSS_USE_MEMCACHE", c.memcache)
				startDaemons(t)
				const threads, cycles = 2, 20
				l := startLookup(t, append(round, "-i", "5", "-t", strconv.Itoa(threads))...)
				first, mapped := len(l.fds(t)), len(l.cacheFDs(t))
				caches := mapped
				hungUp := 0
				var growth []int
				for range cycles {
					l.more(t, 2*l.perRound)
					dir := l.Dump(t)
					for _, c := range record(t, dir).Connections {
						if c.Action != proto.Action_ACTION_HANGUP {
							continue
						}
						switch string(c.Peer.Name) {
						case nssPipe:
							hungUp++
						case nscdSocket: // libnss_sss is asked for the group instead
							caches = 2 * mapped
						}
					}
					l.Restore(t, dir)
					l.more(t, 2*l.perRound)
					growth = append(growth, len(l.fds(t)))
				}
				n, failed, _ := l.count(t)
				if failed > hungUp {
					t.Errorf("%d lookups failed, %d connections were hung up", failed, hungUp)
				}
				// libnss_sss forgets, without closing them, what it finds changed:
				// in each thread its connection, and once each cache.
				if last := growth[cycles-1]; last > first+cycles*(threads+caches)+threads {
					t.Errorf("%d fds at first, then %v: more than libnss_sss forgets", first, growth)
				}
				t.Logf("%d lookups, %d failed, %d connections hung up; fds: %d at first, then %v; %d of them sockets",
					n, failed, hungUp, first, growth, l.socketCount(t))
				nothingLeft(t)
			})
		}
	})
}

// forked looks users up, forks, and looks up again, parent and child, once there
// is a file "go": then it says in a file of its own how that went.
const forked = `
my $dir = shift;
sub look { return (getpwnam("alice"))[2] == 1000 && !defined getpwnam("nobody-there") }
look() or die;
my $me = fork() ? "parent" : "child";
sub say { open(my $f, ">", "$dir/new-$me") or die; print $f shift; close $f; rename "$dir/new-$me", "$dir/$me" }
say("ready");
select(undef, undef, undef, 0.01) until -e "$dir/go";
my $failed = grep { !look() } 1..20;
say("failed $failed");
sleep 1000;
`

// TestSSSDForked: a parent and its child share connection, fd and mapping.
func TestSSSDForked(t *testing.T) {
	ways(t, func(t *testing.T) {
		startDaemons(t)
		dir := folder(t)
		parent := &Lookup{Process: start(t, alice, nil, "perl", "-e", forked, dir)}
		said := func(who string) string {
			b, _ := os.ReadFile(filepath.Join(dir, who))
			return string(b)
		}
		eventually(t, "both processes", func() bool { return said("parent") != "" && said("child") != "" })
		before := parent.mappings(t)
		if len(before) != 1 {
			t.Fatalf("mapped: %+v", before)
		}

		imgs := parent.Dump(t)
		rec := record(t, imgs)
		if len(rec.Connections) != 1 || rec.Connections[0].Action != proto.Action_ACTION_RECONNECT || len(rec.Connections[0].Holders) != 2 {
			t.Errorf("recorded: %v; expected one connection with two holders", rec.Connections)
		}
		wantCaches(t, imgs, &proto.Cache{Path: sssdCache, Mappings: 2, Fds: 2})
		parent.Restore(t, imgs)
		for _, pid := range sessionOf(parent.PID) {
			l := &Lookup{Process: &Process{PID: pid, User: alice}}
			l.wantEmpty(t, before)
			if c := l.connections(t); len(c) != 1 || c[0].State != sockpeer.Established {
				t.Errorf("process %d after the restore: %+v", pid, c)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		for _, who := range []string{"parent", "child"} {
			eventually(t, "the "+who+" to have looked up", func() bool { return said(who) != "ready" })
			if s := said(who); s != "failed 0" {
				t.Errorf("the %s: %s of 20", who, s)
			}
		}
		nothingLeft(t)
	})
}
