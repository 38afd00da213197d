// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// invoke runs criuhook in this process, with the built-in rules unless the
// arguments say otherwise.
func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("CRIUHOOK_CONFIG", os.DevNull)
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func write(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestExitCodes(t *testing.T) {
	good := write(t, "rules:\n  - name: a\n    path: /run/a\n    idle: hangup\n")
	bad := write(t, "rules:\n  - name: a\n    path: /run/a\n    idel: hangup\n")
	for _, tt := range []struct {
		args           []string
		code           int
		stdout, stderr string // parts; "": nothing at all
	}{
		{nil, exitUsage, "", "Available Commands"},
		{[]string{"--help"}, exitDone, "--action-script=/path/criuhook", ""},
		{[]string{"--help"}, exitDone, "criuhook dump    --tree PID --images-dir DIR", ""},
		{[]string{"help"}, exitDone, "CRIUHOOK_LOG_FILE", ""},
		{[]string{"help", "rules", "check"}, exitDone, "criuhook rules check FILE", ""},
		{[]string{"help", "nothing"}, exitUsage, "", `no verb "nothing"`},
		{[]string{"--version"}, exitDone, "criuhook devel (go1.", ""},
		{[]string{"version"}, exitDone, "criuhook devel (go1.", ""},
		{[]string{"version", "-o", "json"}, exitDone, `"go_version": "go1.`, ""},
		{[]string{"version", "now"}, exitUsage, "", `takes no arguments, got "now"`},
		{[]string{"scna"}, exitUsage, "", "did you mean scan?\nTry 'criuhook --help'."},
		{[]string{"dmup"}, exitUsage, "", "did you mean dump?"},
		{[]string{"--nothing"}, exitUsage, "", "unknown flag: --nothing"},
		{[]string{"scan", "--nothing"}, exitUsage, "", "Try 'criuhook scan --help'."},
		{[]string{"scan", "4711"}, exitUsage, "", `takes no arguments, got "4711"`},
		{[]string{"scan", "--pid", "x"}, exitUsage, "", "--pid"},
		{[]string{"scan", "--pid", "0"}, exitUsage, "", "greater than 0"},
		{[]string{"scan", "--pid=-1"}, exitUsage, "", "greater than 0"},
		{[]string{"scan", "-o", "yaml"}, exitUsage, "", "must be table or json"},
		{[]string{"scan", "--pid", "4194304"}, exitFailed, "", "process 4194304"},
		{[]string{"scan", "--config", "/nowhere/config.yaml"}, exitFailed, "", "/nowhere/config.yaml"},
		{[]string{"inspect"}, exitUsage, "", "needs --images-dir DIR"},
		{[]string{"inspect", "--images-dir", "/nowhere"}, exitFailed, "", "/nowhere"},
		{[]string{"inspect", "--images-dir", t.TempDir()}, exitFailed, "", "inventory.img"},
		{[]string{"rules"}, exitDone, "/var/lib/sss/pipes/*, stream", ""},
		{[]string{"rules", "-o", "yaml"}, exitDone, "path: /var/lib/sss/pipes/*", ""},
		{[]string{"rules", "-o", "json"}, exitUsage, "", "must be table or yaml"},
		{[]string{"rules", "chek"}, exitUsage, "", "did you mean check?"},
		{[]string{"rules", "--config", good}, exitDone, "/run/a", ""},
		{[]string{"rules", "--config", bad}, exitFailed, "", bad + ":4:5: "},
		{[]string{"rules", "check"}, exitUsage, "", "one file, got 0"},
		{[]string{"rules", "check", good, bad}, exitUsage, "", "one file, got 2"},
		{[]string{"rules", "check", good}, exitDone, good + ": 1 rule, ok\n", ""},
		{[]string{"rules", "check", bad}, exitFailed, "", bad + ":4:5: "},
		{[]string{"rules", "check", "/nowhere"}, exitFailed, "", "/nowhere"},
		{[]string{"rules", "--log-level", "loud"}, exitUsage, "", `--log-level "loud": must be error`},
		{[]string{"rules", "--log-format", "xml"}, exitUsage, "", "must be text or json"},
		{[]string{"rules", "check", "/nowhere", "--log-format", "json"}, exitFailed, "", `"level":"error"`},
		{[]string{"completion"}, exitUsage, "", "which shell?"},
		{[]string{"completion", "tcsh"}, exitUsage, "", `no verb "tcsh"`},
		{[]string{"completion", "bash"}, exitDone, "__start_criuhook", ""},
		{[]string{"__complete", "scan", "-o", ""}, exitDone, "json", "Completion ended"},
		{[]string{"__complete", "du"}, exitDone, "dump", "Completion ended"},
		{[]string{"__complete", "dump", "--im"}, exitDone, "--images-dir", "Completion ended"},
		{[]string{"__complete", "dump", "--images-dir", ""}, exitDone, ":16\n", "ShellCompDirectiveFilterDirs"},
		{[]string{"__complete", "dump", "-D", ""}, exitDone, ":16\n", "ShellCompDirectiveFilterDirs"},
		{[]string{"__complete", "dump", "--criu", ""}, exitDone, ":0\n", "ShellCompDirectiveDefault"},
		{[]string{"__complete", "dump", "--tree", ""}, exitDone, ":4\n", "ShellCompDirectiveNoFileComp"},
		{[]string{"__complete", "restore", "--images-dir", ""}, exitDone, ":16\n", "ShellCompDirectiveFilterDirs"},
		{[]string{"__complete", "restore", "--criu", ""}, exitDone, ":0\n", "ShellCompDirectiveDefault"},
		{[]string{"__complete", "inspect", "--images-dir", ""}, exitDone, ":16\n", "ShellCompDirectiveFilterDirs"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			code, stdout, stderr := invoke(t, tt.args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			check := func(name, got, want string) {
				if !strings.Contains(got, want) || want == "" && got != "" {
					t.Errorf("%s: got\n%s\nwant %q", name, got, want)
				}
			}
			check("stdout", stdout, tt.stdout)
			check("stderr", stderr, tt.stderr)
		})
	}
}

func TestBadLogLevelInEnvironment(t *testing.T) {
	t.Setenv("CRIUHOOK_LOG_LEVEL", "loud")
	if code, _, stderr := invoke(t, "scan"); code != exitUsage || !strings.Contains(stderr, `CRIUHOOK_LOG_LEVEL "loud"`) {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	if code, _, stderr := invoke(t, "version"); code != exitDone {
		t.Errorf("a verb that logs nothing: exit code %d, %s", code, stderr)
	}
}

// visit calls f for every verb that people are to know.
func visit(cmd *cobra.Command, f func(*cobra.Command)) {
	if cmd.Hidden {
		return
	}
	f(cmd)
	for _, c := range cmd.Commands() {
		visit(c, f)
	}
}

// TestCompletionIsPlain: what a shell shows beside an option is what the help
// says.
func TestCompletionIsPlain(t *testing.T) {
	visit(newRoot(&options{}, io.Discard, io.Discard), func(cmd *cobra.Command) {
		args := append(strings.Fields(cmd.CommandPath())[1:], "--")
		code, text, stderr := invoke(t, append([]string{cobra.ShellCompRequestCmd}, args...)...)
		if code != exitDone || strings.Contains(text, "`") || cmd.Name() != criuName && !strings.Contains(text, "--config\tconfiguration FILE (") {
			t.Errorf("%s: exit code %d, %s\n%s", strings.Join(args, " "), code, stderr, text)
		}
	})
}

// TestHelpOfCRIU: the verb takes no options of ours, and its --help is CRIU's.
func TestHelpOfCRIU(t *testing.T) {
	code, text, stderr := invoke(t, "help", "criu")
	if code != exitDone || !strings.Contains(text, "criuhook criu ARGUMENTS…\n") || !strings.Contains(text, "criuhook criu restore") ||
		strings.Contains(text, "--log-level") || stderr != "" {
		t.Errorf("exit code %d, %s\n%s", code, stderr, text)
	}
	if code, _, stderr := invoke(t, "--config", os.DevNull, "criu", "check"); code != exitUsage || !strings.Contains(stderr, "Try 'criuhook help criu'.") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}

func TestVerbsAreExplained(t *testing.T) {
	visit(newRoot(&options{}, io.Discard, io.Discard), func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Long == "" || cmd.Example == "" {
			t.Errorf("%s lacks short or long help or an example", cmd.CommandPath())
		}
		shell := cmd.HasParent() && cmd.Parent().Name() == "completion" // cobra's text
		for _, line := range strings.Split(cmd.Long+"\n"+cmd.Example, "\n") {
			if !shell && len(line) > usualWidth {
				t.Errorf("%s: too wide: %s", cmd.CommandPath(), line)
			}
		}
	})
}

func TestManPageIsComplete(t *testing.T) {
	text, err := os.ReadFile("../../docs/man/criuhook.8")
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	visit(newRoot(&options{}, io.Discard, io.Discard), func(cmd *cobra.Command) {
		words := strings.TrimPrefix(cmd.CommandPath(), "criuhook")
		switch {
		case words == "":
		case cmd.Parent().Name() == "completion":
			if !regexp.MustCompile(`(?m)^\.?(Cm )?.*\b` + cmd.Name() + `\b`).MatchString(page) {
				t.Errorf("the man page does not name the shell %s", cmd.Name())
			}
		case !regexp.MustCompile(`(?m)^\.It Cm` + words + `( |$)`).MatchString(page):
			t.Errorf("the man page does not name the verb%s", words)
		}
		cmd.InitDefaultHelpFlag()
		cmd.InitDefaultVersionFlag()
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !regexp.MustCompile(`Fl -` + f.Name + `\b`).MatchString(page) {
				t.Errorf("the man page does not name --%s of %s", f.Name, cmd.CommandPath())
			}
		})
	})
	for _, env := range []string{"CRIUHOOK_CONFIG", "CRIUHOOK_CRIU", "CRIUHOOK_LOG_LEVEL", "CRIUHOOK_LOG_FILE"} {
		if !strings.Contains(page, ".It Ev "+env) {
			t.Errorf("the man page does not name %s", env)
		}
	}
}

func TestJSONIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	outputs := []any{&scanOutput{}, &inspectOutput{}, &versionOutput{}}
	for _, out := range outputs {
		for _, key := range keys(reflect.TypeOf(out)) {
			if !regexp.MustCompile(`^[a-z_]+$`).MatchString(key) {
				t.Errorf("key %q", key)
			}
			if !bytes.Contains(text, []byte("`"+key+"`")) {
				t.Errorf("docs/json.md does not explain the key %q of %T", key, out)
			}
		}
	}
	examples := regexp.MustCompile("(?s)```json\n(.*?)```").FindAllSubmatch(text, -1)
	if len(examples) != len(outputs) {
		t.Fatalf("%d examples for %d outputs", len(examples), len(outputs))
	}
	for i, e := range examples {
		d := json.NewDecoder(bytes.NewReader(e[1]))
		d.DisallowUnknownFields()
		if err := d.Decode(outputs[i]); err != nil {
			t.Errorf("example %d: %v", i+1, err)
			continue
		}
		var b bytes.Buffer
		if err := printJSON(&b, outputs[i]); err != nil || b.String() != string(e[1]) {
			t.Errorf("example %d is not what would be printed (%v):\n%s", i+1, err, &b)
		}
	}
}

// keys are the JSON keys of a type and of all in it.
func keys(t reflect.Type) []string {
	var out []string
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice:
		return keys(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			out = append(append(out, key), keys(f.Type)...)
		}
	}
	return out
}

