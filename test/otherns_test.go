// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// nameService is a daemon that is asked for one thing by one client.
type nameService struct {
	daemon   string // of test/daemons
	which    string // of its sockets, if that is not all it has
	client   string
	comms    []string // the daemon's processes that talk to clients
	listener sockpeer.Name
	rule     string
	sources  string // nsswitch.conf
	what     string
	// keeps: the client keeps its connection between two questions.
	keeps bool
	// fails is how many questions under way a hangup makes fail.
	fails int
	// user is who asks; nil: alice.
	user *User
}

func (s nameService) start(t testing.TB) *Asker {
	t.Helper()
	return startAskerAs(t, s.who(), nil, s.what)
}

func (s nameService) who() User {
	if s.user != nil {
		return *s.user
	}
	return alice
}

var nameServices = []nameService{
	{
		daemon: "winbind", client: "libnss_winbind", comms: []string{"winbindd"},
		listener: "/run/samba/winbindd/pipe", rule: "winbind",
		sources: "group: files winbind", what: `group=BUILTIN\users`, keeps: true, fails: 1,
	},
	{
		daemon: "nslcd", client: "libnss_ldap", comms: []string{"nslcd"},
		listener: "/var/run/nslcd/socket", rule: "nslcd-var-run",
		sources: "passwd: files ldap", what: "user=lara", fails: 1,
	},
	{
		daemon: "userdb", client: "libnss_systemd", comms: []string{"systemd-userdbd", "systemd-userwor*"},
		listener: "/run/systemd/userdb/io.systemd.Multiplexer", rule: "systemd-userdb",
		sources: "passwd: files systemd", what: "user=udora", fails: 1,
	},
	{
		daemon: "avahi", client: "libnss_mdns4_minimal", comms: []string{"avahi-daemon"},
		listener: "/run/avahi-daemon/socket", rule: "avahi",
		sources: "hosts: files mdns4_minimal", what: "host=sandbox.local", fails: 1,
	},
}

// winbindPrivileged is winbindd at the pipe for those it trusts with more.
var winbindPrivileged = nameService{
	daemon: "winbind", which: ", privileged pipe", client: "libwbclient", comms: []string{"winbindd"},
	listener: "/var/lib/samba/winbindd_privileged/pipe", rule: "winbind-privileged",
	sources: "group: files", what: "uid", keeps: true, fails: 1,
}

// mayUsePrivileged is alice in the group that may use that pipe.
func mayUsePrivileged(t testing.TB) User {
	t.Helper()
	b, err := os.ReadFile("/etc/group")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(line, ":"); len(f) == 4 && f[0] == "winbindd_priv" {
			gid, err := strconv.ParseUint(f[2], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			u := alice
			u.Groups = append(slices.Clone(alice.Groups), uint32(gid))
			return u
		}
	}
	t.Fatal("/etc/group does not know winbindd_priv")
	return User{}
}

// TestWinbindPrivileged: connections to the privileged pipe, which only a
// process with the application's groups can make again. Each request is one that
// winbindd grants to nobody on the other pipe.
func TestWinbindPrivileged(t *testing.T) {
	need(t)
	runDaemons(t, "winbind")
	member := mayUsePrivileged(t)
	for _, of := range []struct {
		name, note string
		user       User
		restarted  bool // takes seconds
	}{
		{"member", " of a user of the group winbindd_priv", member, true},
		{"root", " of root", root, false},
	} {
		t.Run(of.name, func(t *testing.T) {
			s := winbindPrivileged
			s.client, s.user = s.client+of.note, &of.user
			ways(t, func(t *testing.T) {
				before := running("winbindd")
				t.Run("idle", s.idle)
				t.Run("busy", s.busy)
				wantStill(t, before, "winbindd")
				if of.restarted {
					t.Run("restarted", s.restarted)
				}
				nothingLeft(t)
			})
		})
	}
}

// TestNameServices: real winbindd, nslcd, systemd-userdbd and avahi-daemon, and
// their clients in glibc's name service.
func TestNameServices(t *testing.T) {
	need(t)
	for _, s := range nameServices {
		t.Run(s.daemon, func(t *testing.T) {
			runDaemons(t, s.daemon)
			nameSources(t, s.sources)
			ways(t, func(t *testing.T) {
				before := runningLike(s.comms[0])
				t.Run("idle", s.idle)
				t.Run("busy", s.busy)
				wantStill(t, before, s.comms[0])
				t.Run("restarted", s.restarted)
				nothingLeft(t)
			})
		})
	}
}

