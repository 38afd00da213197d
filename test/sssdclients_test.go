// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"maps"
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

// services are all that sssd has, by all clients that there are here. sudo's
// pipe is for root only.
func services() []service {
	return []service{
		{"nss", true, alice},
		{"nss", false, alice},
		{"pam", true, alice},
		{"pam", false, alice},
		{"sudo", false, root},
		{"autofs", true, alice},
		{"autofs", false, alice},
		{"ssh", false, alice},
		{"pac", false, alice},
	}
}

// byLibrary are those services whose client is the real library, or those whose
// client keeps its socket.
func byLibrary(library bool) []service {
	return slices.DeleteFunc(services(), func(s service) bool { return s.library != library })
}

func (s service) String() string {
	if s.library {
		return s.name + " library"
	}
	return s.name
}

const (
	keepsSocket = "sssd's protocol, a client that keeps its socket"
	everyClient = "each library, and a client that keeps its socket"
)

// client is what the table calls it.
func (s service) client() string {
	switch {
	case !s.library:
		return keepsSocket
	case s.name == "nss":
		return "libnss_sss"
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
	var names []string
	for _, s := range byLibrary(false) {
		names = append(names, s.name)
		// sssd would start without it.
		if _, err := os.Stat("/usr/libexec/sssd/sssd_" + s.name); err != nil {
			t.Fatalf("sssd's %s service is not in the sandbox, whose packages scripts/lib.sh names: %v", s.name, err)
		}
	}
	d := startDaemonsWith(t, func(d *daemons) {
		d.edit(t, "sssd.conf", "services = nss\n", "services = "+strings.Join(names, ", ")+"\n")
	})
	for _, s := range byLibrary(false) {
		named(t, "sssd_"+s.name)
	}
	// What libpam asks pam_sss.
	if err := os.WriteFile("/etc/pam.d/test", []byte("account required pam_sss.so\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove("/etc/pam.d/test") })
	// Else libnss_sss finds users in sssd's cache.
	t.Setenv("SSS_NSS_USE_MEMCACHE", "NO")
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

// startClient starts a client, with threads that take the services in turn and
// wait to be asked.
func startClient(t testing.TB, u User, threads int, of ...service) *Lookup {
	t.Helper()
	bin, err := clientBinary()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-p", "-t", strconv.Itoa(threads)}
	for _, s := range of {
		if s.library {
			args = append(args, "-l", s.name)
		} else {
			args = append(args, "-s", s.name)
		}
	}
	l := startRounds(t, u, bin, args...)
	l.wantFailed(t, "at the start", 0)
	return l
}

// responders are the processes of sssd's services, whose number changes if one
// crashes.
func responders(t testing.TB) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, s := range byLibrary(false) {
		out[s.name] = named(t, "sssd_"+s.name)
	}
	return out
}

// wantResponders checks that no service of sssd has ended.
func wantResponders(t testing.TB, before map[string]int) {
	t.Helper()
	if now := responders(t); !maps.Equal(now, before) {
		t.Errorf("sssd's services were the processes %v, now they are %v", before, now)
	}
}

// open counts a client's connections that have another end, by the name of sssd's
// service.
func (l *Lookup) open(t testing.TB) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, c := range l.connections(t) {
		if name, ok := strings.CutPrefix(string(c.Peer.Name), "/var/lib/sss/pipes/"); ok && c.State == sockpeer.Established {
			out[name]++
		}
	}
	return out
}

// connected counts a daemon's connections, accepted or not yet: the kernel gives
// its halves the listener's name.
func connected(t testing.TB, name string) int { return allConnected(t)[name] }

// allConnected counts them by the listener's name.
func allConnected(t testing.TB) map[string]int {
	t.Helper()
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for line := range strings.Lines(string(b)) {
		// address refcount protocol flags type state inode path; state 3: connected
		if f := strings.Fields(line); len(f) == 8 && f[5] == "03" {
			out[f[7]]++
		}
	}
	return out
}

// alive counts those of them that have another end.
func alive(t testing.TB, name string) int { return allAlive(t)[name] }

func allAlive(t testing.TB) map[string]int {
	t.Helper()
	out, err := exec.Command("ss", "-xaH").Output()
	if err != nil {
		t.Fatalf("ss: %v", err)
	}
	n := map[string]int{}
	for line := range strings.Lines(string(out)) {
		// netid state recv-q send-q name inode peer-name peer-inode
		if f := strings.Fields(line); len(f) >= 8 && f[1] == "ESTAB" && f[7] != "0" {
			n[f[4]]++
		}
	}
	return n
}

// steady waits until a daemon has closed what its clients have closed, and
// counts what it has then.
func steady(t testing.TB, name string) (n int) {
	t.Helper()
	eventually(t, name+" to have no connection that its client has closed", func() bool {
		n = connected(t, name)
		return n == alive(t, name)
	})
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

// awaitAnswer waits until a lookup that was under way after n has ended, and
// tells how long that took.
func (l *Lookup) awaitAnswer(t testing.TB, n int) time.Duration {
	t.Helper()
	begun := time.Now()
	eventually(t, "the lookup that was under way", func() bool { now, _, _ := l.count(t); return now > n })
	return time.Since(begun)
}

// Times that are promised for the first answer after a restore.
const (
	soonIdle = 50 * time.Millisecond
	soonBusy = time.Second
)

// wantSoon checks a promised time. again measures anew, for a machine that was
// busy with something else.
func wantSoon(t testing.TB, first, limit time.Duration, again func() time.Duration) {
	t.Helper()
	all := []time.Duration{first}
	for len(all) < 5 && all[len(all)-1] >= limit {
		all = append(all, again())
	}
	if all[len(all)-1] >= limit {
		t.Errorf("the first answer after a restore took %v, expected less than %v", all, limit)
	}
}

// wantMedian checks a promised time by the median of many.
func wantMedian(t testing.TB, all []time.Duration, limit time.Duration) {
	t.Helper()
	sorted := slices.Sorted(slices.Values(all))
	t.Logf("first answers: median %v, longest %v", sorted[len(sorted)/2], sorted[len(sorted)-1])
	if sorted[len(sorted)/2] >= limit {
		t.Errorf("the first answers after restores took %v, expected less than %v", sorted, limit)
	}
}