// What a verb fails with is also where its log goes; of one that has no log, on
// stderr alone.
func TestErrorIsLogged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	t.Setenv("CRIUHOOK_LOG_FILE", file)
	for _, tt := range []struct {
		args []string
		code int
		logs string // a part; "": nothing
	}{
		{[]string{"restore", "--images-dir", "/nowhere"}, exitFailed, "criuhook: Error: restore: there are no images"},
		{[]string{"restore", "--images-dir", "/nowhere", "--log-format", "json"}, exitFailed, `"msg":"restore: there are no images`},
		{[]string{"dump", "--tree", "4194304", "--images-dir", "/nowhere"}, exitFailed, "criuhook: Error: dump: there is no process 4194304"},
		{[]string{"dump", "--tree", "1", "--images-dir", "/nowhere", "--config", "/nowhere/config.yaml"}, exitFailed, "/nowhere/config.yaml"},
		{[]string{"dump"}, exitUsage, ""},
		{[]string{"inspect", "--images-dir", "/nowhere"}, exitFailed, ""},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			_ = os.Remove(file) // there may be none
			code, _, stderr := invoke(t, tt.args...)
			if code != tt.code || stderr == "" || !strings.Contains(stderr, tt.logs) {
				t.Errorf("exit code %d, stderr: %s", code, stderr)
			}
			log, err := os.ReadFile(file)
			if tt.logs == "" && len(log) > 0 || tt.logs != "" && strings.Count(string(log), tt.logs) != 1 {
				t.Errorf("log: %q, %v", log, err)
			}
		})
	}
}
