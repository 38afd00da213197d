// SPDX-License-Identifier: Apache-2.0

// Command testsum reads the output of "go test -json" on standard input and
// prints what a person wants of it: packages as they finish, the output of what
// failed, each skipped test with its reason, and the counts.
//
//	go test -json ./... | testsum [-v]
//
// With -v it prints all output as it comes. It exits 1 if anything failed or if
// there was nothing to read.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// event is what cmd/test2json documents, of it what is needed here.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build-output
	Test        string
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string
}

type summary struct {
	w                       io.Writer
	verbose                 bool
	output                  map[string][]string // by package and test
	passed, failed, skipped int
	packages, badPackages   int
	skips                   []string
}

func main() {
	verbose := flag.Bool("v", false, "print all output as it comes")
	flag.Parse()
	s := &summary{w: os.Stdout, verbose: *verbose, output: map[string][]string{}}
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintf(os.Stderr, "testsum: cannot read go test's output: %v\n", err)
		os.Exit(1)
	}
	if !s.finish() {
		os.Exit(1)
	}
}

func (s *summary) read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			// go itself, not a test: say, a flag that it does not know.
			fmt.Fprintln(s.w, lines.Text())
			continue
		}
		s.add(e)
	}
	return lines.Err()
}

func (s *summary) add(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		fmt.Fprint(s.w, e.Output)
	case "output":
		if s.verbose {
			fmt.Fprint(s.w, e.Output)
		}
		s.output[key] = append(s.output[key], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.endPackage(e, key)
		} else {
			s.endTest(e, key)
		}
		delete(s.output, key)
	}
}

func (s *summary) endTest(e event, key string) {
	switch e.Action {
	case "pass":
		s.passed++
	case "skip":
		s.skipped++
		s.skips = append(s.skips, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(s.output[key])))
	case "fail":
		s.failed++
		if !s.verbose {
			fmt.Fprintf(s.w, "%s\n%s", e.Package, strings.Join(s.output[key], ""))
		}
	}
}

func (s *summary) endPackage(e event, key string) {
	s.packages++
	if e.Action == "fail" {
		s.badPackages++
		if !s.verbose {
			// What belongs to no test: a panic, a timeout, TestMain.
			fmt.Fprint(s.w, strings.Join(s.output[key], ""))
		}
		if e.FailedBuild != "" {
			fmt.Fprintf(s.w, "FAIL\t%s [build failed]\n", e.Package)
		}
		return
	}
	if s.verbose {
		return
	}
	word := "ok  "
	if e.Action == "skip" { // no test files
		word = "?   "
	}
	fmt.Fprintf(s.w, "%s\t%s\t%.3fs\n", word, e.Package, e.Elapsed)
}

// reason is what the test logged before it was skipped.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

func (s *summary) finish() bool {
	if len(s.skips) > 0 {
		fmt.Fprintln(s.w, "skipped:")
		for _, line := range s.skips {
			fmt.Fprintln(s.w, "  "+line)
		}
	}
	fmt.Fprintf(s.w, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	if s.badPackages > 0 {
		fmt.Fprintf(s.w, "%d of %d packages failed\n", s.badPackages, s.packages)
	}
	return s.failed == 0 && s.badPackages == 0 && s.packages > 0
}
