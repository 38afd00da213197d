// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"criuhook/criuhook/plan"
	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

func checkWidth(t *testing.T, text string) {
	t.Helper()
	for _, line := range strings.Split(text, "\n") {
		if utf8.RuneCountInString(line) > tableWidth {
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
	got := tbl.String()
	checkWidth(t, got)
	lines := strings.SplitAfter(got, "\n")
	if !strings.HasPrefix(lines[2], "22  …") || !strings.HasSuffix(lines[2], "/d/d/end  a\\x1b\\xff\n") {
		t.Errorf("got\n%s", lines[2])
	}
	if w := tbl.widths(); !slices.Equal(w, []int{2, 85, 9}) || !strings.HasPrefix(lines[1], " 1  /short  ") || !strings.HasSuffix(lines[1], "  -\n") {
		t.Errorf("widths %v\n%s", w, got)
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
	if err := printScan(&b, 1, &plan.Plan{Decisions: []plan.Decision{d}}); err != nil {
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
	if err := printRules(&b, set); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(b.String(), "\n") {
		if !strings.HasPrefix(line, "    ") { // a name is not broken in wrapped text
			checkWidth(t, line)
		}
	}
	checkText(t, b.String())
}
