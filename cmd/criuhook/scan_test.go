// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// clientVariable makes this test binary a client of the socket it names.
const clientVariable = "CRIUHOOK_TEST_CLIENT"

func TestMain(m *testing.M) {
	if path := os.Getenv(clientVariable); path != "" {
		if err := client(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// client holds a connection, under two fds and an evil name, until its stdin
// ends. Not by package net: a thread in epoll_wait would make it busy.
func client(path string) error {
	if err := os.WriteFile("/proc/self/comm", []byte("\x1b[1mevil"), 0); err != nil {
		return err
	}
	if path != "-" {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			return err
		}
		if _, err := unix.Dup(fd); err != nil {
			return err
		}
	}
	fmt.Println("connected")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func startClient(t *testing.T, path string) (pid int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), clientVariable+"="+path)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("client: %v", err)
		}
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "connected\n" {
		t.Fatalf("client said %q: %v", line, err)
	}
	return cmd.Process.Pid
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot look into other processes")
	}
}

// listen makes a listener with an odd name.
func listen(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "ch")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s\x1b[2J.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestScan(t *testing.T) {
	needRoot(t)
	l := listen(t)
	path := l.Addr().String()
	pid := fmt.Sprint(startClient(t, path))
	dir, base := filepath.Split(path)
	shown := dir + strings.ReplaceAll(base, "\x1b", `\x1b`)
	rules := write(t, "rules:\n  - name: mine\n    path: "+dir+"*\n    idle: reconnect\n")

	get := func(wantCode int, args ...string) (scanOutput, string) {
		t.Helper()
		code, table, stderr := invoke(t, append([]string{"scan", "--pid", pid}, args...)...)
		if code != wantCode || stderr != "" {
			t.Errorf("exit code %d, want %d\n%s%s", code, wantCode, stderr, table)
		}
		checkText(t, table)
		if jsonCode, text, _ := invoke(t, append([]string{"scan", "--pid", pid, "-o", "json"}, args...)...); jsonCode != wantCode {
			t.Errorf("exit code %d, want %d\n%s", jsonCode, wantCode, text)
		} else {
			var out scanOutput
			d := json.NewDecoder(bytes.NewReader([]byte(text)))
			d.DisallowUnknownFields()
			if err := d.Decode(&out); err != nil {
				t.Fatal(err)
			}
			checkText(t, text)
			if len(out.Connections) != 1 {
				t.Fatalf("%d connections, want 1:\n%s", len(out.Connections), text)
			}
			return out, table
		}
		return scanOutput{}, table
	}

	out, _ := get(exitRefused)
	if c := out.Connections[0]; c.State != "unaccepted" || c.Verdict.Action != "refuse" || !strings.Contains(c.Verdict.Advice, "to do:") {
		t.Errorf("not accepted yet: %+v", c)
	}

	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	out, table := get(exitRefused)
	if out.Refused != 1 || !strings.Contains(table, "no rule covers it") || !strings.Contains(table, "rules:\n") {
		t.Errorf("without a rule: %+v\n%s", out, table)
	}

	out, table = get(exitDone, "--config", rules)
	c := out.Connections[0]
	if c.State != "idle" || c.Verdict.Action != "reconnect" || c.Verdict.Rule != "mine" || !strings.HasPrefix(c.Verdict.RuleSource, rules+":") ||
		c.Peer.Name != shown || c.Peer.PID != os.Getpid() || c.Peer.UID == nil || *c.Peer.UID != 0 || out.Refused != 0 {
		t.Errorf("with a rule: %+v", c)
	}
	if len(c.Holders) != 2 || c.Holders[0].Command != `\x1b[1mevil` || !c.Holders[0].Cloexec || c.Holders[1].Cloexec {
		t.Errorf("holders: %+v", c.Holders)
	}
	if fds := fmt.Sprintf("%d,%d", c.Holders[0].FD, c.Holders[1].FD); !strings.Contains(table, fds) || !strings.Contains(table, " idle ") {
		t.Errorf("want %s, idle:\n%s", fds, table)
	}
	checkText(t, table)
	if !strings.Contains(table, "  "+shown+"  ") || strings.Contains(table, "…") {
		t.Errorf("not whole:\n%s", table)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("unknown: %s (process %d) at %s", exe, os.Getpid(), shown); c.Is != want || c.Daemon != "" ||
		!strings.Contains(strings.Join(strings.Fields(table), " "), want) {
		t.Errorf("it is said to be %q, expected %q:\n%s", c.Is, want, table)
	}

	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	out, _ = get(exitDone, "--config", rules)
	if c := out.Connections[0]; c.State != "busy" || c.Verdict.Action != "hangup" || c.Verdict.Busy == "" || c.RecvQueue != 1 {
		t.Errorf("with an unread byte: %+v", c)
	}
}

func TestScanAll(t *testing.T) {
	needRoot(t)
	l := listen(t)
	pid := startClient(t, l.Addr().String())
	_, text, stderr := invoke(t, "scan", "-o", "json")
	var out scanOutput
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	for _, c := range out.Connections {
		if c.Holders[0].PID == pid {
			return
		}
	}
	t.Errorf("process %d is not there:\n%s", pid, text)
}

func TestScanNothing(t *testing.T) {
	needRoot(t)
	pid := fmt.Sprint(startClient(t, "-"))
	code, stdout, stderr := invoke(t, "scan", "--pid", pid)
	if want := "no connection leaves the tree of process " + pid + "\n"; code != exitDone || stdout != want || stderr != "" {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
	if _, stdout, _ = invoke(t, "scan", "--pid", pid, "-o", "json"); !strings.Contains(stdout, `"connections": []`) {
		t.Error(stdout)
	}
}
