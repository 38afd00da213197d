// SPDX-License-Identifier: Apache-2.0

package test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// Spec is what a container has that others have not.
type Spec struct {
	User User
	// Binds are bind mounts: source outside, name inside. Directories and files
	// are made inside as needed.
	Binds map[string]string
	// Netns is the path of the network namespace; empty: one of its own.
	Netns string
	// Maps maps container ids from 0 on to those from Maps on; 0: no user
	// namespace.
	Maps uint32
	// Args and Env are what to run; nil: the application.
	Args, Env []string
	// Change has the last word.
	Change func(config map[string]any)
}

// publicApp is the test binary where everybody can read it: in a user namespace
// CRIU mounts it as the user who is root there.
var publicApp = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	const name = "/tmp/criuhook-test-app"
	return name, os.WriteFile(name, b, 0o755)
})

// bundle makes the root file system and config.json (the OCI runtime
// specification).
func (c *Container) bundle(t testing.TB, s Spec) {
	t.Helper()
	type object = map[string]any
	// The programs here are linked to the sandbox's libraries.
	binds := map[string]string{c.path("ctl"): "/ctl", "/usr/lib": "/usr/lib", "/usr/lib64": "/usr/lib64"}
	exe, err := publicApp()
	if err != nil {
		t.Fatal(err)
	}
	binds[exe] = "/app"
	if s.Args == nil {
		s.Args = []string{"/app", app.Role, "/ctl/control"}
	}
	for from, to := range s.Binds {
		binds[from] = to
	}
	for _, d := range []string{"ctl", "rootfs/proc", "rootfs/dev", "rootfs/tmp"} {
		if err := os.MkdirAll(c.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(c.path("ctl"), 0o777); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lib", "lib64"} {
		if err := os.Symlink("usr/"+name, c.path("rootfs/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	mounts := []object{
		{"destination": "/proc", "type": "proc", "source": "proc"},
		{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755", "size=65536k"}},
	}
	for _, from := range slices.Sorted(maps.Keys(binds)) {
		at := filepath.Join(c.path("rootfs"), binds[from])
		info, err := os.Stat(from)
		if err == nil && info.IsDir() {
			err = os.MkdirAll(at, 0o755)
		} else if err == nil {
			if err = os.MkdirAll(filepath.Dir(at), 0o755); err == nil {
				err = os.WriteFile(at, nil, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		options := []string{"bind", "rprivate"}
		if strings.HasPrefix(from, "/usr/") {
			options = append(options, "ro") // as it is outside: a user namespace cannot change that
		}
		mounts = append(mounts, object{"destination": binds[from], "type": "bind", "source": from, "options": options})
	}
	network := object{"type": "network"}
	if s.Netns != "" {
		network["path"] = s.Netns
	}
	linux := object{
		"cgroupsPath": "/" + c.id,
		"namespaces":  []object{{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}, network},
	}
	if s.Maps != 0 {
		ids := []object{{"containerID": 0, "hostID": s.Maps, "size": 65536}}
		linux["uidMappings"], linux["gidMappings"] = ids, ids
		linux["namespaces"] = append(linux["namespaces"].([]object), object{"type": "user"})
		if err := os.Chown(c.path("rootfs"), int(s.Maps), int(s.Maps)); err != nil {
			t.Fatal(err)
		}
	}
	config := object{
		"ociVersion": "1.0.2",
		"process": object{
			"user": object{"uid": s.User.UID, "gid": s.User.GID, "additionalGids": s.User.Groups},
			"args": s.Args, "env": append([]string{"PATH=/usr/bin"}, s.Env...), "cwd": "/",
		},
		"root": object{"path": "rootfs", "readonly": true}, "hostname": "container", "mounts": mounts, "linux": linux,
	}
	if s.Change != nil {
		s.Change(config)
	}
	b, err := json.MarshalIndent(config, "", "  ")
	if err == nil {
		err = os.WriteFile(c.path("config.json"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// unifiedCgroups shows the version 2 hierarchy alone, as crun wants it, until
// the test ends.
func unifiedCgroups(t testing.TB) {
	t.Helper()
	const dir = "/sys/fs/cgroup"
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return
	}
	if err := unix.Mount("none", dir, "cgroup2", 0, ""); err != nil {
		t.Fatalf("mount cgroup2 on %s: %v", dir, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// oldCgroups reports whether there are version 1 hierarchies, too. crun then has
// CRIU make groups in them, which it does not remove.
func oldCgroups() bool {
	b, _ := os.ReadFile("/proc/self/cgroup")
	return len(strings.TrimSpace(string(b))) > 0 && strings.Count(string(b), "\n") > 1
}
