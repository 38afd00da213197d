// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

func checkWidth(t *testing.T, text string) {
	t.Helper()
	for _, line := range strings.Split(text, "\n") {
		if utf8.RuneCountInString(line) > usualWidth {
			t.Errorf("%d columns: %s", utf8.RuneCountInString(line), line)
		}
	}
	checkText(t, text)
}

// checkText: nothing that a terminal would take for a command.
func checkText(t *testing.T, text string) {
	t.Helper()
	for _, r := range text {
		if (r < ' ' || r >= 0x7f) && r != '\n' && r != '…' {
			t.Errorf("%q in\n%s", r, text)
			return
		}
	}
}

func TestTable(t *testing.T) {
	tbl := table{columns: []column{{title: "N", right: true}, {title: "PATH", least: 10, keepTail: true}, {title: "X"}}}
	tbl.add("1", "/short", "")
	tbl.add("22", "/"+strings.Repeat("d/", 60)+"end", "a\x1b\xff")
	got := tbl.text(usualWidth)
	checkWidth(t, got)
	lines := strings.SplitAfter(got, "\n")
	if !strings.HasPrefix(lines[2], "22  …") || !strings.HasSuffix(lines[2], "/d/d/end  a\\x1b\\xff\n") {
		t.Errorf("got\n%s", lines[2])
	}
	if w := tbl.widths(usualWidth); !slices.Equal(w, []int{2, 85, 9}) || !strings.HasPrefix(lines[1], " 1  /short  ") || !strings.HasSuffix(lines[1], "  -\n") {
		t.Errorf("widths %v\n%s", w, got)
	}
}

// TestWidthOfTheOutput: on a terminal lines have its width, elsewhere nothing is
// cut, nor text broken.
func TestWidthOfTheOutput(t *testing.T) {
	path := "/run/" + strings.Repeat("d/", 40) + "end"
	args := []string{"rules", "--config", write(t, fmt.Sprintf("rules:\n  - {name: a, path: %s, idle: hangup}\n", path))}
	longest := func(text string) (n int) {
		for line := range strings.Lines(text) {
			n = max(n, utf8.RuneCountInString(strings.TrimRight(line, "\r\n")))
		}
		return n
	}
	code, text, stderr := invoke(t, args...)
	if code != exitDone || !strings.Contains(text, path) || strings.Contains(text, "…") || longest(text) < 300 {
		t.Fatalf("exit code %d, lines of up to %d, %s\n%s", code, longest(text), stderr, text)
	}
	for _, tt := range []struct {
		columns uint16
		least   int // of the longest line
		most    int
		whole   bool // the path
	}{{80, 70, 80, false}, {0, 90, usualWidth, false}, {250, 200, 250, true}} {
		t.Run(fmt.Sprint(tt.columns), func(t *testing.T) {
			master, slave := terminal(t)
			if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: tt.columns}); err != nil {
				t.Fatal(err)
			}
			read := make(chan string)
			go func() {
				b, _ := io.ReadAll(master) // EIO at the end, as terminals have it
				read <- string(b)
			}()
			var errs bytes.Buffer
			code := run(t.Context(), args, slave, &errs)
			slave.Close()
			text := <-read
			if n := longest(text); code != exitDone || n < tt.least || n > tt.most || strings.Contains(text, path) != tt.whole {
				t.Errorf("exit code %d, lines of up to %d, %s\n%s", code, n, errs.String(), text)
			}
		})
	}
}

func TestScanTableFits(t *testing.T) {
	long := strings.Repeat("\x1b[31mé/", 30)
	d := plan.Decision{
		Connection: sockpeer.Connection{
			Inode: 1<<32 - 1, Type: sockpeer.Seqpacket, Unaccepted: true,
			Peer: sockpeer.Peer{Name: sockpeer.Name("/" + long), PID: 4194303, UID: 1<<32 - 2, Exe: "/" + long + "\x9bexe"},
		},
		Holder: sockpeer.Process{PID: 4194304, Comm: "\x1b]0;\xff\n\u202e"},
		Rule:   &rule.Rule{Name: strings.Repeat("r", 64)},
		Action: rule.Reconnect,
		Busy:   "busy",
	}
	for pid := range 4 {
		for fd := range 20 {
			d.Connection.Holders = append(d.Connection.Holders, sockpeer.Holder{PID: 4194304 - pid, FD: 1048576 + fd})
		}
	}
	var b strings.Builder
	if err := printScan(&b, usualWidth, 1, &plan.Plan{Decisions: []plan.Decision{d}}); err != nil {
		t.Fatal(err)
	}
	checkWidth(t, b.String())
	if !strings.Contains(b.String(), "+3 ") || !strings.Contains(b.String(), "104…") {
		t.Errorf("holders are missing:\n%s", b.String())
	}
}

func TestRulesTableFits(t *testing.T) {
	uid, typ := uint32(1<<32-2), sockpeer.Seqpacket
	set := &rule.Set{Rules: append(rule.BuiltIn(), rule.Rule{
		Name: strings.Repeat("n", 64), Path: "/" + strings.Repeat("p", 106), Exe: "/" + strings.Repeat("\x1be", 100), UID: &uid, Type: &typ,
		Idle: rule.Reconnect, Busy: rule.Wait, Patience: 299999999999, Prelude: "none", To: "/" + strings.Repeat("t", 106),
		Timeout: 1, Absent: rule.AbsentFail, Source: "/etc/" + strings.Repeat("f", 200) + ".yaml:1234",
	})}
	var b strings.Builder
	if err := printRules(&b, usualWidth, set); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(b.String(), "\n") {
		if !strings.HasPrefix(line, "    ") { // a name is not broken in wrapped text
			checkWidth(t, line)
		}
	}
	checkText(t, b.String())
}
