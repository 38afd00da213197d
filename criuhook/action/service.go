// SPDX-License-Identifier: Apache-2.0

package action

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// "criu service" sets CRTOOLS_IMAGE_DIR when it starts, before there are images,
// and the workers that it forks for its clients inherit that: the path names
// the service and no descriptor (run_shell_scripts in criu/action-scripts.c).
var ofService = regexp.MustCompile(`^/proc/([0-9]+)/fd/-1$`)

// fromService finds the worker that called us, and its images directory.
func (s *Script) fromService() error {
	m := ofService.FindStringSubmatch(s.ImagesDir)
	if m == nil {
		return nil
	}
	service, err := strconv.Atoi(m[1])
	if err == nil {
		s.CRIU, err = childOf(service, os.Getppid())
	}
	if err == nil {
		s.ImagesDir, err = imagesOf(s.CRIU, s.Stage != preDump)
	}
	if err != nil {
		return fmt.Errorf("CRIU's service does not tell where the images are, and they were not found: %w; use \"criuhook serve\" in its place", err)
	}
	return nil
}

// childOf is the child of a process that pid is, or descends from: a script of
// the user's may have called us.
func childOf(parent, pid int) (int, error) {
	for n := pid; n > 1; {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 2 {
			return 0, fmt.Errorf("/proc/%d/stat has no parent", n)
		}
		up, err := strconv.Atoi(f[1])
		switch {
		case err != nil:
			return 0, err
		case up == parent:
			return n, nil
		}
		n = up
	}
	return 0, fmt.Errorf("process %d does not descend from process %d", pid, parent)
}

// imagesOf finds the images directory among what a CRIU has open: the one
// directory that is neither in a /proc nor a root. written: there are images in it.
func imagesOf(criu int, written bool) (string, error) {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", criu))
	if err != nil {
		return "", err
	}
	root, err := os.Stat("/")
	if err != nil {
		return "", err
	}
	var found []string
	var infos []os.FileInfo
next:
	for _, e := range fds {
		name := fmt.Sprintf("/proc/%d/fd/%s", criu, e.Name())
		info, err := os.Stat(name)
		var fs unix.Statfs_t
		if err != nil || !info.IsDir() || os.SameFile(info, root) || unix.Statfs(name, &fs) != nil || fs.Type == unix.PROC_SUPER_MAGIC {
			continue
		}
		if written {
			if _, err := os.Lstat(name + "/inventory.img"); err != nil {
				continue
			}
		}
		for _, i := range infos {
			if os.SameFile(i, info) {
				continue next
			}
		}
		found, infos = append(found, name), append(infos, info)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d directories that CRIU (pid %d) has open could be it", len(found), criu)
	}
	return found[0], nil
}

// rpcSocket is the inode of the socket by which CRIU talks to a client of its RPC;
// 0: it has none. Somebody in the tree may be that client, and CRIU knows what
// to do with the other end (service_sk_ino in criu/sk-unix.c).
func rpcSocket(criu int) uint32 {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", criu)) // nothing, if it is gone
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", criu, fd))
		if err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		sock, err := sockpeer.Duplicate(criu, fd)
		if err != nil {
			continue
		}
		kind, err := sock.Type()
		inode, inodeErr := sock.Inode()
		is := err == nil && inodeErr == nil && sock.IsUnix() && kind == sockpeer.Seqpacket
		_ = sock.Close()
		if is {
			return inode
		}
	}
	return 0
}
