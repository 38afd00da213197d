// SPDX-License-Identifier: Apache-2.0

package test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/criuhook/rule"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// untouched checks that an application goes on with the connection it had
// before a dump that failed or left it running: the same socket, and a daemon
// that saw no other connection and no end of this one.
func (a *App) untouched(t testing.TB, srv *echo.Server, conn string, before app.Details) {
	t.Helper()
	if after := a.Details(t, conn); after != before {
		t.Errorf("after the dump %+v, before it %+v", after, before)
	}
	a.Request(t, conn)
	if c := srv.Clients(); len(c) != 1 || c[0].EOF {
		t.Errorf("the daemon saw %+v, expected one connection, open", c)
	}
	nothingLeft(t)
}

// noRecord checks that nobody can take a directory for finished images.
func noRecord(t testing.TB, dir string) {
	t.Helper()
	if _, err := image.ReadRecord(dir); !errors.Is(err, image.ErrNoRecord) && !errors.Is(err, image.ErrUnfinished) {
		t.Errorf("record of a dump that failed: %v, expected none", err)
	}
}

// failed checks that a dump failed, for reasons that are told.
func (r Result) failed(t testing.TB, dir string, messages ...string) {
	t.Helper()
	const exitFailed = 1
	r.wantFailed(t, dir, exitFailed, messages...)
}

// refused checks that a dump failed because a rule says so.
func (r Result) refused(t testing.TB, dir string, messages ...string) {
	t.Helper()
	const exitRefused = 3
	r.wantFailed(t, dir, exitRefused, messages...)
}

// wantFailed checks that a dump failed, by the verb with its own exit code, else
// with any of CRIU's.
func (r Result) wantFailed(t testing.TB, dir string, code int, messages ...string) {
	t.Helper()
	if r.Code == 0 || r.By == byRPC && r.Code != code {
		t.Fatalf("the dump should have failed, by the verb with exit code %d; exit code %d\n%s\n%s", code, r.Code, r.Output, r.tail())
	}
	r.wantMessage(t, messages...)
	noRecord(t, dir)
}

func TestHangup(t *testing.T) {
	ways(t, func(t *testing.T) {
		for network, typ := range map[string]int{"unix": unix.SOCK_STREAM, "unixpacket": unix.SOCK_SEQPACKET} {
			t.Run(network, func(t *testing.T) {
				srv, path := daemon(t, network, "hangup")
				a := startApp(t, alice, nil)
				a.connectType(t, "c", path, typ)
				a.Request(t, "c")
				before := a.Details(t, "c")
				dir := a.Dump(t)
				wantRecorded(t, dir, 1)
				a.Restore(t, dir)
				if got := a.Do(t, app.Command{Op: "poll", Conn: "c"}).Text; !strings.Contains(got, " HUP") || !strings.HasPrefix(got, "IN ") {
					t.Errorf("poll shows %q, expected input and HUP", got)
				}
				a.wantHungUp(t, "c")
				if after := a.Details(t, "c"); after.FD != before.FD || after.Flags != before.Flags || after.Cloexec != before.Cloexec {
					t.Errorf("after the restore %+v, before the dump %+v", after, before)
				}
				if n := len(srv.Clients()); n != 1 {
					t.Errorf("the daemon saw %d connections, expected 1", n)
				}
				nothingLeft(t)
			})
		}
	})
}

func TestRefuse(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, c := range []struct {
			name, socket string
			args, says   []string
		}{
			{"by rule", "refuse", nil, []string{"rule t-refuse, /etc/criuhook/config.yaml", "the rule refuses such connections", "change rule t-refuse"}},
			{"by rule, leave running", "refuse", []string{"--leave-running"}, []string{"t-refuse"}},
			{"by rule, ext-unix-sk", "refuse", []string{"--ext-unix-sk"}, []string{"t-refuse"}},
			{"no rule", "other", nil, []string{"no rule covers it, and unknown is refuse", "/etc/criuhook/rules.d/"}},
			{"no rule, leave running", "other", []string{"--leave-running"}, []string{"no rule covers it"}},
			{"no rule, ext-unix-sk", "other", []string{"--ext-unix-sk"}, []string{"no rule covers it"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				srv, path := daemon(t, "unix", c.socket)
				a := startApp(t, alice, nil)
				a.connect(t, "c", path)
				a.Request(t, "c")
				before := a.Details(t, "c")
				dir := images(t)
				r := a.TryDump(t, dir, c.args...)
				r.refused(t, dir, append(c.says, a.who(t, before), path,
					fmt.Sprintf("process %d", os.Getpid()), "uid 0", "outbound unix stream connection")...)
				a.untouched(t, srv, "c", before)
			})
		}
	})
}

