// SPDX-License-Identifier: Apache-2.0

package dump

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
	// Keys are CRIU's names of it as an external file, one for each mount
	// that it is reached by.
	Keys []string
	// Clients: whoever has it open maps it, too.
	Clients bool
}

// WarnGhosts says which unlinked caches are larger than CRIU allows, args being
// CRIU's command line: its own message names neither the process nor the option.
func (d *Dump) WarnGhosts(args []string) error {
	ghosts, err := Ghosts(d.Root)
	if err != nil {
		return err
	}
	var most int64
	for _, g := range ghosts {
		most = max(most, g.Size)
	}
	limit, rpc := GhostLimit(args)
	for _, g := range ghosts {
		if g.Size <= limit {
			continue
		}
		mib := (most + 1<<20 - 1) >> 20
		todo := fmt.Sprintf("add --ghost-limit %dM to CRIU's options", mib)
		if rpc {
			todo = fmt.Sprintf("set ghost_limit to %d or more in the request, unless it is set", mib<<20)
		}
		d.Log.Warnf("process %d uses %s, which its daemon has replaced and unlinked: CRIU will refuse to dump a ghost file of %d bytes unless its limit, %d by default, is raised (also possible in its configuration file); %s, or let the process look something up first, so that it takes the new file",
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
	g := ghosts{byFile: map[fileID]*found{}}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		maps, err := os.ReadFile(dir + "/maps")
		if err != nil {
			continue // gone
		}
		for _, m := range unlinkedMaps(bytes.NewReader(maps)) {
			g.add(pid, dir+"/map_files/"+m.area, m.path, true)
		}
		links, _ := filepath.Glob(dir + "/fd/*") // the pattern is valid
		for _, link := range links {
			if name, err := os.Readlink(link); err == nil {
				if path, ok := unlinkedCache(name); ok {
					g.add(pid, link, path, false)
				}
			}
		}
	}
	var out []Ghost
	for _, f := range g.order {
		f.Clients = len(f.maps) > 0
		for pid := range f.opens {
			f.Clients = f.Clients && f.maps[pid]
		}
		out = append(out, f.Ghost)
	}
	return out, nil
}

// fileID is a file as stat(2) tells it. A file system of several devices has
// other ids in maps; stat's are the same for mappings and fds.
type fileID struct{ dev, ino uint64 }

// found is a Ghost and which processes map it and have it open.
type found struct {
	Ghost
	maps, opens map[int]bool
}

type ghosts struct {
	byFile map[fileID]*found
	order  []*found
}

func (g *ghosts) add(pid int, link, path string, mapped bool) {
	fd, err := unix.Open(link, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return // closed or unmapped meanwhile
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Nlink != 0 {
		return
	}
	id := fileID{uint64(st.Dev), st.Ino}
	f := g.byFile[id]
	if f == nil {
		f = &found{Ghost{PID: pid, Path: path, Size: st.Blocks * 512}, map[int]bool{}, map[int]bool{}}
		g.byFile[id] = f
		g.order = append(g.order, f)
	}
	if mapped {
		f.maps[pid] = true
	} else {
		f.opens[pid] = true
	}
	// dump_one_reg_file in criu/files-reg.c
	if mount, err := mountID(fd); err == nil {
		key := fmt.Sprintf("file[%x:%x]", mount, st.Ino)
		if !slices.Contains(f.Keys, key) {
			f.Keys = append(f.Keys, key)
		}
	}
}

// mountID is the mount that an fd of ours was opened through (proc(5),
// fdinfo).
func mountID(fd int) (int, error) {
	name := fmt.Sprintf("/proc/self/fdinfo/%d", fd)
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "mnt_id:")
	line, _, _ := strings.Cut(rest, "\n")
	id, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return 0, fmt.Errorf("read %s: no mnt_id", name)
	}
	return id, nil
}

// ExternalGhosts are the unlinked caches that CRIU is best told to leave out:
// then no limit applies, and [Dump.Settle] takes them out of the images.
func (d *Dump) ExternalGhosts() ([]image.ExternalFile, error) {
	all, err := Ghosts(d.Root)
	if err != nil {
		return nil, err
	}
	var out []image.ExternalFile
	for _, g := range all {
		if !g.Clients {
			continue // CRIU keeps it as any other unlinked file
		}
		for _, key := range g.Keys {
			out = append(out, image.ExternalFile{Key: key, Path: g.Path})
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
