// SPDX-License-Identifier: Apache-2.0

package service

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// owns tells whether all tasks of a tree are the client's, each of its threads
// with all of its ids, and none with a capability. They may change while that is
// looked at, and the pid may be given anew: the kernel looks again when CRIU,
// with the client's own rights, seizes each of them (ptrace(2), ptrace access
// mode checking). This is for a refusal that says why, before CRIU is started.
func owns(c *Client, root int) error {
	if root <= 0 {
		return refuse(unix.ESRCH, "there is no process %d", root)
	}
	tree, err := sockpeer.Tree(root)
	if err != nil {
		return refuse(unix.ESRCH, "look at process %d: %v", root, err)
	}
	for _, pid := range tree {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if errors.Is(err, fs.ErrNotExist) && pid != root {
			continue // it has ended
		}
		if err != nil {
			return refuse(unix.ESRCH, "look at process %d: %v", pid, err)
		}
		for _, t := range threads {
			f, err := os.Open(fmt.Sprintf("/proc/%d/task/%s/status", pid, t.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return refuse(unix.EPERM, "look at process %d: %v", pid, err)
			}
			err = ownedBy(f, c)
			_ = f.Close()
			if errors.Is(err, unix.ESRCH) {
				continue
			}
			if err != nil {
				return refuse(unix.EPERM, "uid %d, gid %d may not have process %d dumped: process %d, of its tree, %v", c.UID, c.GID, root, pid, err)
			}
		}
	}
	return nil
}

// ownedBy reads the status file of a thread (proc(5)).
func ownedBy(status io.Reader, c *Client) error {
	lines := bufio.NewScanner(status)
	lines.Buffer(nil, 1<<20) // Groups can be long
	seen := 0
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		words := strings.Fields(value)
		var want uint32
		switch key {
		case "Uid":
			want = c.UID
		case "Gid":
			want = c.GID
		case "CapPrm", "CapEff", "CapInh", "CapAmb":
			if len(words) != 1 || strings.Trim(words[0], "0") != "" {
				return fmt.Errorf("has capabilities (%s %s)", key, value)
			}
			seen++
			continue
		default:
			continue
		}
		if len(words) != 4 {
			return fmt.Errorf("has %d ids in %s", len(words), key)
		}
		for _, w := range words { // real, effective, saved, file system
			if w != strconv.FormatUint(uint64(want), 10) {
				return fmt.Errorf("has the %s %s (real, effective, saved and file system), not %d alone", strings.ToLower(key), strings.Join(words, " "), want)
			}
		}
		seen++
	}
	switch err := lines.Err(); {
	case errors.Is(err, unix.ESRCH):
		return err
	case err != nil:
		return fmt.Errorf("cannot be looked at: %w", err)
	case seen != 6:
		return errors.New("does not show its ids and capabilities in /proc")
	}
	return nil
}