// wantNobody waits until the daemon has no connection.
func (s nameService) wantNobody(t *testing.T) {
	t.Helper()
	wantUnconnected(t, s.listener, s.comms...)
}

// identity is the client as the daemon's kernel tells it.
func (s nameService) identity(t *testing.T, a *Asker) string {
	t.Helper()
	if !s.keeps {
		return ""
	}
	return a.seenBy(t, s.listener, s.comms...)
}

func (s nameService) wantIdle(t *testing.T, rec *proto.Record) {
	t.Helper()
	if !s.keeps {
		if len(rec.Connections) != 0 {
			t.Errorf("recorded: %v; expected no connection between lookups", rec.Connections)
		}
		return
	}
	if len(rec.Connections) != 1 {
		t.Fatalf("recorded: %v; expected one connection", rec.Connections)
	}
	c := rec.Connections[0]
	if c.Action != proto.Action_ACTION_RECONNECT || c.Rule != s.rule || string(c.Peer.Name) != string(s.listener) || c.Identity.Uid != s.who().UID || c.Busy != "" {
		t.Errorf("recorded: %v", c)
	}
}

func (s nameService) idle(t *testing.T) { s.betweenLookups(t, "idle", func() {}) }

// restarted: by the time of the restore the daemon is another process.
func (s nameService) restarted(t *testing.T) {
	s.betweenLookups(t, "idle, daemon restarted", func() { doDaemons(t, "restart", s.daemon) })
}

func (s nameService) betweenLookups(t *testing.T, state string, between func()) {
	s.wantNobody(t)
	a := s.start(t)
	s.identity(t, a)
	fds := a.fds(t)
	dir := a.Dump(t)
	s.wantIdle(t, record(t, dir))
	between()
	a.Restore(t, dir)
	if s.keeps { // before anything is asked
		s.identity(t, a)
	}
	a.rounds(t, 1)
	first := a.answer(t, s.what).last
	a.rounds(t, 2)
	policy := "reconnect"
	if !s.keeps {
		policy = "nothing to do"
	}
	observeSoon(t, Observation{
		Client: s.client, Daemon: s.daemon + s.which, Policy: policy, State: state,
		Failed: a.failed(t), Longest: first, FDsLeaked: a.leaked(t, fds), Identity: s.identity(t, a),
	})
	a.wantFailed(t, "after the restore", 0)
	a.Kill(t)
	s.wantNobody(t)
}

// busy: the daemon does not answer when the dump comes.
func (s nameService) busy(t *testing.T) {
	s.wantNobody(t)
	a := s.start(t)
	fds := a.fds(t)
	thaw := freezeAll(t, s.comms...)
	a.ask(t)
	a.awaitBusy(t, s.listener)
	a.alive = nil // as long as the daemon is frozen
	dir := a.Dump(t)
	rec := record(t, dir)
	i := slices.IndexFunc(rec.Connections, func(c *proto.Connection) bool { return string(c.Peer.Name) == string(s.listener) })
	if i < 0 || rec.Connections[i].Action != proto.Action_ACTION_HANGUP || rec.Connections[i].Busy == "" || rec.Connections[i].Rule != s.rule {
		t.Errorf("recorded: %v; expected a hangup by rule %s", rec.Connections, s.rule)
	}
	thaw()
	a.Restore(t, dir)
	restored := time.Now()
	eventually(t, "the question that was under way", func() bool { return a.answer(t, s.what).asked == 2 })
	longest := time.Since(restored)
	failed := a.failed(t)
	if failed > s.fails {
		t.Errorf("%d questions failed, expected at most %d", failed, s.fails)
	}
	for range 3 {
		a.rounds(t, 1)
		longest = max(longest, a.answer(t, s.what).last)
	}
	observeSoon(t, Observation{
		Client: s.client, Daemon: s.daemon + s.which, Policy: "hangup", State: "busy",
		Failed: failed, Longest: longest, FDsLeaked: a.leaked(t, fds),
	})
	s.identity(t, a)
	a.wantFailed(t, "later", failed)
	a.Kill(t)
	s.wantNobody(t)
}
