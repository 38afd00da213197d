// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"criuhook/proto"
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
