// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"criuhook/test/rpcclients/gocriu"
)

// libcriuBinary is test/rpcclients/libcriu.c, built once.
var libcriuBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "libcriu")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "client")
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-o", bin, "rpcclients/libcriu.c", "-lcriu").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build client: %w\n%s", err, out)
	}
	return bin, os.Chmod(dir, 0o755)
})

// An rpcClient runs one request and returns what it printed, without what differs
// from run to run.
type rpcClient func(t testing.TB, args ...string) string

// libcriuAt is the C client of a service or of a CRIU: "unix:PATH", "bin:PATH".
func libcriuAt(where string) rpcClient {
	return func(t testing.TB, args ...string) string {
		t.Helper()
		bin, err := libcriuBinary()
		if err != nil {
			t.Fatal(err)
		}
		return runClient(t, bin, append([]string{where}, args...)...)
	}
}

// gocriuAt is the Go client of a CRIU.
func gocriuAt(criu string) rpcClient {
	return func(t testing.TB, args ...string) string {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		return runClient(t, self, append([]string{gocriu.Role, criu}, args...)...)
	}
}

// gocriuBridged is the Go client of a service.
func gocriuBridged(socket string) rpcClient {
	return func(t testing.TB, args ...string) string {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv(gocriu.BridgeVariable, socket)
		defer os.Unsetenv(gocriu.BridgeVariable)
		return gocriuAt(self)(t, args...)
	}
}

