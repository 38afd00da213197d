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

// TestSSSDServices: the clients of all of sssd's services, with a connection for
// each of their threads. No request fails, no responder ends, and its
// connections are as many as before. Also when sssd was restarted, and when the
// connections are hung up.
func TestSSSDServices(t *testing.T) {
	const threads = 3
	for _, c := range []struct {
		name, policy, rule string
		restart            bool
	}{
		{"reconnect", sssdPolicy, "", false},
		{"restarted", sssdPolicy, "", true},
		{"hangup", "hangup", "rules: [{name: t-sssd, path: /var/lib/sss/pipes/*, idle: hangup}]", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ways(t, func(t *testing.T) {
				d := startServices(t)
				if c.rule != "" {
					install(t, c.rule)
				}
				for i, s := range services() {
					if c.restart && i > 3 {
						break // time
					}
					t.Run(s.String(), func(t *testing.T) {
						idle := steady(t, s.pipe())
						l := s.start(t, threads)
						fds, before := len(l.fds(t)), connected(t, s.pipe())
						own := before - idle
						dir := l.Dump(t)
						awaitConnected(t, s.pipe(), idle)
						if c.restart {
							d.do(t, "restart", "sssd")
							idle = steady(t, s.pipe()) // nscd may have had one
							before = idle + own
						}
						seen, responder := len(clientsOf(t, s.name)), named(t, "sssd_"+s.name)
						l.Restore(t, dir)
						o := Observation{}
						if c.rule == "" {
							wantActions(t, dir, own, proto.Action_ACTION_RECONNECT)
							var made []client
							eventually(t, "sssd's log to tell of the connections", func() bool {
								made = clientsOf(t, s.name)[seen:]
								return len(made) >= own
							})
							for _, m := range made {
								if o.Identity = m.uid; m.uid != strconv.Itoa(int(s.user.UID)) {
									t.Errorf("sssd saw %+v", m)
								}
							}
							uid, _ := strconv.Atoi(o.Identity)
							o.Identity = seenAs(uint32(uid), s.user)
							awaitConnected(t, s.pipe(), before)
						} else {
							wantActions(t, dir, own, proto.Action_ACTION_HANGUP)
							awaitConnected(t, s.pipe(), idle)
						}
						o.Longest = l.rounds(t, 3)
						o.Failed = l.failed(t)
						o.FDsLeaked = len(l.fds(t)) - fds
						l.wantFailed(t, "after the restore", 0)
						if !s.library {
							awaitConnected(t, s.pipe(), before)
							if o.FDsLeaked != 0 {
								t.Errorf("%d fds more than before", o.FDsLeaked)
							}
						}
						t.Logf("%d connections of %d threads, then %d; %+v", own, threads, connected(t, s.pipe())-idle, o)
						s.observe(t, c.policy, fmt.Sprintf("idle, %d threads", threads), o)
						l.Kill(t)
						awaitConnected(t, s.pipe(), idle)
						if now := named(t, "sssd_"+s.name); now != responder {
							t.Errorf("sssd_%s was process %d and is %d now", s.name, responder, now)
						}
						nothingLeft(t)
					})
				}
			})
		})
	}
}

// TestSSSDServicesMidRequest: the request under way fails, or is made again, at
// once, and the next ones succeed. sssd keeps its end of a connection whose
// client went away during a request, also of one that was killed, until
// client_idle_timeout (probably because it waits to write, and is told nothing of the hangup).
func TestSSSDServicesMidRequest(t *testing.T) {
	ways(t, func(t *testing.T) {
		startServices(t)
		for _, s := range services() {
			t.Run(s.String(), func(t *testing.T) {
				lived := alive(t, s.pipe())
				l := s.start(t, 1)
				fds := len(l.fds(t))
				thaw := freeze(t, "sssd_"+s.name)
				l.ask(t)
				l.awaitBusy(t, sockpeer.Name(s.pipe()))
				l.alive = nil // as long as sssd is frozen
				dir := l.Dump(t)
				wantActions(t, dir, 1, proto.Action_ACTION_HANGUP)
				responder := named(t, "sssd_"+s.name)
				thaw()
				n, _, _ := l.count(t)
				l.Restore(t, dir)
				o := Observation{Longest: l.awaitAnswer(t, n)}
				o.Longest = max(o.Longest, l.rounds(t, 3))
				if o.Failed = l.failed(t); o.Failed > 1 {
					t.Errorf("%d requests failed, one was under way", o.Failed)
				}
				o.FDsLeaked = len(l.fds(t)) - fds
				s.observe(t, "hangup", "busy", o)
				l.Kill(t)
				eventually(t, "no connection that has both ends", func() bool { return alive(t, s.pipe()) == lived })
				if now := named(t, "sssd_"+s.name); now != responder {
					t.Errorf("sssd_%s was process %d and is %d now", s.name, responder, now)
				}
				nothingLeft(t)
			})
		}
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
			l := s.start(t, 1)
			fds, responder := len(l.fds(t)), named(t, "sssd_"+s.name)
			l.Restore(t, l.Dump(t))
			o := Observation{Longest: l.rounds(t, 1), FDsLeaked: max(0, len(l.fds(t))-fds)}
			o.Failed = l.failed(t)
			state := "idle"
			if !slices.Contains(running("sssd_"+s.name), responder) {
				state = "idle (the service crashed)"
			}
			s.observe(t, "reconnect, no prelude", state, o)
			nothingLeft(t)
		})
	}
}