// TestRefusalIsLogged: where the log goes to a file of ours, that says why, once, by
// every way.
func TestRefusalIsLogged(t *testing.T) {
	eachWay(t, []way{byScript, byRPC, byDropin, bySwrk}, func(t *testing.T) {
		_, path := daemon(t, "unix", "other")
		a := startApp(t, root, nil)
		a.connect(t, "c", path)
		dir, file := images(t), filepath.Join(t.TempDir(), "log")
		t.Setenv("CRIUHOOK_LOG_FILE", file)
		if r := a.TryDump(t, dir); r.Code == 0 {
			t.Fatalf("the dump should have been refused\n%s", r.Output)
		}
		// The process beside swrk says it when its client has had the answer.
		eventually(t, "the reason is in the log", func() bool {
			log, _ := os.ReadFile(file) // which that makes
			return strings.Contains(string(log), "no rule covers it")
		})
		nothingLeft(t)
		log, err := os.ReadFile(file)
		if n := strings.Count(string(log), "no rule covers it"); err != nil || n != 1 || !strings.Contains(string(log), path) {
			t.Errorf("logged %d times: %q, %v", n, log, err)
		}
	})
}

// TestImagesDirIsNamed: what is wrong in the images directory is told with its name,
// whatever it is called among processes, and wherever the pages go.
func TestImagesDirIsNamed(t *testing.T) {
	eachWay(t, []way{byScript, byRPC, byDropin, bySwrk}, func(t *testing.T) {
		for _, pages := range []string{"here", "page server"} {
			t.Run(pages, func(t *testing.T) {
				_, path := daemon(t, "unix", "reconnect")
				a := startApp(t, root, nil)
				a.connect(t, "c", path)
				dir := images(t)
				plan := filepath.Join(dir, "criuhook.plan")
				if err := os.MkdirAll(filepath.Join(plan, "full"), 0o700); err != nil {
					t.Fatal(err)
				}
				var args []string
				if pages != "here" {
					port := freePort(t)
					server := exec.Command("criu", "page-server", "-D", images(t), "--address", "127.0.0.1", "--port", strconv.Itoa(port))
					if err := server.Start(); err != nil {
						t.Fatal(err)
					}
					defer func() {
						_ = server.Process.Kill() // it may have ended
						_ = server.Wait()
					}()
					eventually(t, "the page server listens", func() bool { return listens(port) })
					args = []string{"--page-server", "--address", "127.0.0.1", "--port", strconv.Itoa(port)}
				}
				r := a.TryDump(t, dir, args...)
				if r.Code == 0 || !strings.Contains(r.Output+r.Log, "remove "+plan+": ") {
					t.Errorf("exit code %d\n%s\n%s", r.Code, r.Output, r.tail())
				}
				for line := range strings.Lines(r.Output + r.Log) {
					if strings.Contains(line, "criuhook: ") && strings.Contains(line, "/proc/") {
						t.Error(line)
					}
				}
				nothingLeft(t)
			})
		}
	})
}

// who is how messages name the holder of a connection.
func (a *App) who(t testing.TB, d app.Details) string {
	t.Helper()
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("process %d (%s) fd %d", a.PID, strings.TrimSpace(string(comm)), d.FD)
}

// CRIU itself would dump a datagram socket under --ext-unix-sk.
func TestRefuseDatagramWithExtUnixSk(t *testing.T) {
	ways(t, func(t *testing.T) {
		for _, socket := range []string{"refuse", "other"} {
			t.Run(socket, func(t *testing.T) {
				path := filepath.Join(folder(t), socket)
				l := datagrams(t, path)
				a := startApp(t, alice, nil)
				a.connectType(t, "c", path, unix.SOCK_DGRAM)
				before := a.Details(t, "c")
				dir := images(t)
				r := a.TryDump(t, dir, "--ext-unix-sk")
				r.refused(t, dir, a.who(t, before), path, "outbound unix dgram connection")
				if after := a.Details(t, "c"); after != before {
					t.Errorf("after the dump %+v, before it %+v", after, before)
				}
				a.wantDatagram(t, "c", l)
				nothingLeft(t)
			})
		}
	})
}

