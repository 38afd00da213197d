// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"bufio"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// mappedTime bounds how long a scan waits for the mappings of all
	// processes: reading them waits for whoever holds a process' mmap_lock.
	mappedTime = 500 * time.Millisecond
	// maxMappings bounds what is read of one process, in bytes: some three
	// times what the kernel's default of 65530 mappings gives.
	maxMappings = 16 << 20
	// maxMapped bounds the files that are listed of one process.
	maxMapped = 4096
)

// addMapped fills in what each process has mapped, read side by side. Of what
// does not answer in time nothing is known.
func addMapped(procs map[int]Process) {
	type result struct {
		pid   int
		files []string
	}
	found := make(chan result, len(procs))
	slots := make(chan struct{}, maxLookUps)
	for pid := range procs {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			found <- result{pid, readMapped(pid)}
		}()
	}
	late := time.NewTimer(mappedTime)
	defer late.Stop()
	for range len(procs) {
		select {
		case r := <-found:
			p := procs[r.pid]
			p.Mapped = r.files
			procs[r.pid] = p
		case <-late.C:
			return
		}
	}
}

// readMapped lists the files of which a process has mapped code; nil: not
// known.
func readMapped(pid int) []string {
	f, err := os.Open(procPath(pid, "maps"))
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseMapped(f, maxMappings)
}

// parseMapped reads /proc/PID/maps (proc(5)), of which all must fit into limit
// bytes: half a list would hide who opened a connection.
func parseMapped(r io.Reader, limit int64) []string {
	all := &io.LimitedReader{R: r, N: limit + 1}
	files := []string{}
	seen := map[string]bool{}
	sc := bufio.NewScanner(all)
	for sc.Scan() {
		file, ok := parseMapping(sc.Text())
		if !ok || seen[file] {
			continue
		}
		if len(files) == maxMapped {
			return nil
		}
		seen[file] = true
		files = append(files, file)
	}
	// A process without any mapping is ending, or a kernel thread.
	if sc.Err() != nil || all.N == 0 || len(files) == 0 {
		return nil
	}
	return slices.Clip(files)
}

// parseMapping returns the file of an executable mapping.
func parseMapping(line string) (file string, ok bool) {
	rest, perms := line, ""
	for i := range 5 { // address, permissions, offset, device, inode
		var word string
		if word, rest, ok = strings.Cut(rest, " "); !ok {
			return "", false
		}
		if i == 1 {
			perms = word
		}
	}
	file = strings.TrimLeft(rest, " ")
	if len(perms) < 3 || perms[2] != 'x' || !strings.HasPrefix(file, "/") {
		return "", false
	}
	return strings.TrimSuffix(file, " (deleted)"), true
}
