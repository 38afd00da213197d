// SPDX-License-Identifier: Apache-2.0

package prelude_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"criuhook/sockpeer/prelude"
)

// TestRealBus speaks to a real dbus-daemon, where there is one.
func TestRealBus(t *testing.T) {
	daemon, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("no dbus-daemon here; the end-to-end tests have one:", err)
	}
	sock := filepath.Join(t.TempDir(), "bus")
	cmd := exec.Command(daemon, "--session", "--nofork", "--nosyslog", "--nopidfile", "--address=unix:path="+sock)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var c net.Conn
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if c, err = net.Dial("unix", sock); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := prelude.Run("dbus", c, prelude.Peer{Path: sock, UID: uint32(os.Getuid())}); err != nil {
		t.Fatal(err)
	}
	// Nothing is left: a Ping is answered next.
	ping := message(le, 1, 0, field{code: 1, text: "/", sig: 'o'}, field{code: 2, text: "org.freedesktop.DBus.Peer"}, field{code: 3, text: "Ping"}, field{code: 6, text: "org.freedesktop.DBus"})
	if _, err := c.Write(ping); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 16)
	if _, err := c.Read(head); err != nil || head[0] != 'l' || head[1] != 2 {
		t.Errorf("the first thing after the prelude is %x, %v; expected the reply to a Ping", head, err)
	}
}
