// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

const (
	// quietTime is how long a dump may take without a word.
	quietTime        = time.Second
	progressInterval = 250 * time.Millisecond
)

// progress tells, on a terminal, how far a long dump is: what the images have
// in bytes, of what the processes have in memory.
type progress struct {
	dir   string
	start time.Time
	done  chan struct{}
	wg    sync.WaitGroup
}

// startProgress needs out to be a terminal to write to it.
func startProgress(out io.Writer, dir string, tree int) *progress {
	p := &progress{dir: dir, start: time.Now(), done: make(chan struct{})}
	if f, ok := out.(*os.File); ok && isTerminal(f) {
		total := memory(tree)
		p.wg.Go(func() { p.show(f, total) })
	}
	return p
}

func (p *progress) show(out io.Writer, total int64) {
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	shown := false
	for {
		select {
		case <-p.done:
			if shown {
				fmt.Fprint(out, "\r\x1b[K") // to the line's begin, and erase it
			}
			return
		case <-tick.C:
			if time.Since(p.start) < quietTime {
				continue
			}
			shown = true
			fmt.Fprintf(out, "\rdumping: %s of about %s in %.0f s\x1b[K", size(written(p.dir)), size(total), time.Since(p.start).Seconds())
		}
	}
}

// stop ends the display and returns what was done, for people.
func (p *progress) stop() string {
	close(p.done)
	p.wg.Wait()
	return fmt.Sprintf("%s in %.1f s", size(written(p.dir)), time.Since(p.start).Seconds())
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// written is the size of all images, in bytes.
func written(dir string) (sum int64) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.img")) // the pattern is valid
	for _, name := range files {
		if info, err := os.Lstat(name); err == nil && info.Mode().IsRegular() {
			sum += info.Size()
		}
	}
	return sum
}

// memory is what the processes of a tree have in memory that is no file's, in
// bytes: about what images will hold (proc(5), status).
func memory(tree int) (sum int64) {
	pids, _ := sockpeer.Tree(tree) // only an estimate
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if rest, ok := strings.CutPrefix(sc.Text(), "RssAnon:"); ok {
				kb, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
				sum += kb << 10
			}
		}
		f.Close()
	}
	return sum
}

// size is a number of bytes for people.
func size(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.0f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
