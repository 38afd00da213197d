// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// usualWidth is that of help texts, and of a terminal that does not tell its
// own, in columns.
const usualWidth = 100

// widthOf is how wide the lines of a result may be, in columns: those of the
// terminal that it is written to (TIOCGWINSZ, ioctl_tty(2)). 0: they are whole,
// for grep, awk and files.
func widthOf(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok || !isTerminal(f) {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 { // a serial line, for one
		return usualWidth
	}
	return int(size.Col)
}

// column is one of a table.
type column struct {
	title string
	// least is the width below which it is not shortened; 0: never.
	least int
	// keepTail: what does not fit is cut at the front, as of paths.
	keepTail bool
	right    bool // numbers
}

// table prints rows in columns.
type table struct {
	columns []column
	rows    [][]string
}

func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = ascii(cells[i])
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// widths shortens the widest column until the table fits; 0 is wide enough for
// all.
func (t *table) widths(width int) []int {
	w := make([]int, len(t.columns))
	total := 2 * (len(w) - 1)
	for i, c := range t.columns {
		w[i] = len(c.title)
		for _, row := range t.rows {
			w[i] = max(w[i], len(row[i]))
		}
		total += w[i]
	}
	for ; width > 0 && total > width; total-- {
		widest := -1
		for i, c := range t.columns {
			if c.least > 0 && w[i] > max(c.least, len(c.title)) && (widest < 0 || w[i] > w[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		w[widest]--
	}
	return w
}

// text is the table in lines of at most width columns, if that can be; 0: whole.
func (t *table) text(width int) string {
	w := t.widths(width)
	var b strings.Builder
	line := func(cells []string) {
		var l strings.Builder
		for i, c := range t.columns {
			if i > 0 {
				l.WriteString("  ")
			}
			cell := shorten(cells[i], w[i], c.keepTail)
			pad := strings.Repeat(" ", w[i]-utf8.RuneCountInString(cell))
			if c.right {
				l.WriteString(pad + cell)
			} else {
				l.WriteString(cell + pad)
			}
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	titles := make([]string, len(t.columns))
	for i, c := range t.columns {
		titles[i] = c.title
	}
	line(titles)
	for _, row := range t.rows {
		line(row)
	}
	return b.String()
}

// shorten cuts ASCII text to a width, with an ellipsis for what is missing.
func shorten(s string, width int, keepTail bool) string {
	switch {
	case len(s) <= width:
		return s
	case keepTail:
		return "…" + s[len(s)-width+1:]
	}
	return s[:width-1] + "…"
}

// ascii writes every byte that a terminal could misread as an escape. It
// leaves alone what has been made safe already.
func ascii(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			fmt.Fprintf(&b, `\x%02x`, s[i])
		} else {
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

// quoted is text of another process as a Go string would be written, without
// the quotes, as [sockpeer.Name] is.
func quoted(s string) string {
	q := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// wrap breaks text into lines of at most width columns, each indented; 0: one
// line.
func wrap(text, indent string, width int) string { return hang(text, indent, indent, width) }

// hang is wrap with another indent of the first line.
func hang(text, indent, others string, width int) string {
	var b strings.Builder
	line := ""
	for _, word := range strings.Fields(ascii(text)) {
		if width > 0 && line != "" && len(indent)+len(line)+1+len(word) > width {
			b.WriteString(indent + line + "\n")
			line, indent = "", others
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	if line != "" {
		b.WriteString(indent + line + "\n")
	}
	return b.String()
}

// printJSON writes a result as people and programs read it.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
