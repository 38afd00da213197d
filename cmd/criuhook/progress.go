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

// eraseLine goes to the line's begin and erases it.
const eraseLine = "\r\x1b[K"

// progress tells, on a terminal, how far a long dump is: what the images have
// in bytes, of what the processes have in memory. What else goes to the terminal
// is to be written by it.
type progress struct {
	out   io.Writer
	dir   string
	since time.Time
	done  chan struct{}
	wg    sync.WaitGroup

	mu    sync.Mutex
	shown bool // the line is on the terminal
}

func newProgress(out io.Writer, dir string) *progress {
	return &progress{out: out, dir: dir, done: make(chan struct{})}
}

// start shows nothing unless the output is a terminal.
func (p *progress) start(tree int) {
	p.since = time.Now()
	if f, ok := p.out.(*os.File); ok && isTerminal(f) {
		total := memory(tree)
		p.wg.Go(func() { p.show(total) })
	}
}

func (p *progress) show(total int64) {
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			p.mu.Lock()
			p.erase()
			p.mu.Unlock()
			return
		case <-tick.C:
			if time.Since(p.since) < quietTime {
				continue
			}
			p.mu.Lock()
			p.shown = true
			fmt.Fprintf(p.out, "\rdumping: %s of about %s in %.0f s\x1b[K", size(written(p.dir)), size(total), time.Since(p.since).Seconds())
			p.mu.Unlock()
		}
	}
}

// Write writes a message in place of the display, which comes again.
func (p *progress) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
	return p.out.Write(b)
}

// erase is called with the lock.
func (p *progress) erase() {
	if p.shown {
		fmt.Fprint(p.out, eraseLine)
		p.shown = false
	}
}

// stop ends the display and returns what was done, for people.
func (p *progress) stop() string {
	close(p.done)
	p.wg.Wait()
	return fmt.Sprintf("%s in %.1f s", size(written(p.dir)), time.Since(p.since).Seconds())
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
