// SPDX-License-Identifier: Apache-2.0

package test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSystemdUnits: systemd understands the units, and what they say of the
// program is true.
func TestSystemdUnits(t *testing.T) {
	need(t)
	dir := folder(t)
	units := map[string]string{}
	for _, name := range []string{"criuhook.service", "criuhook.socket"} {
		b, err := os.ReadFile(filepath.Join("../packaging/systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		units[name] = string(b)
		// The program is elsewhere here, and the manual is not installed.
		text := strings.ReplaceAll(string(b), "/usr/local/bin/criuhook", criuhook)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	service, socket := filepath.Join(dir, "criuhook.service"), filepath.Join(dir, "criuhook.socket")
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", service, socket).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", service).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Overall exposure level") {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
	// What restored processes would inherit must not be taken from the service.
	for _, line := range strings.Split(units["criuhook.service"], "\n") {
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "NoNewPrivileges", "PrivateTmp", "ProtectSystem", "ProtectHome", "PrivateNetwork":
			if value != "no" {
				t.Errorf("%s: a restored process would have that for ever", line)
			}
		case "CapabilityBoundingSet":
			if value != "~" {
				t.Errorf("%s: a restored process of root would lack capabilities", line)
			}
		case "KillMode":
			if value != "process" {
				t.Errorf("%s: stopping the service would kill what was restored", line)
			}
		case "SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies", "RestrictNamespaces",
			"RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute":
			t.Errorf("%s: a restored process would have that filter for ever", line)
		}
	}
}

// notices is what a program tells systemd.
func notices(t *testing.T) (path string, next func() string) {
	t.Helper()
	path = filepath.Join(folder(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return path, func() string {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(patience))
		b := make([]byte, 4096)
		n, err := c.Read(b)
		if err != nil {
			t.Fatalf("nothing was told: %v", err)
		}
		return string(b[:n])
	}
}

// activated starts the service the way systemd does, with a socket of that type,
// at the first connection.
func activated(t *testing.T, kind, path string, notify string, args ...string) *Service {
	t.Helper()
	s := runService(t, path, exec.Command("systemd-socket-activate",
		append([]string{kind, "--listen=" + path, "-E", "NOTIFY_SOCKET=" + notify, criuhook, "serve"}, args...)...))
	eventually(t, "systemd listens", func() bool { return strings.Contains(s.Log.String(), "Listening on") })
	return s
}

func TestSystemdActivation(t *testing.T) {
	need(t)
	path := filepath.Join(folder(t), "sock")
	notify, next := notices(t)
	s := activated(t, "--seqpacket", path, notify)
	if err := s.tryVersion(t); err != nil {
		t.Errorf("the client that it was started for: %v", err)
	}
	if got := next(); got != "READY=1" {
		t.Errorf("systemd was told %q", got)
	}
	if err := s.tryVersion(t); err != nil {
		t.Errorf("the next client: %v", err)
	}
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "STOPPING=1" {
		t.Errorf("systemd was told %q", got)
	}
	s.ended(t)
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("systemd's socket is gone: %v", err)
	}
	nothingLeft(t)
	noCRIULeft(t)
}

// TestSystemdActivationRefused: a unit that is wrong is told so, not half used.
func TestSystemdActivationRefused(t *testing.T) {
	need(t)
	for _, tt := range []struct {
		kind, network, want string
		args                []string
	}{
		// A stream is what it makes if nothing is said.
		{"--setenv=STREAM=1", "unix", "not of type seqpacket", nil},
		{"--datagram", "unixgram", "not of type seqpacket", nil},
		{"--seqpacket", "unixpacket", "leave --listen out", []string{"--listen", "/run/x.sock"}},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			path := filepath.Join(folder(t), "sock")
			notify, _ := notices(t)
			s := activated(t, tt.kind, path, notify, tt.args...)
			c, err := net.Dial(tt.network, path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = c.Write([]byte("x"))
			s.ended(t)
			if code := s.cmd.ProcessState.ExitCode(); code == 0 || !strings.Contains(s.Log.String(), tt.want) {
				t.Errorf("exit status %d:\n%s", code, s.Log.String())
			}
		})
	}
	nothingLeft(t)
}

// TestServiceSocket: what is left of a service that was killed does not stand in
// the way, and what is not a socket is left alone.
func TestServiceSocket(t *testing.T) {
	need(t)
	s := startService(t)
	_ = s.cmd.Process.Kill()
	s.ended(t)
	again := startServiceAs(t, s.Path, exec.Command(criuhook, "serve", "--listen", s.Path))
	info, err := os.Lstat(s.Path)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	out, err := exec.Command(criuhook, "serve", "--listen", s.Path).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "somebody listens there already") {
		t.Errorf("a second one: %v, %s", err, out)
	}
	if err := again.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := again.tryVersion(t); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	again.stop(t)
	if err := os.WriteFile(s.Path, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command(criuhook, "serve", "--listen", s.Path).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "not a socket") {
		t.Errorf("over a file: %v, %s", err, out)
	}
	if b, err := os.ReadFile(s.Path); err != nil || string(b) != "mine" {
		t.Errorf("the file: %q, %v", b, err)
	}
	// Where others are let in, the mode lets them, too.
	path := filepath.Join(folder(t), "sock")
	open := startServiceAs(t, path, exec.Command(criuhook, "serve", "--listen", path, "--config", withAccess(t, "{uids: [1000]}")))
	eventually(t, "the socket is everybody's", func() bool {
		info, err := os.Lstat(path)
		return err == nil && info.Mode().Perm() == 0o666
	})
	open.stop(t)
	nothingLeft(t)
}

// TestServiceStoppedAtOnce: a service that is stopped as soon as it has a socket
// takes it away, as later on.
func TestServiceStoppedAtOnce(t *testing.T) {
	need(t)
	for range 20 {
		path := filepath.Join(folder(t), "sock")
		s := &Service{Path: path, cmd: exec.Command(criuhook, "serve", "--listen", path), done: make(chan struct{})}
		s.cmd.Stdout, s.cmd.Stderr = &s.Log, &s.Log
		if err := s.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = s.cmd.Wait()
			close(s.done)
		}()
		for end := time.Now().Add(patience); time.Now().Before(end); {
			if _, err := os.Lstat(path); err == nil {
				break
			}
		}
		s.stop(t)
	}
	nothingLeft(t)
}