// snippet takes the rule that a message gives out of it, as a person would.
func snippet(t testing.TB, output string) string {
	t.Helper()
	var b strings.Builder
	const indent = "    "
	_, rest, ok := strings.Cut(output, indent+"rules:\n")
	if !ok {
		t.Fatalf("the message gives no rule:\n%s", output)
	}
	b.WriteString("rules:\n")
	for line := range strings.Lines(rest) {
		text, ok := strings.CutPrefix(line, indent)
		if !ok {
			break
		}
		b.WriteString(text)
	}
	return b.String()
}

// install puts a file into rules.d for the time of the test.
func install(t testing.TB, text string) {
	t.Helper()
	if _, err := rule.Parse("the message", strings.NewReader(text)); err != nil {
		t.Fatalf("the rule in the message is no good: %v\n%s", err, text)
	}
	file := filepath.Join(rule.Dir(rule.DefaultConfig), "x.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestSnippetAllows(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "other[1]")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		before := a.Details(t, "c")
		dir := images(t)
		r := a.TryDump(t, dir)
		r.refused(t, dir)
		a.untouched(t, srv, "c", before)

		install(t, snippet(t, r.Output))
		a.TryDump(t, dir).want(t, "dump with the rule of the message", 0)
		a.Dumped(t, dir)
		a.Restore(t, dir)
		a.Request(t, "c")
		nothingLeft(t)
	})
}

func TestRefuseInbound(t *testing.T) {
	ways(t, func(t *testing.T) {
		path := filepath.Join(folder(t), "app")
		a := startApp(t, alice, nil)
		a.Do(t, app.Command{Op: "accept", Conn: "c", To: path})
		client, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		var before app.Details
		eventually(t, "the application accepts", func() bool {
			ans, err := a.Try(app.Command{Op: "details", Conn: "c"})
			before = ans.Conn
			return err == nil
		})
		alive := func() {
			t.Helper()
			if after := a.Details(t, "c"); after != before {
				t.Errorf("after the dump %+v, before it %+v", after, before)
			}
			a.Do(t, app.Command{Op: "write", Conn: "c", Text: "hello"})
			b := make([]byte, 16)
			if err := client.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if n, err := client.Read(b); err != nil || string(b[:n]) != "hello" {
				t.Errorf("the client got %q, %v from the application", b[:n], err)
			}
			nothingLeft(t)
		}
		var r Result
		for _, args := range [][]string{nil, {"--leave-running"}, {"--ext-unix-sk"}} {
			dir := images(t)
			r = a.TryDump(t, dir, args...)
			r.refused(t, dir, a.who(t, before), "inbound unix stream connection", path, "inbound is refuse", fmt.Sprintf("process %d", os.Getpid()))
			alive()
		}
		install(t, snippet(t, r.Output))
		dir := a.Dump(t)
		a.Restore(t, dir)
		a.wantHungUp(t, "c")
		nothingLeft(t)
	})
}

// A dump that CRIU gives up after our part of it.
func TestDumpFailsOtherwise(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		before := a.Details(t, "c")
		a.Do(t, app.Command{Op: "ghost", Conn: "ghost", Value: 2 << 20}) // CRIU's limit is 1 MiB
		dir := images(t)
		for range 2 {
			r := a.TryDump(t, dir)
			r.failed(t, dir)
			if !strings.Contains(r.Log, "ghost") {
				t.Errorf("the dump failed for another reason than expected:\n%s", r.tail())
			}
			a.untouched(t, srv, "c", before)
		}
		a.TryDump(t, dir, "--ghost-limit", strconv.Itoa(4<<20)).want(t, "dump into the same directory", 0)
		a.Dumped(t, dir)
		wantRecorded(t, dir, 1)
		a.Restore(t, dir)
		a.Request(t, "c")
		nothingLeft(t)
	})
}
