// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"criuhook/proto"
	"criuhook/sockpeer"
)

// service is a service of sssd, and a client of it.
type service struct {
	name    string // the pipe's
	library bool   // the client is the real library, else test/sssd/client.c
	user    User
}

// services are all but pac, whose responder comes in a package of its own
// (sssd-ad-common) and is tested where that is installed. sudo's pipe is for
// root only.
func services() []service {
	all := []service{
		{"nss", false, alice},
		{"pam", true, alice},
		{"pam", false, alice},
		{"sudo", false, root},
		{"autofs", true, alice},
		{"autofs", false, alice},
		{"ssh", false, alice},
	}
	if hasPAC() {
		all = append(all, service{"pac", false, root})
	}
	return all
}

func hasPAC() bool {
	_, err := os.Stat("/usr/libexec/sssd/sssd_pac")
	return err == nil
}

func (s service) String() string {
	if s.library {
		return s.name + " library"
	}
	return s.name
}

// client is what the table calls it.
func (s service) client() string {
	switch {
	case !s.library:
		return "sssd's protocol, a client that keeps its socket"
	case s.name == "pam":
		return "pam_sss"
	}
	return "libsss_" + s.name
}

func (s service) pipe() string { return "/var/lib/sss/pipes/" + s.name }

func (s service) observe(t testing.TB, policy, state string, o Observation) {
	t.Helper()
	o.Client, o.Daemon, o.Policy, o.State = s.client(), "sssd, "+s.name, policy, state
	observe(t, o)
}

const sssdPolicy = "reconnect, prelude sssd"

// startServices starts sssd with all of its services.
func startServices(t testing.TB) *daemons {
	t.Helper()
	d := startDaemonsWith(t, func(d *daemons) {
		names := "nss, pam, sudo, autofs, ssh"
		if hasPAC() {
			names += ", pac"
		}
		d.edit(t, "sssd.conf", "services = nss\n", "services = "+names+"\n")
	})
	// What libpam asks pam_sss.
	if err := os.WriteFile("/etc/pam.d/test", []byte("account required pam_sss.so\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove("/etc/pam.d/test") })
	return d
}

// clientBinary is test/sssd/client.c, built once.
var clientBinary = sync.OnceValues(func() (string, error) {
	arch, err := exec.Command("gcc", "-print-multiarch").Output()
	if err != nil {
		return "", err
	}
	return build("sssd/client.c", "-DLIBDIR=\""+strings.TrimSpace(string(arch))+"\"")
})

// startClient starts a client of services that waits to be asked.
func startClient(t testing.TB, u User, args ...string) *Lookup {
	t.Helper()
	bin, err := clientBinary()
	if err != nil {
		t.Fatal(err)
	}
	l := startRounds(t, u, bin, append(args, "-p")...)
	l.wantFailed(t, "at the start", 0)
	return l
}

func (s service) start(t testing.TB, threads int) *Lookup {
	t.Helper()
	args := []string{"-s", s.name, "-t", strconv.Itoa(threads)}
	if s.library {
		args = append(args, "-l")
	}
	return startClient(t, s.user, args...)
}

// connected counts a daemon's connections, accepted or not yet: the kernel gives
// its halves the listener's name.
func connected(t testing.TB, name string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		// address refcount protocol flags type state inode path; state 3: connected
		if f := strings.Fields(line); len(f) == 8 && f[7] == name && f[5] == "03" {
			n++
		}
	}
	return n
}

// alive counts those of them that have another end.
func alive(t testing.TB, name string) (n int) {
	t.Helper()
	out, err := exec.Command("ss", "-xaH").Output()
	if err != nil {
		t.Fatalf("ss: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		// netid state recv-q send-q name inode peer-name peer-inode
		if f := strings.Fields(line); len(f) >= 8 && f[1] == "ESTAB" && f[4] == name && f[7] != "0" {
			n++
		}
	}
	return n
}

func awaitConnected(t testing.TB, name string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to have %d connections", name, want), func() bool { return connected(t, name) == want })
}

// wantActions checks what a dump has recorded of connections to sssd.
func wantActions(t testing.TB, dir string, n int, action proto.Action) {
	t.Helper()
	rec := record(t, dir)
	if len(rec.Connections) != n {
		t.Errorf("%d connections recorded, expected %d: %v", len(rec.Connections), n, rec.Connections)
	}
	for _, c := range rec.Connections {
		if c.Action != action {
			t.Errorf("recorded: %v; expected %v", c, action)
		}
	}
}

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
						idle := connected(t, s.pipe())
						l := s.start(t, threads)
						fds, before := len(l.fds(t)), connected(t, s.pipe())
						own := before - idle
						dir := l.Dump(t)
						awaitConnected(t, s.pipe(), idle)
						if c.restart {
							d.do(t, "restart", "sssd")
							idle = connected(t, s.pipe()) // nscd may have had one
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
// client_idle_timeout: tevent tells nothing of a hangup to who waits to write.
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

// awaitAnswer waits until a lookup that was under way after n has ended, and
// tells how long that took.
func (l *Lookup) awaitAnswer(t testing.TB, n int) time.Duration {
	t.Helper()
	begun := time.Now()
	eventually(t, "the lookup that was under way", func() bool { now, _, _ := l.count(t); return now > n })
	return time.Since(begun)
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
		dir string
		o   Observation
	}
	var all []*one
	for _, w := range []way{byScript, byRPC, byDropin} {
		for _, s := range []service{{"nss", false, alice}, {"pam", true, alice}, {"sudo", false, root}} {
			c := &one{service: s, by: w, l: s.start(t, 2)}
			c.l.dumpBy, c.l.restoreBy = w, w
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
		c.o.Failed = c.l.failed(t)
		c.l.wantFailed(t, c.String()+" by "+c.by.String(), 0)
		c.o.By = c.by
		c.observe(t, "as it was: closed", "idle, sssd hung up before the dump", c.o)
	}
	nothingLeft(t)
}
