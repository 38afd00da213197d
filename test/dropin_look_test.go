// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// dumped tells what the target does after a dump; if stopped, it goes on.
func (b *bench) dumped(t *testing.T) string {
	t.Helper()
	switch settled(t, b.target.PID) {
	case "T":
		if err := unix.Kill(b.target.PID, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		return "stopped"
	case "S":
		return "running"
	}
	b.target.Gone(t)
	return "gone"
}

// finalWait is wait(NULL), which CRIU does as the parent of what it restored, or
// what a command does in CRIU's place that waits for any child.
var finalWait = regexp.MustCompile(fmt.Sprintf(`^%d 0xf+ (0x0 0x0 0x0 |0x[0-9a-f]+ 0x0 0x0 )`, unix.SYS_WAIT4))

// nonePending: no signal, such as SIGSTOP, is on its way.
var nonePending = regexp.MustCompile(`(?m)^SigPnd:\t0+\nShdPnd:\t0+$`)

// settled waits until a process sleeps or is stopped, or has ended, and tells
// its state, "" if it has ended.
func settled(t *testing.T, pid int) (state string) {
	t.Helper()
	eventually(t, fmt.Sprintf("process %d sleeps or is stopped, or has ended", pid), func() bool {
		switch state = stateOf(pid); state {
		case "S", "T":
			return nonePending.MatchString(contentsOf(fmt.Sprintf("/proc/%d/status", pid)))
		case "", "Z", "X":
			state = ""
			return true
		}
		return false
	})
	return state
}

// restored waits until CRIU is done, looks at the process and ends it.
func (b *bench) restored(t *testing.T, criu int, ended chan struct{}, fd3 *os.File) string {
	t.Helper()
	comm := func() string { return contentsOf(fmt.Sprintf("/proc/%d/comm", criu)) }
	eventually(t, "CRIU has restored, or ended", func() bool {
		select {
		case <-ended:
			return true
		default:
		}
		m := finalWait.FindStringSubmatch(contentsOf(fmt.Sprintf("/proc/%d/syscall", criu)))
		return m != nil && (m[1] == "0x0 0x0 0x0 " || !strings.Contains(comm(), "criu"))
	})
	if settled(t, b.pid) == "" {
		// What CRIU has killed has its pid until its parent, init or this process,
		// has waited for it.
		<-ended
		_, _ = unix.Wait4(b.pid, nil, unix.WNOHANG, nil)
		awaitFree(t, []int{b.pid})
		return "none"
	}
	stat := strings.Fields(contentsOf(fmt.Sprintf("/proc/%d/stat", b.pid)))
	parent := "another"
	switch stat[3] {
	case strconv.Itoa(os.Getpid()):
		parent = "the caller"
	case strconv.Itoa(criu):
		parent = "CRIU"
	case "1":
		parent = "init"
	}
	stdout := "its own"
	has, err := os.Stat(fmt.Sprintf("/proc/%d/fd/1", b.pid))
	given, err2 := fd3.Stat()
	if err == nil && err2 == nil && os.SameFile(has, given) {
		stdout = "fd 3"
	}
	_ = unix.Kill(b.pid, unix.SIGCONT)
	_ = unix.Kill(b.pid, unix.SIGTERM)
	if parent == "the caller" {
		_, _ = unix.Wait4(b.pid, nil, 0, nil)
	}
	<-ended
	awaitFree(t, []int{b.pid})
	return fmt.Sprintf("%s in state %s, child of %s, stdout is %s", strings.Trim(stat[1], "()"), stat[2], parent, stdout)
}

// look tells the messages in logs, and all files.
func (b *bench) look(t *testing.T) (messages, files string) {
	t.Helper()
	var m, f strings.Builder
	err := filepath.WalkDir(trialDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(trialDir, path)
		fmt.Fprintf(&f, "%s %s\n", d.Type(), b.plain(name))
		switch base := d.Name(); {
		case !d.Type().IsRegular():
		case strings.Contains(base, "log"):
			log := b.plain(contentsOf(path))
			for _, s := range details {
				if strings.Contains(log, s) {
					fmt.Fprintf(&m, "%s: says %q\n", b.plain(name), s)
				}
			}
			for line := range strings.Lines(log) {
				if strings.Contains(line, "Error") || strings.Contains(line, "Warn") {
					fmt.Fprintf(&m, "%s: %s", b.plain(name), line)
				}
			}
		case base == "stages", base == "fd3", strings.HasSuffix(base, ".pid"):
			fmt.Fprintf(&f, "%s\n", b.plain(contentsOf(path)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m.String(), f.String()
}

// details are in logs of a dump at level 3 and 4.
var details = []string{"Dumping task (pid", "Found regular file mapping"}

var (
	// What the target did when it was frozen, and whether CRIU lives to see its
	// child killed.
	chance = regexp.MustCompile(`.*(with interrupted system call|killed by signal 9: Killed)\n`)
	clock  = regexp.MustCompile(`\(\d\d\.\d{6}\)`)
	number = regexp.MustCompile(`0x[0-9a-f]+|\d+ us|\d+ \(0x[0-9a-f]+\)|\d{3,}`)
)

// said is what was written for people. A log at a high level, which has the time
// in every line, is left out but for errors and warnings.
func (b *bench) said(f *os.File) string {
	var out strings.Builder
	for line := range strings.Lines(b.plain(contentsOf(f.Name()))) {
		if !strings.HasPrefix(line, "(time)") || strings.Contains(line, "Error") || strings.Contains(line, "Warn") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// plain takes off what is different each time.
func (b *bench) plain(s string) string {
	s = chance.ReplaceAllString(s, "")
	s = clock.ReplaceAllString(s, "(time)")
	for _, pid := range []int{b.target.PID, b.pid} {
		s = regexp.MustCompile(fmt.Sprintf(`\b%d\b`, pid)).ReplaceAllString(s, "PID")
	}
	return number.ReplaceAllString(s, "N")
}

func contentsOf(name string) string {
	b, _ := os.ReadFile(name)
	return string(b)
}
