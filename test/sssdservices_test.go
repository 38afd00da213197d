// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// oneService is a client of one service, from its dump to its restore.
type oneService struct {
	service
	l         *Lookup
	dir       string
	fds, own  int // the client's, before the dump
	keepStats func()
	action    proto.Action
}

// TestSSSDServices: the clients of all of sssd's services, with a connection for
// each of their threads. No request fails, no responder ends, its connections
// are as many as before, and who has made them is the application's user. Also
// when sssd was restarted, and when the connections are hung up.
func TestSSSDServices(t *testing.T) {
	const threads = 3
	state := fmt.Sprintf("idle, %d threads", threads)
	for _, c := range []struct {
		name, policy, state, rule string
		restart                   bool
	}{
		{"reconnect", sssdPolicy, state, "", false},
		{"restarted", sssdPolicy, "idle, daemon restarted", "", true},
		{"hangup", "hangup", state, "rules: [{name: t-sssd, path: /var/lib/sss/pipes/*, idle: hangup}]", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ways(t, func(t *testing.T) {
				d := startServices(t)
				action := proto.Action_ACTION_RECONNECT
				if c.rule != "" {
					install(t, c.rule)
					action = proto.Action_ACTION_HANGUP
				}
				var all []*oneService
				for _, s := range services() {
					idle := steady(t, s.pipe())
					o := &oneService{service: s, l: startClient(t, s.user, threads, s), action: action}
					o.fds, o.own = len(o.l.fds(t)), connected(t, s.pipe())-idle
					if o.own != threads {
						t.Errorf("%s: %d connections of %d threads", s, o.own, threads)
					}
					o.dir = o.l.Dump(t)
					o.keepStats = o.l.keepStats(t)
					wantActions(t, o.dir, o.own, action)
					awaitConnected(t, s.pipe(), idle)
					all = append(all, o)
				}
				if c.restart { // once for all, to be fast
					d.do(t, "restart", "sssd")
				}
				before := responders(t)
				for _, o := range all {
					t.Run(o.String(), func(t *testing.T) { o.observe(t, c.policy, c.state, o.restored(t)) })
				}
				wantResponders(t, before)
				nothingLeft(t)
			})
		})
	}
}

// restored restores the client, checks it and its daemon, and ends it.
func (s *oneService) restored(t *testing.T) (o Observation) {
	t.Helper()
	idle := steady(t, s.pipe()) // nscd may have one
	seen := len(clientsOf(t, s.name))
	r := s.l.Restore(t, s.dir)
	now := idle + s.own
	if s.action == proto.Action_ACTION_RECONNECT {
		o.Identity = s.identity(t, seen)
		s.wantMade(t, r)
	} else {
		now = idle
	}
	awaitConnected(t, s.pipe(), now)
	first := s.l.rounds(t, 1)
	o.Longest = max(first, s.l.rounds(t, 2))
	o.Failed = s.l.failed(t)
	o.FDsLeaked = len(s.l.fds(t)) - s.fds
	s.l.wantFailed(t, "after the restore", 0)
	if !s.library {
		awaitConnected(t, s.pipe(), idle+s.own)
		if o.FDsLeaked != 0 {
			t.Errorf("%d fds more than before", o.FDsLeaked)
		}
	}
	t.Logf("%d connections, then %d; %+v", s.own, connected(t, s.pipe())-idle, o)
	wantSoon(t, first, soonIdle, func() time.Duration {
		s.l.Kill(t)
		s.keepStats()
		s.l.Restore(t, s.dir)
		return s.l.rounds(t, 1)
	})
	s.l.Kill(t)
	awaitConnected(t, s.pipe(), idle)
	nothingLeft(t)
	return o
}

// identity is whom sssd has seen on the connections that were made after it had
// seen so many: as many as there were before, all of the application's user.
func (s *oneService) identity(t testing.TB, seen int) string {
	t.Helper()
	var made []client
	eventually(t, "sssd's log to tell of the connections", func() bool {
		made = clientsOf(t, s.name)[seen:]
		return len(made) >= s.own
	})
	for _, m := range made {
		if m.uid != strconv.Itoa(int(s.user.UID)) {
			t.Errorf("sssd saw %+v, expected uid %d", m, s.user.UID)
		}
	}
	uid, err := strconv.Atoi(made[0].uid)
	if err != nil {
		t.Fatal(err)
	}
	return seenAs(uint32(uid), s.user)
}

