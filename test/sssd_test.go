// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const (
	nssPipe   = "/var/lib/sss/pipes/nss"
	sssdCache = "/var/lib/sss/mc/passwd"
	sssdLog   = "/var/log/sssd/sssd_nss.log"
	nscdCache = "/var/cache/nscd/group"
	// as Debian's nscd binds it
	nscdSocket = "/var/run/nscd/socket"
)

// daemons are real sssd and nscd, with a configuration of this test's.
type daemons struct{ conf string }

// startDaemons starts both; after the test everything is as before.
func startDaemons(t testing.TB) *daemons {
	t.Helper()
	return startDaemonsWith(t, func(*daemons) {})
}

// startDaemonsWith starts both after their configuration was edited.
func startDaemonsWith(t testing.TB, edit func(*daemons)) *daemons {
	t.Helper()
	before, err := os.ReadFile("/etc/nsswitch.conf")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemons{conf: t.TempDir()}
	for _, name := range []string{"sssd.conf", "nscd.conf", "nsswitch.conf"} {
		b, err := os.ReadFile(filepath.Join("sssd", name))
		if err != nil {
			t.Fatal(err)
		}
		d.write(t, name, string(b))
	}
	t.Cleanup(func() {
		d.do(t, "stop")
		if err := os.WriteFile("/etc/nsswitch.conf", before, 0o644); err != nil {
			t.Error(err)
		}
	})
	edit(d)
	d.do(t, "start")
	return d
}

// do starts, stops or restarts both daemons, or those that are named.
func (d *daemons) do(t testing.TB, action string, names ...string) {
	t.Helper()
	cmd := exec.Command("sssd/daemons", append([]string{action}, names...)...)
	cmd.Env = append(os.Environ(), "CRIUHOOK_TEST_CONF="+d.conf)
	// Not a pipe: the daemons would keep it.
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		b, _ := os.ReadFile(out.Name())
		t.Fatalf("daemons %s %v: %v\n%s", action, names, err, b)
	}
}

func (d *daemons) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(d.conf, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// edit changes a line of the configuration, for the next start.
func (d *daemons) edit(t testing.TB, name, old, new string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(d.conf, name))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), old) {
		t.Fatalf("%s does not say %q", name, old)
	}
	d.write(t, name, strings.ReplaceAll(string(b), old, new))
}

// fallBack lets lookups go on in files while sssd is away.
func (d *daemons) fallBack(t testing.TB) {
	t.Helper()
	d.edit(t, "nsswitch.conf", " [UNAVAIL=return TRYAGAIN=return]", "")
	b, err := os.ReadFile(filepath.Join(d.conf, "nsswitch.conf"))
	if err == nil {
		err = os.WriteFile("/etc/nsswitch.conf", b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// named finds the process with a name.
func named(t testing.TB, comm string) int {
	t.Helper()
	pids := running(comm)
	if len(pids) == 0 {
		t.Fatalf("no process is named %s", comm)
	}
	return pids[0]
}

// running lists the processes with a name.
func running(comm string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == comm {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			if stateOf(pid) != "Z" { // ended, and not yet waited for
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// client is a connection as sssd's log tells of it.
type client struct{ id, command, uid string }

// clients reads the log of sssd's name service since its start, which does away
// with the old one.
func clients(t testing.TB) []client {
	t.Helper()
	return clientsOf(t, "nss")
}

// clientsOf reads the log of one of sssd's services.
func clientsOf(t testing.TB, service string) []client {
	t.Helper()
	b, err := os.ReadFile("/var/log/sssd/sssd_" + service + ".log")
	if err != nil {
		t.Fatal(err)
	}
	var out []client
	for line := range strings.Lines(string(b)) {
		// … [CID#3] Client [cmd /tmp/lookup -o …][uid 1000][0x55…][23] connected!
		if !strings.HasSuffix(line, " connected!\n") {
			continue
		}
		_, rest, _ := strings.Cut(line, "[CID#")
		id, rest, _ := strings.Cut(rest, "] Client [cmd ")
		command, rest, ok := strings.Cut(rest, "][uid ")
		uid, _, _ := strings.Cut(rest, "]")
		if ok {
			out = append(out, client{id, command, uid})
		}
	}
	return out
}

// greeted reports whether a client of sssd has exchanged versions with it.
func greeted(t testing.TB, c client) bool {
	t.Helper()
	b, err := os.ReadFile(sssdLog)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "[CID#"+c.id+"]") && strings.Contains(line, "Offered version [1]") {
			return true
		}
	}
	return false
}
