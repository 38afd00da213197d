// SPDX-License-Identifier: Apache-2.0

package rule_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"criuhook/criuhook/rule"
)

var update = flag.Bool("update", false, "write docs/rules.md anew")

const pageHead = `<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Made from criuhook/rule/reasons.go by go test ./criuhook/rule -run TestRulesPage -update -->
# The built-in rules

What becomes of a connection that leaves the process tree is decided by the first rule that matches it:
those of the configuration, then these. ` + "`criuhook rules`" + ` prints them all, ` + "`criuhook scan`" + ` which one
matches which connection. A rule of one's own for the same path comes before them.

An **idle** connection is *reconnected* (a new one to the same listener, as the application, begun with the
*prelude* of its protocol), *hung up* (the application finds it closed, as after a restart of the daemon), or
the dump is *refused*. A **busy** one has unread bytes on either side, or a thread that waits for an answer:
it is never reconnected.

"Measured" says that it was seen with the real client, "read" that the source says so; a test that is named
shows it on the real thing.

| clients of | when idle | when busy |
|---|---|---|
`

// TestRulesPage: docs/rules.md says what the rules say.
func TestRulesPage(t *testing.T) {
	const file = "../../docs/rules.md"
	want := rulesPage()
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/rules.md is not made from the rules: go test ./criuhook/rule -run TestRulesPage -update\n%s", diff)
	}
}

func rulesPage() string {
	var groups [][]rule.Rule
	for i, r := range rule.BuiltIn() {
		if last := len(groups) - 1; i > 0 && r.SameReasons(&groups[last][0]) {
			groups[last] = append(groups[last], r)
		} else {
			groups = append(groups, []rule.Rule{r})
		}
	}
	var b strings.Builder
	b.WriteString(pageHead)
	for _, g := range groups {
		idle := g[0].Idle.String()
		if p := g[0].Prelude; p != "" && p != "none" {
			idle += ", prelude " + p
		}
		fmt.Fprintf(&b, "| [%s](#%s) | %s | %s |\n", heading(g), anchor(heading(g)), idle, g[0].Busy)
	}
	for _, g := range groups {
		fmt.Fprintf(&b, "\n## %s\n\n", heading(g))
		for _, r := range g {
			fmt.Fprintf(&b, "- `%s`: `%s`, %s\n", r.Name, r.Path, r.Type)
		}
		for _, x := range g[0].Reasons() {
			fmt.Fprintf(&b, "\n**%s.** %s\n", x.Title, strings.ReplaceAll(x.Text, "*", `\*`))
		}
	}
	return b.String()
}

// heading names a group: by what all names begin with, else by each of them or,
// of many, by their first words.
func heading(g []rule.Rule) string {
	common := g[0].Name
	var names, words []string
	for _, r := range g {
		for common != "" && r.Name != common && !strings.HasPrefix(r.Name, common+"-") {
			common = common[:max(0, strings.LastIndexByte(common, '-'))]
		}
		names = append(names, r.Name)
		if word, _, _ := strings.Cut(r.Name, "-"); !slices.Contains(words, word) {
			words = append(words, word)
		}
	}
	switch {
	case common == g[0].Name || common != "" && len(g) > 2:
		return common
	case len(g) > 2:
		return strings.Join(words, ", ")
	}
	return strings.Join(names, ", ")
}

var notInAnchor = regexp.MustCompile(`[^a-z0-9 -]`)

// anchor is a heading's as code hosts make it.
func anchor(h string) string {
	return strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(h), ""), " ", "-")
}

// TestReasons: every built-in rule is explained, in ASCII, and the tests it
// names are there.
func TestReasons(t *testing.T) {
	var tests strings.Builder
	files, err := filepath.Glob("../../test/*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests: %v", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(b)
	}
	for _, r := range rule.BuiltIn() {
		reasons := r.Reasons()
		if len(reasons) != 4 {
			t.Errorf("%s is not explained: %q", r.Name, reasons)
		}
		for _, x := range reasons {
			if strings.ContainsFunc(x.Text, func(r rune) bool { return r < ' ' || r > '~' }) || !strings.HasSuffix(x.Text, ".") {
				t.Errorf("%s: %s: %q", r.Name, x.Title, x.Text)
			}
			for _, name := range regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(x.Text, -1) {
				if !strings.Contains(tests.String(), "func "+name+"(") {
					t.Errorf("%s: there is no %s", r.Name, name)
				}
			}
		}
	}
	own := rule.Rule{Name: "own"}
	if got := own.Reasons(); got != nil {
		t.Errorf("a rule of one's own: %q", got)
	}
}