// wantMade checks where the connections were made: in the restored process by the
// action script, else before CRIU began, for it to inherit.
func (s *oneService) wantMade(t testing.TB, r Result) {
	t.Helper()
	want := s.own
	if r.By == byScript {
		want = 0
	}
	if n := strings.Count(r.Log, "in inherit fd list"); n != want {
		t.Errorf("CRIU has inherited %d connections, expected %d\n%s", n, want, r.tail())
	}
}

// TestSSSDServicesMidRequest: the request under way fails, or is made again, at
// once, and the next ones succeed. sssd keeps its end of a connection whose
// client went away during a request, also of one that was killed, until
// client_idle_timeout (tevent tells of a hangup only those who wait to read): see
// TestSSSDIdleTimeout.
func TestSSSDServicesMidRequest(t *testing.T) {
	ways(t, func(t *testing.T) {
		startServices(t)
		before := responders(t)
		for _, s := range services() {
			t.Run(s.String(), func(t *testing.T) {
				lived := alive(t, s.pipe())
				l := startClient(t, s.user, 1, s)
				fds := len(l.fds(t))
				thaw := freezeAll(t, "sssd_"+s.name)
				l.ask(t)
				l.awaitBusy(t, sockpeer.Name(s.pipe()))
				l.alive = nil // as long as sssd is frozen
				dir := l.Dump(t)
				wantActions(t, dir, 1, proto.Action_ACTION_HANGUP)
				thaw()
				n, _, _ := l.count(t)
				back := l.keepStats(t)
				l.Restore(t, dir)
				first := l.awaitAnswer(t, n)
				o := Observation{Longest: max(first, l.rounds(t, 3))}
				if o.Failed = l.failed(t); o.Failed > 1 {
					t.Errorf("%d requests failed, one was under way", o.Failed)
				}
				o.FDsLeaked = len(l.fds(t)) - fds
				s.observe(t, "hangup", "busy", o)
				wantSoon(t, first, soonBusy, func() time.Duration {
					l.Kill(t)
					back()
					l.Restore(t, dir)
					return l.awaitAnswer(t, n)
				})
				l.Kill(t)
				eventually(t, "no connection that has both ends", func() bool { return alive(t, s.pipe()) == lived })
				nothingLeft(t)
			})
		}
		wantResponders(t, before)
	})
}

// TestSSSDWithoutPrelude is what the built-in rule's prelude is for: without it
// sssd's pam service does not survive the first request. Of one way only, since
// it is about sssd.
func TestSSSDWithoutPrelude(t *testing.T) {
	need(t)
	startServices(t)
	// sssd may not end by itself while it replaces a service that crashed.
	t.Cleanup(func() {
		for _, name := range []string{"sssd", "sssd_be", "sssd_nss", "sssd_pam", "sssd_sudo", "sssd_autofs", "sssd_ssh", "sssd_pac"} {
			for _, pid := range running(name) {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			eventually(t, name+" is gone", func() bool { return len(running(name)) == 0 })
		}
	})
	install(t, "rules: [{name: t-sssd, path: /var/lib/sss/pipes/*, idle: reconnect, prelude: none}]")
	for _, s := range []service{{"nss", false, alice}, {"pam", false, alice}} {
		t.Run(s.String(), func(t *testing.T) {
			l := startClient(t, s.user, 1, s)
			fds, responder := len(l.fds(t)), named(t, "sssd_"+s.name)
			lives := func() bool { return slices.Contains(running("sssd_"+s.name), responder) }
			l.Restore(t, l.Dump(t))
			o := Observation{Longest: l.rounds(t, 1), FDsLeaked: max(0, len(l.fds(t))-fds)}
			o.Failed = l.failed(t)
			state := "idle"
			if s.name == "pam" {
				// Its sockets are closed before the process is gone.
				eventually(t, "sssd_pam has crashed", func() bool { return !lives() })
			}
			if !lives() {
				state = "idle (the service crashed)"
			}
			s.observe(t, "reconnect, no prelude", state, o)
			nothingLeft(t)
		})
	}
}
