// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

const elevatedChild = "TEST_ELEVATED_CHILD"

// TestElevated: a program with file capabilities, called by a user, has rights
// that the user has not, although all of its ids are the user's.
func TestElevated(t *testing.T) {
	if os.Getenv(elevatedChild) != "" {
		t.Logf("elevated: %v", sockpeer.Elevated())
		return
	}
	if os.Getuid() != 0 {
		t.Skip("not root: to give a program capabilities takes CAP_SETFCAP")
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "elevated")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "test")
	if err := os.WriteFile(file, program, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(want string) {
		t.Helper()
		cmd := exec.Command(file, "-test.v", "-test.run", "^TestElevated$")
		cmd.Dir, cmd.Env = "/", []string{elevatedChild + "=1"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "elevated: "+want) {
			t.Errorf("expected %s: %v\n%s", want, err, out)
		}
	}
	run("false")
	// struct vfs_cap_data of include/uapi/linux/capability.h, revision 2.
	var caps [20]byte
	binary.LittleEndian.PutUint32(caps[0:], 0x02000000|1) // effective
	binary.LittleEndian.PutUint32(caps[4:], 1<<unix.CAP_SETUID)
	if err := unix.Setxattr(file, "security.capability", caps[:], 0); err != nil {
		t.Fatal(err)
	}
	run("true")
}