// TestSSSDTwentyCycles: a process with a connection to each service; the daemon
// has as many at the end as at the beginning.
func TestSSSDTwentyCycles(t *testing.T) {
	ways(t, func(t *testing.T) {
		startServices(t)
		var args, pipes []string
		for _, s := range services() {
			if !s.library {
				args, pipes = append(args, "-s", s.name), append(pipes, s.pipe())
			}
		}
		l := startClient(t, root, append(args, "-t", strconv.Itoa(len(pipes)))...)
		fds := len(l.fds(t))
		var before, responders []int
		for _, p := range pipes {
			before = append(before, connected(t, p))
			responders = append(responders, named(t, "sssd_"+p[strings.LastIndexByte(p, '/')+1:]))
		}
		var longest time.Duration
		for range 20 {
			dir := l.Dump(t)
			wantActions(t, dir, len(pipes), proto.Action_ACTION_RECONNECT)
			l.Restore(t, dir)
			longest = max(longest, l.rounds(t, 1))
		}
		l.wantFailed(t, "after the cycles", 0)
		for i, p := range pipes {
			awaitConnected(t, p, before[i])
			if now := named(t, "sssd_"+p[strings.LastIndexByte(p, '/')+1:]); now != responders[i] {
				t.Errorf("the responder of %s was process %d and is %d now", p, responders[i], now)
			}
		}
		service{}.observeAll(t, "idle, twenty cycles", Observation{Longest: longest, Failed: l.failed(t), FDsLeaked: len(l.fds(t)) - fds})
		nothingLeft(t)
	})
}

// observeAll notes what was observed of all services at once.
func (s service) observeAll(t testing.TB, state string, o Observation) {
	t.Helper()
	o.Client, o.Daemon, o.Policy, o.State = s.client(), "sssd, all services", sssdPolicy, state
	observe(t, o)
}

// TestSSSDIdleTimeout: sssd gives its clients less time after the restore than it
// gave them at the dump, hangs up on the new connections when that is over, and
// the application is dumped again, with what is left of them. By all ways at
// once, because sssd gives them ten seconds at least.
func TestSSSDIdleTimeout(t *testing.T) {
	need(t)
	d := startServices(t)
	type one struct {
		service
		by  way
		l   *Lookup
		fds int
		dir string
		o   Observation
	}
	var all []*one
	for _, w := range []way{byScript, byRPC, byDropin} {
		for _, s := range []service{{"nss", false, alice}, {"pam", true, alice}, {"sudo", false, root}} {
			c := &one{service: s, by: w, l: s.start(t, 2)}
			c.l.dumpBy, c.l.restoreBy = w, w
			c.fds = len(c.l.fds(t))
			all = append(all, c)
		}
	}
	for _, c := range all {
		c.dir = c.l.Dump(t)
	}
	d.do(t, "stop", "sssd")
	d.edit(t, "sssd.conf", "client_idle_timeout = 36000", "client_idle_timeout = 10")
	d.do(t, "start", "sssd")
	pipes := []string{nssPipe, "/var/lib/sss/pipes/pam", "/var/lib/sss/pipes/sudo"}
	open := func() (n int) {
		for _, c := range all {
			for _, conn := range c.l.connections(t) {
				if conn.State == sockpeer.Established && slices.Contains(pipes, string(conn.Peer.Name)) {
					n++
				}
			}
		}
		return n
	}
	for _, c := range all {
		c.l.Restore(t, c.dir)
	}
	closed := func() {
		t.Helper()
		for end := time.Now().Add(time.Minute); open() > 0; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("sssd has not hung up on %d idle clients in a minute", open())
			}
		}
	}
	closed()
	for _, c := range all {
		c.l.Restore(t, c.l.Dump(t)) // of halves that are dead
		c.o.Longest = c.l.rounds(t, 2)
		c.o.Failed, c.o.FDsLeaked = c.l.failed(t), len(c.l.fds(t))-c.fds
		c.l.wantFailed(t, c.String()+" by "+c.by.String(), 0)
		c.o.By = c.by
		c.observe(t, "as it was: closed", "idle, sssd hung up before the dump", c.o)
	}
	nothingLeft(t)
}
