// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// cracJDK makes a tree that looks like a JDK with CRaC: of the files given, and a
// JVM that knows the flags of today.
func cracJDK(t *testing.T, files map[string]string) string {
	t.Helper()
	home := filepath.Join(t.TempDir(), "jdk")
	all := map[string]string{"bin/java": "#!/bin/sh\n", "lib/server/libjvm.so": "CRaCEngine\x00CRaCAllowedOpenFilePrefixes\x00",
		"release": "IMPLEMENTOR=\"Azul Systems, Inc.\"\nJAVA_VERSION=\"21.0.2\"\n"}
	for name, text := range files {
		all[name] = text
	}
	for name, text := range all {
		file := filepath.Join(home, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return home
}

var (
	jdkOfVariables = map[string]string{"lib/criuengine": "", "lib/criu": "\x7fELF"}
	jdkOfOptions   = map[string]string{"lib/libcriuengine.so": "criu_location", "lib/criu": "\x7fELF"}
	jdkBundled     = map[string]string{"lib/criuengine": "", "lib/criu": "path\tcriuhook/cmd/criuhook\n", "lib/criu.real": "\x7fELF"}
	jdkByPath      = map[string]string{"lib/libcriuengine.so": "criu_location Cannot find CRIU executable on the PATH"}
)

const bothPrefixes = "-XX:CRaCAllowedOpenFilePrefixes=socket: -XX:CRaCAllowedOpenFilePrefixes=/var/lib/sss/mc/"

func TestCRaCEnv(t *testing.T) {
	// No variable of this machine's takes part.
	for _, name := range []string{"JAVA_HOME", "JDK_JAVA_OPTIONS", "CRAC_CRIU_OPTS", "CRAC_CRIU_PATH"} {
		t.Setenv(name, "")
	}
	dir := t.TempDir()
	script, dropIn, spaced := filepath.Join(dir, "criuhook"), filepath.Join(dir, "criu"), filepath.Join(dir, "a b")
	for _, file := range []string{script, dropIn, spaced} {
		if err := os.WriteFile(file, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	opts := "--action-script=" + script
	for _, tt := range []struct {
		name           string
		files          map[string]string
		args           []string
		code           int
		stdout, stderr []string // parts; one that begins with = is all of it; none: nothing
	}{
		{"variables", jdkOfVariables, []string{"--criuhook", script}, exitDone, []string{
			": Azul Systems, Inc. 21.0.2\n# engine: lib/criuengine\n", "# for the checkpoint:\n",
			"# CRIU calls criuhook as its action script\nCRAC_CRIU_OPTS=" + opts + "\n",
			"\n-XX:CRaCAllowedOpenFilePrefixes=socket:\n", "criuhook crac-env --restore"}, nil},
		{"for a restore", jdkOfVariables, []string{"--criuhook", script, "--restore"}, exitDone, []string{"# for the restore:\n", "\nCRAC_CRIU_OPTS=" + opts + "\n"}, nil},
		{"shell", jdkOfVariables, []string{"--criuhook", script, "--shell"}, exitDone, []string{
			"export CRAC_CRIU_OPTS='" + opts + "';\nexport JDK_JAVA_OPTIONS='" + bothPrefixes + "';\n# CRAC_CRIU_OPTS: "}, nil},
		{"java options", jdkOfVariables, []string{"--criuhook", script, "--java-options"}, exitDone, []string{"=" + bothPrefixes + "\n"},
			[]string{"to be set in the environment besides: CRAC_CRIU_OPTS=" + opts}},
		{"Dockerfile", jdkOfVariables, []string{"--criuhook", "/in/the/image/criuhook", "--dockerfile"}, exitDone, []string{
			"ENV CRAC_CRIU_OPTS=\"--action-script=/in/the/image/criuhook\"\n", "ENV JDK_JAVA_OPTIONS=\"" + bothPrefixes + "\"\n", "# For checkpoints only"}, nil},
		{"options", jdkOfOptions, []string{"--criuhook", script, "--java-options"}, exitDone,
			[]string{"=-XX:CRaCEngineOptions=args=" + opts + " " + bothPrefixes + "\n"}, nil},
		{"options for a restore", jdkOfOptions, []string{"--criuhook", script, "--java-options", "--restore"}, exitDone,
			[]string{"=-XX:CRaCEngineOptions=args=" + opts + "\n"}, nil},
		{"drop-in", jdkOfOptions, []string{"--drop-in", dropIn, "--shell", "--restore"}, exitDone, []string{
			"lib/criu';\nexport JDK_JAVA_OPTIONS='-XX:CRaCEngineOptions=criu_location=" + dropIn + "';\n", "export CRIUHOOK_CRIU='"}, nil},
		{"bundled", jdkBundled, []string{"--java-options"}, exitDone, []string{"=" + bothPrefixes + "\n"}, nil},
		{"bundled, for a restore", jdkBundled, []string{"--shell", "--restore"}, exitDone, []string{"=# nothing has to be set\n"}, nil},
		{"bundled, told", jdkBundled, nil, exitDone, []string{"criuhook is bundled"}, nil},
		{"CRIU from PATH", jdkByPath, []string{"--criuhook", script}, exitDone, []string{"the first criu in PATH", "\n-XX:CRaCEngineOptions=args=" + opts + "\n"}, nil},
		{"two forms", jdkOfOptions, []string{"--shell", "--dockerfile"}, exitUsage, nil, []string{"one form"}},
		{"two ways", jdkOfOptions, []string{"--criuhook", script, "--drop-in", dropIn}, exitUsage, nil, []string{"give one"}},
		{"an argument", jdkOfOptions, []string{"/opt/jdk"}, exitUsage, nil, []string{"takes no arguments"}},
		{"a path with a blank", jdkOfOptions, []string{"--criuhook", spaced}, exitFailed, nil, []string{"link to it from a path without"}},
		{"a drop-in by another name", jdkOfOptions, []string{"--drop-in", script}, exitFailed, nil, []string{"by the name criu"}},
		{"a drop-in by another name, not there", jdkOfOptions, []string{"--drop-in", "/nowhere/foo"}, exitFailed, nil, []string{"by the name criu"}},
		{"a drop-in by another name, bundled", jdkBundled, []string{"--drop-in", script}, exitFailed, nil, []string{"by the name criu"}},
		{"a script with a blank, not there", jdkOfOptions, []string{"--criuhook", "/no where/criuhook"}, exitFailed, nil, []string{"blanks and commas"}},
		{"a drop-in that is not there", jdkOfOptions, []string{"--drop-in", "/nowhere/criu"}, exitFailed, nil, []string{"no such file"}},
		{"not absolute", jdkOfOptions, []string{"--criuhook", "criuhook"}, exitUsage, nil, []string{"not an absolute path"}},
		{"not there", jdkOfOptions, []string{"--criuhook", "/nowhere/criuhook"}, exitFailed, nil, []string{"/nowhere/criuhook"}},
		{"not executable", jdkOfOptions, []string{"--criuhook", plain}, exitFailed, nil, []string{"not an executable file"}},
		{"a JVM without the flags", map[string]string{"lib/criuengine": "", "lib/server/libjvm.so": ""}, []string{"--criuhook", script}, exitFailed, nil, []string{"take a newer release"}},
		{"no CRaC", nil, nil, exitFailed, nil, []string{"has no CRaC with CRIU"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			home := cracJDK(t, tt.files)
			code, stdout, stderr := invoke(t, append([]string{"crac-env", "--jdk", home}, tt.args...)...)
			if code != tt.code {
				t.Errorf("exit code %d, expected %d", code, tt.code)
			}
			for _, c := range []struct {
				name, got string
				want      []string
			}{{"stdout", stdout, tt.stdout}, {"stderr", stderr, tt.stderr}} {
				if len(c.want) == 0 && c.got != "" {
					t.Errorf("%s: %s", c.name, c.got)
				}
				for _, w := range c.want {
					if all, ok := strings.CutPrefix(w, "="); ok && c.got != all || !ok && !strings.Contains(c.got, w) {
						t.Errorf("%s: got\n%s\nexpected %q", c.name, c.got, w)
					}
				}
			}
		})
	}
}

// TestCRaCEnvFindsTheJDK: by JAVA_HOME, then by java in PATH, through links.
func TestCRaCEnvFindsTheJDK(t *testing.T) {
	one, two := cracJDK(t, jdkBundled), cracJDK(t, jdkOfOptions)
	bin := t.TempDir()
	if err := os.Symlink(filepath.Join(two, "bin/java"), filepath.Join(bin, "java")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	t.Setenv("JAVA_HOME", one)
	if code, stdout, stderr := invoke(t, "crac-env"); code != exitDone || !strings.Contains(stdout, one+": ") {
		t.Errorf("by JAVA_HOME: %d, %s%s", code, stdout, stderr)
	}
	t.Setenv("JAVA_HOME", "")
	real, err := filepath.EvalSymlinks(two)
	if err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := invoke(t, "crac-env"); code != exitDone || !strings.Contains(stdout, real+": ") {
		t.Errorf("by java in PATH: %d, %s%s", code, stdout, stderr)
	}
	t.Setenv("PATH", t.TempDir())
	if code, _, stderr := invoke(t, "crac-env"); code != exitFailed || !strings.Contains(stderr, "--jdk") {
		t.Errorf("without any: %d, %s", code, stderr)
	}
}

// TestCRaCEnvPassedOver: a variable that makes the JVM pass over a bundle is named.
func TestCRaCEnvPassedOver(t *testing.T) {
	t.Setenv("JDK_JAVA_OPTIONS", "")
	t.Setenv("CRAC_CRIU_PATH", "/usr/sbin/criu")
	home := cracJDK(t, jdkBundled)
	code, stdout, stderr := invoke(t, "crac-env", "--jdk", home, "--java-options")
	if code != exitDone || stdout != bothPrefixes+"\n" || !strings.Contains(stderr, "CRAC_CRIU_PATH=/usr/sbin/criu is set") {
		t.Errorf("%d, %s%s", code, stdout, stderr)
	}
	t.Setenv("CRAC_CRIU_PATH", filepath.Join(home, "lib/criu"))
	if _, _, stderr := invoke(t, "crac-env", "--jdk", home, "--java-options"); stderr != "" {
		t.Error(stderr)
	}
}

// TestCRaCEnvOddHome: the JDK's home is the user's to name, so it is quoted.
func TestCRaCEnvOddHome(t *testing.T) {
	home := filepath.Join(t.TempDir(), `it's a "$JDK"\`)
	if err := os.Rename(cracJDK(t, jdkOfVariables), home); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JDK_JAVA_OPTIONS", "")
	criu := filepath.Join(home, "lib/criu")
	code, stdout, stderr := invoke(t, "crac-env", "--jdk", home, "--drop-in", "/in/the/image/criu", "--dockerfile")
	want := `ENV CRIUHOOK_CRIU="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`).Replace(criu) + "\"\n"
	if code != exitDone || !strings.Contains(stdout, want) {
		t.Errorf("%d, %s%s\nexpected %s", code, stdout, stderr, want)
	}
	dropIn := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(dropIn, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = invoke(t, "crac-env", "--jdk", home, "--drop-in", dropIn, "--shell")
	if code != exitDone {
		t.Fatal(stderr)
	}
	cmd := exec.Command("/bin/sh", "-c", `eval "$TEXT"; printf %s "$CRIUHOOK_CRIU"`)
	cmd.Env = append(os.Environ(), "TEXT="+stdout, "JDK=wrong")
	if got, err := cmd.Output(); err != nil || string(got) != criu {
		t.Errorf("in a shell: %v, %s, expected %s", err, got, criu)
	}
}

func TestCRaCEnvCompletes(t *testing.T) {
	for word, want := range map[string]string{"--jdk": ":16\n", "--criuhook": ":0\n", "--drop-in": ":0\n"} {
		if code, stdout, _ := invoke(t, "__complete", "crac-env", word, ""); code != exitDone || !strings.HasSuffix(stdout, want) {
			t.Errorf("%s: %d, %q", word, code, stdout)
		}
	}
}

// TestCRaCEnvInAShell: what --shell prints does what it says in a shell, quoted
// around it or not, and again.
func TestCRaCEnvInAShell(t *testing.T) {
	home := cracJDK(t, jdkOfVariables)
	script := filepath.Join(t.TempDir(), "criuhook")
	if err := os.WriteFile(script, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CRAC_CRIU_OPTS", "-v4 --ghost-limit 64M")
	t.Setenv("JDK_JAVA_OPTIONS", `-Dname="it's  mine"`)
	for _, phase := range [][]string{nil, {"--restore"}} {
		args := append([]string{"crac-env", "--jdk", home, "--criuhook", script, "--shell"}, phase...)
		code, stdout, stderr := invoke(t, args...)
		if code != exitDone {
			t.Fatal(stderr)
		}
		options := `-Dname="it's  mine"`
		if phase == nil {
			options += " " + bothPrefixes
		}
		want := "-v4 --ghost-limit 64M --action-script=" + script + "\n" + options + "\n"
		// Without quotes the shell makes one blank of two: not in the first phase then.
		evals := []string{`eval "$TEXT"`}
		if phase != nil {
			evals = append(evals, `eval $TEXT`)
		}
		for _, eval := range evals {
			cmd := exec.Command("/bin/sh", "-c", eval+`; printf '%s\n' "$CRAC_CRIU_OPTS" "$JDK_JAVA_OPTIONS"`)
			cmd.Env = append(os.Environ(), "TEXT="+stdout)
			if got, err := cmd.Output(); err != nil || string(got) != want {
				t.Errorf("%s gives %v\n%s\nexpected\n%s\nof\n%s", eval, err, got, want, stdout)
			}
		}
	}
}
