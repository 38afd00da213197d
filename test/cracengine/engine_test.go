// SPDX-License-Identifier: Apache-2.0

package cracengine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLines: what CRIU is told, word by word, by each generation.
func TestLines(t *testing.T) {
	const dumpNewer = "/c dump -t 7 -D DIR -v4 -o dump4.log --shell-job"
	const helper = "HOME/lib/criuhelper"
	for _, c := range []struct {
		name       string
		generation Generation
		options    string
		env        map[string]string
		files      []string // in the images directory
		dump       string
		restore    string
		err        string // of the restore
	}{
		{
			name: "executable", generation: Executable,
			env: map[string]string{"CRAC_CRIU_OPTS": " --a  --b=c ", "CRAC_CRIU_LEAVE_RUNNING": ""}, files: []string{"cppath"},
			dump:    "/c dump -t 7 -D DIR --shell-job -v4 -o dump4.log -R --a --b=c",
			restore: "/c restore -W . --shell-job --action-script HOME/lib/criuengine -D DIR -v1 --a --b=c --exec-cmd -- HOME/lib/criuengine restorewait",
		},
		{
			name: "library", generation: Library, options: "keep_running=true,direct_map=false,args=--d --e",
			env: map[string]string{"CRAC_CRIU_OPTS": "--a"}, files: []string{"tags"},
			dump:    dumpNewer + " -R --a --d --e",
			restore: "/c restore -W . --shell-job --action-script " + helper + " -D DIR --cpu-cap=none -v1 --no-mmap-page-image --a --d --e --exec-cmd -- " + helper + " restorewait",
		},
		{
			name: "upstream", generation: Upstream, files: []string{"tags"},
			dump: dumpNewer + " --unprivileged",
			restore: "/c restore -W . --action-script " + helper + " -D DIR --cpu-cap=none -v1 --unprivileged" +
				" --inherit-fd fd[0]:/memfd:crac_fake_stdin --inherit-fd fd[1]:/memfd:crac_fake_stdout --inherit-fd fd[2]:/memfd:crac_fake_stderr" +
				" --exec-cmd -- " + helper + " restorewait",
		},
		{
			name: "upstream, of a terminal", generation: Upstream, files: []string{"tags", "tty-info.img"},
			dump:    dumpNewer + " --unprivileged",
			restore: "/c restore -W . --action-script " + helper + " -D DIR --cpu-cap=none -v1 --unprivileged --shell-job --exec-cmd -- " + helper + " restorewait",
		},
		{
			name: "upstream, with CRaC's CRIU", generation: Upstream, options: "legacy_criu=true", files: []string{"tags"},
			dump:    dumpNewer,
			restore: "/c restore -W . --action-script " + helper + " -D DIR --cpu-cap=none -v1 --shell-job --exec-cmd -- " + helper + " restorewait",
		},
		{
			name: "too many, executable", generation: Executable, env: map[string]string{"CRAC_CRIU_OPTS": strings.Repeat("-x ", 40)}, files: []string{"cppath"},
			dump:    "/c dump -t 7 -D DIR --shell-job -v4 -o dump4.log" + strings.Repeat(" -x", 21),
			restore: "/c restore -W . --shell-job --action-script HOME/lib/criuengine -D DIR -v1" + strings.Repeat(" -x", 17) + " --exec-cmd -- HOME/lib/criuengine restorewait",
		},
		{
			name: "too many, library", generation: Library, options: "args=" + strings.Repeat("-x ", 40), files: []string{"tags"},
			dump: dumpNewer + strings.Repeat(" -x", 21),
			err:  "too many arguments to CRIU",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			home, dir := t.TempDir(), t.TempDir()
			t.Setenv("CRAC_CRIU_PATH", "/c")
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			e := &engine{generation: c.generation, home: home}
			o, err := e.options(c.options)
			if err != nil {
				t.Fatal(err)
			}
			said := func(l line) string {
				if len(l) > 31 {
					t.Errorf("%d words", len(l))
				}
				return strings.NewReplacer(dir, "DIR", home, "HOME").Replace(strings.Join(l, " "))
			}
			if l, err := e.dumpLine("7", dir, o); err != nil || said(l) != c.dump {
				t.Errorf("dump: %v\n%s\nexpected\n%s", err, said(l), c.dump)
			}
			for _, f := range c.files {
				if err := os.WriteFile(filepath.Join(dir, f), []byte(dir), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			l, err := e.restoreLine(dir, o)
			if err != nil && err.Error() != c.err || said(l) != c.restore {
				t.Errorf("restore: %v\n%s\nexpected\n%s", err, said(l), c.restore)
			}
		})
	}
}