func runClient(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	// No pipe: a process that is restored by swrk would hold it.
	out, err := os.CreateTemp("", "out")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	_ = cmd.Run()
	if ctx.Err() != nil {
		t.Errorf("%s %q does not end", name, args)
	}
	b, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// dropinCRIU is a link to our binary by the name criu.
func dropinCRIU(t testing.TB) string {
	t.Helper()
	link := filepath.Join(folder(t), "criu")
	if err := os.Symlink(criuhook, link); err != nil {
		t.Fatal(err)
	}
	return link
}

// same runs a request by a stock CRIU and by us, and compares what comes back. It
// returns that.
func same(t *testing.T, stock, ours rpcClient, what string, args func() []string) string {
	t.Helper()
	want := stock(t, args()...)
	got := ours(t, args()...)
	if got != want {
		t.Errorf("%s: the client of criuhook sees\n%sthat of CRIU\n%s", what, got, want)
	}
	return got
}

// TestClients compares what programs see on libcriu and go-criu: results, errno,
// notifications and their order, by the socket and by swrk.
func TestClients(t *testing.T) {
	need(t)
	ours, stock := startService(t), stockService(t)
	dropin := dropinCRIU(t)
	for _, tt := range []struct {
		name        string
		stock, ours rpcClient
		c           bool
	}{
		{"libcriu, socket", libcriuAt("unix:" + stock.Path), libcriuAt("unix:" + ours.Path), true},
		{"libcriu, swrk", libcriuAt("bin:/usr/sbin/criu"), libcriuAt("bin:" + dropin), true},
		{"go-criu, socket", gocriuBridged(stock.Path), gocriuBridged(ours.Path), false},
		{"go-criu, swrk", gocriuAt("/usr/sbin/criu"), gocriuAt(dropin), false},
	} {
		t.Run(tt.name, func(t *testing.T) { compareClients(t, tt.stock, tt.ours, tt.c) })
	}
	ours.stop(t)
	_ = stock.cmd.Process.Kill()
	stock.ended(t)
	nothingLeft(t)
	noCRIULeft(t)
}

func compareClients(t *testing.T, stock, ours rpcClient, c bool) {
	done := "done\n"
	if c {
		done = "result 0\n"
	}
	if got := same(t, stock, ours, "version", func() []string { return []string{"version"} }); !strings.Contains(got, "version 4") {
		t.Errorf("version: %q", got)
	}
	a := startApp(t, root, nil) // without connections, for CRIU alone
	pid := strconv.Itoa(a.PID)
	var dir string
	dump := func(args ...string) func() []string {
		return func() []string {
			dir = images(t)
			return append([]string{"dump", dir, pid}, args...)
		}
	}
	if got := same(t, stock, ours, "dump", dump("leave")); got != done {
		t.Errorf("dump: %q", got)
	}
	if got := same(t, stock, ours, "dump with notifications", dump("leave", "notify")); !strings.HasPrefix(got, "notify pre-dump\n") || !strings.HasSuffix(got, done) {
		t.Errorf("dump with notifications: %q", got)
	}
	good := dir
	for _, stage := range []string{"pre-dump", "post-dump"} {
		opts := []string{"leave", "fail=" + stage}
		if c {
			opts = append(opts, "notify")
		}
		if got := same(t, stock, ours, "dump that "+stage+" fails", dump(opts...)); strings.HasSuffix(got, done) {
			t.Errorf("dump that %s fails: %q", stage, got)
		}
		a.Awake(t)
	}
	same(t, stock, ours, "dump of no process", func() []string { return []string{"dump", images(t), "4194303"} })
	same(t, stock, ours, "pre-dump of no process", func() []string { return []string{"predump", images(t), "4194303"} })
	// These succeed where the kernel tracks memory. Where it does not, the clients
	// see the same failure, and TestServicePreDumps has a fake.
	same(t, stock, ours, "pre-dump", func() []string { return []string{"predump", images(t), pid} })
	if c {
		same(t, stock, ours, "pre-dumps and a dump", func() []string { return []string{"iters", images(t), pid, "leave"} })
	}
	a.Awake(t)
	restore := func(args ...string) func() []string {
		return func() []string { return append([]string{"restore", good}, args...) }
	}
	// CRIU's message has the pid that it could not have.
	same(t, stock, ours, "restore of a process that runs", restore())
	same(t, stock, ours, "restore of nothing", func() []string { return []string{"restore", images(t)} })
	a.Kill(t)
	var seen []string
	for _, by := range []rpcClient{stock, ours} {
		seen = append(seen, by(t, restore("notify")()...))
		a.Awake(t)
		a.Kill(t)
	}
	if seen[0] != seen[1] || !strings.Contains(seen[0], "notify post-restore") {
		t.Errorf("restore: the client of criuhook sees\n%sthat of CRIU\n%s", seen[1], seen[0])
	}
	threads := a.dumpedThreads(good)
	awaitFree(t, threads)
	same(t, stock, ours, "restore that post-restore fails", func() []string {
		awaitFree(t, threads)
		return restore("notify", "fail=post-restore")()
	})
	awaitFree(t, threads)
}

// TestClientsConnected: by each client and way a process with a connection to a
// daemon, dumped with pre-dumps before where that can be.
func TestClientsConnected(t *testing.T) {
	need(t)
	s := startService(t)
	dropin := dropinCRIU(t)
	for _, tt := range []struct {
		name    string
		by      rpcClient
		c, swrk bool
	}{
		{"libcriu, socket", libcriuAt("unix:" + s.Path), true, false},
		{"libcriu, swrk", libcriuAt("bin:" + dropin), true, true},
		{"go-criu, socket", gocriuBridged(s.Path), false, false},
		{"go-criu, swrk", gocriuAt(dropin), false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, path := daemon(t, "unix", "reconnect")
			a := startApp(t, root, nil)
			a.connect(t, "c", path)
			a.Request(t, "c")
			good, dir, pid := "done\n", images(t), strconv.Itoa(a.PID)
			expect := func(what, got, want string) {
				t.Helper()
				if !strings.HasSuffix(got, want) {
					t.Fatalf("%s: %q\n%s", what, got, tailOf(filepath.Join(dir, "criu.log")))
				}
			}
			from := dir
			if tt.c {
				good = "result 0\n"
				if tracksMemory(t) {
					expect("pre-dumps and a dump", tt.by(t, "iters", dir, pid, "notify"), good)
					from = filepath.Join(dir, "3")
				}
			}
			if from == dir {
				expect("dump", tt.by(t, "dump", dir, pid, "notify"), good)
			}
			a.Gone(t)
			verb, want := "restore", good
			if tt.c {
				want = "a pid came back\n"
			}
			expect("restore", tt.by(t, verb, from, "notify"), want)
			a.Request(t, "c")
			a.Kill(t)
			if tt.c && tt.swrk {
				// What is restored is the client's child, and ends with nobody to reap it
				// but pid 1, when the client is gone.
				expect("restore of a child", tt.by(t, "child", from), "wait knows it\na pid came back\n")
				a.Request(t, "c")
				a.Kill(t)
			}
			if n := len(srv.Clients()); n < 2 {
				t.Errorf("the daemon saw %d connections", n)
			}
		})
	}
	s.stop(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// tracksMemory tells whether this kernel can tell CRIU what memory has changed.
func tracksMemory(t testing.TB) bool {
	t.Helper()
	return exec.Command("criu", "check", "--feature", "mem_dirty_track").Run() == nil
}

// TestClientSelf: a program that dumps itself finds its connection to the service
// again, with the answer in it, and that to the daemon, too.
func TestClientSelf(t *testing.T) {
	need(t)
	s, by := startService(t), stockService(t, "--action-script="+criuhook)
	t.Run("serve", func(t *testing.T) { dumpsItself(t, root, s, s) })
	t.Run("script", func(t *testing.T) { dumpsItself(t, root, by, s) })
	hers := startService(t, "--config", withAccess(t, "{uids: [1000]}"))
	t.Run("alice", func(t *testing.T) { dumpsItself(t, alice, hers, s) })
	hers.stop(t)
	s.stop(t)
	_ = by.cmd.Process.Kill()
	by.ended(t)
	nothingLeft(t)
	noCRIULeft(t)
}

// dumpsItself has a program dump itself by one service; another one restores it, too.
func dumpsItself(t *testing.T, u User, s, ours *Service) {
	srv, path := daemon(t, "unix", "reconnect")
	dir := imagesOf(t, u)
	out := filepath.Join(folder(t), "out")
	bin, err := libcriuBinary()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, u, nil, bin, "unix:"+s.Path, "self", dir, out, path)
	p.Gone(t)
	log := func() string { return tailOf(filepath.Join(dir, "criu.log")) }
	if b, err := os.ReadFile(out); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the program has gone on after its own dump: %q, %v\n%s", b, err, log())
	}
	said := func() string { b, _ := os.ReadFile(out); return string(b) }
	// By each of the ways to restore: the answer is in the images.
	for name, restore := range map[string]func() string{
		"service": func() string { return libcriuAt("unix:"+ours.Path)(t, "restore", dir) },
		"swrk":    func() string { return libcriuAt("bin:"+dropinCRIU(t))(t, "restore", dir) },
		"verb": func() string {
			r := byRPC.restore(dir, true, "-v4", "-o", "criu.log").run(t, u, filepath.Join(dir, "criu.log"))
			return r.Output
		},
	} {
		_ = os.Remove(out)
		msg := restore()
		want := "1 ok, the daemon answers\n"
		ok := false
		for end := time.Now().Add(patience); !ok && time.Now().Before(end); time.Sleep(time.Millisecond) {
			ok = said() == want
		}
		if !ok {
			t.Errorf("%s: %q; the restored program says %q, expected %q\n%s", name, msg, said(), want, log())
		}
		q := &Process{PID: p.PID}
		q.Kill(t)
	}
	// And that of a program that goes on.
	_ = os.Remove(out)
	stays := start(t, u, nil, bin, "unix:"+s.Path, "self", imagesOf(t, u), out, path, "leave")
	eventually(t, "the program to go on", func() bool { return said() == "0 ok, the daemon answers\n" })
	stays.Gone(t)
	if n := len(srv.Clients()); n != 5 {
		t.Errorf("the daemon saw %d connections, expected 5", n)
	}
}
