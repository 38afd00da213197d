// SPDX-License-Identifier: Apache-2.0

package action

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/sockpeer"
)

// defaultGhostLimit is, in bytes, how large an unlinked file may be for CRIU
// to keep a copy of it (criu/include/cr_options.h, DEFAULT_GHOST_LIMIT).
const defaultGhostLimit = 1 << 20

// Ghost is a daemon's cache that has lost its name while a process uses it.
// CRIU keeps such a file in the images, up to a limit, and refuses beyond.
type Ghost struct {
	PID  int
	Path string
	Size int64 // on disk, in bytes: what CRIU compares with its limit
}

// warnGhosts says which unlinked caches are larger than CRIU allows: its own
// message names neither the process nor the option.
func (t *Tracer) warnGhosts() error {
	ghosts, err := Ghosts(t.Root)
	if err != nil {
		return err
	}
	var most int64
	for _, g := range ghosts {
		most = max(most, g.Size)
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", t.CRIU))
	if err != nil {
		return fmt.Errorf("read the command line of CRIU, process %d: %w", t.CRIU, err)
	}
	limit, rpc := GhostLimit(strings.Split(string(args), "\x00"))
	for _, g := range ghosts {
		if g.Size <= limit {
			continue
		}
		mib := (most + 1<<20 - 1) >> 20
		todo := fmt.Sprintf("add --ghost-limit %dM to CRIU's options", mib)
		if rpc {
			todo = fmt.Sprintf("set ghost_limit to %d or more in the request, unless it is set", mib<<20)
		}
		t.Log.Warnf("process %d uses %s, which its daemon has replaced and unlinked: CRIU will refuse to dump a ghost file of %d bytes unless its limit, %d by default, is raised (also possible in its configuration file); %s, or let the process look something up first, so that it takes the new file",
			g.PID, g.Path, g.Size, defaultGhostLimit, todo)
	}
	return nil
}

// Ghosts finds the unlinked caches that the tree below root maps or has open,
// one for each file, ordered by process.
func Ghosts(root int) ([]Ghost, error) {
	pids, err := sockpeer.Tree(root)
	if err != nil {
		return nil, err
	}
	type file struct{ dev, ino uint64 }
	var out []Ghost
	seen := map[file]bool{}
	add := func(pid int, link, path string) {
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil {
			return // closed or unmapped meanwhile
		}
		// A file system of several devices has other ids in maps; stat's
		// are the same for mappings and fds.
		f := file{uint64(st.Dev), st.Ino}
		if st.Nlink == 0 && !seen[f] {
			seen[f] = true
			out = append(out, Ghost{pid, path, st.Blocks * 512})
		}
	}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		maps, err := os.ReadFile(dir + "/maps")
		if err != nil {
			continue // gone
		}
		for _, m := range unlinkedMaps(bytes.NewReader(maps)) {
			add(pid, dir+"/map_files/"+m.area, m.path)
		}
		links, _ := filepath.Glob(dir + "/fd/*") // the pattern is valid
		for _, link := range links {
			if name, err := os.Readlink(link); err == nil {
				if path, ok := unlinkedCache(name); ok {
					add(pid, link, path)
				}
			}
		}
	}
	return out, nil
}

// unlinkedMap is a mapping of an unlinked cache.
type unlinkedMap struct {
	area string // as in /proc/PID/map_files
	path string
}

// unlinkedMaps reads /proc/PID/maps (proc(5)).
func unlinkedMaps(r io.Reader) []unlinkedMap {
	var out []unlinkedMap
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		// "7f00…-7f01… r--s 00000000 fd:01 1234     /path with blanks (deleted)"
		_, name, ok := strings.Cut(sc.Text(), "/")
		if !ok {
			continue
		}
		path, ok := unlinkedCache("/" + name)
		if !ok {
			continue
		}
		area, _, _ := strings.Cut(sc.Text(), " ")
		lo, hi, _ := strings.Cut(area, "-")
		// map_files has the same numbers without leading zeros.
		a, err1 := strconv.ParseUint(lo, 16, 64)
		b, err2 := strconv.ParseUint(hi, 16, 64)
		if err1 == nil && err2 == nil {
			out = append(out, unlinkedMap{fmt.Sprintf("%x-%x", a, b), path})
		}
	}
	return out
}

// unlinkedCache recognises the kernel's name of an unlinked cache.
func unlinkedCache(name string) (path string, ok bool) {
	if !strings.HasSuffix(name, " (deleted)") {
		return "", false
	}
	path, _, ok = image.CachePath(name)
	return path, ok
}

// GhostLimit reads CRIU's limit from its command line, in bytes, as CRIU does:
// the last one counts, K, M and G multiply, long options may be shortened.
// rpc: CRIU works for a program (swrk, service), which may ask for another.
func GhostLimit(args []string) (limit int64, rpc bool) {
	const option = "ghost-limit"
	limit = defaultGhostLimit
	rpc = slices.Contains(args, "swrk") || slices.Contains(args, "service")
	for i, a := range args {
		name, ok := strings.CutPrefix(a, "--")
		if !ok {
			continue
		}
		name, value, given := strings.Cut(name, "=")
		if name == "" || !strings.HasPrefix(option, name) {
			continue
		}
		if !given && i+1 < len(args) {
			value = args[i+1]
		}
		limit = parseSize(value)
	}
	return limit, rpc
}

// parseSize is CRIU's parse_size (criu/config.c): atol, and a letter anywhere.
func parseSize(s string) int64 {
	digits := s
	if i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = s[:i]
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0
	}
	for i, unit := range "KMG" {
		if strings.ContainsRune(s, unit) {
			shift := 10 * (i + 1)
			if n > 1<<62>>shift {
				return 1 << 62
			}
			return n << shift
		}
	}
	return n
}
