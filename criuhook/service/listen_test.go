// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/service"
)

// short is a directory of so short a name that sockets fit into it.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "svc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListen(t *testing.T) {
	path := filepath.Join(short(t), "made", "sock")
	l, err := service.Listen(path, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o640 {
		t.Errorf("%v, %v", info, err)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the directory: %v, %v", info, err)
	}
	if _, err := service.Listen(path, 0o600); err == nil || !strings.Contains(err.Error(), "somebody listens there already") {
		t.Errorf("a second one: %v", err)
	}
	if c, err := net.Dial("unixpacket", path); err != nil {
		t.Errorf("the first is gone: %v", err)
	} else {
		c.Close()
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

// TestListenLocked: who can read the directory cannot keep the service from
// listening there.
func TestListenLocked(t *testing.T) {
	dir := short(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "sock")
	l, err := service.Listen(path, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(path + ".lock"); err != nil || info.Mode() != 0o600 {
		t.Errorf("what is locked: %v, %v", info, err)
	}
}

// TestListenStale: what a service that was killed leaves.
func TestListenStale(t *testing.T) {
	path := filepath.Join(short(t), "sock")
	old, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close()
	l, err := service.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenLeavesAlone(t *testing.T) {
	dir := short(t)
	file, link, stream := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "stream")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "nowhere"), link); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", stream)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for path, want := range map[string]string{
		file: "not a socket", link: "not a socket", dir: "not a socket", stream: "somebody listens",
		"sock": "absolute", filepath.Join(dir, strings.Repeat("x", 108)): "shorter", filepath.Join(dir, "no", "such", "dir"): "directory",
	} {
		if _, err := service.Listen(path, 0o600); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range []string{file, link, stream} {
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}

// TestCloseLeavesAlone: another service has taken the name meanwhile.
func TestCloseLeavesAlone(t *testing.T) {
	path := filepath.Join(short(t), "sock")
	l, err := service.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	other, err := service.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}
