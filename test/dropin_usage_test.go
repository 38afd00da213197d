// SPDX-License-Identifier: Apache-2.0

package test

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDropinUsage: how words may be put, and how not.
func TestDropinUsage(t *testing.T) {
	b := newBench(t)
	b.each(t, "",
		// forms of options
		"dump --tree=PID -R --images-dir=images --log-file=log -v4",
		"dump -tPID -RDimages -olog -v4",
		"dump -Rv4 -tPID -Dimages -olog",
		"dump --tr PID --leave-r --images images --log-f log --verb=4",
		"dump --tre=PID --leave-running --work=work --images images --log-f=log",
		"-t PID -R -D images -o log -v4 dump",
		"-t PID -R dump -D images -o log -vvvv",
		"-R -t PID -D images -o log -v4 -- dump",
		"dump -t PID -R -D images -o log -v3 --",
		"dump -t PID -t OTHER -t PID -R -D work -D images -o l -o log",
		"dump -t PID -R -o log", // images in the current directory
		"dump -t PID -R -D images",
		"dump -t PID -R -D images -v4",
		"dump -t PID -R -D images -W work -o log --pidfile dump.pid",
		"dump -t PID -R -D images -W work",
		"dump -t PID -s -D images -o log",
		"dump -t PID -D images -o log",
		"restore -dDimages -olog -v4",
		"restore -d -D images -W work -o log --pidfile r.pid -v4",
		"-d -D images -o log restore",
		"-d -D images -o log -v4 -- restore",
		"restore -d -D images",
		"restore -d -D images -t PID",
		"restore -d -D images -o log -v1 --verbosity --display-stats",
		// what is wrong
		"", "-v4", "--", "nonsense", "dump", "restore", "dump -R", "dump -D images", "dump -t",
		"dump -t PID -D images -o", "dump -t PID -D images -o log more", "dump -t PID more words",
		"dump -t PID -D images -o log -- more", "restore -d -D images more", "restore more words",
		"dump -t PID --leave", "dump -t PID --lea", "dump -t PID --leave-running=yes", "dump -t PID --no-tree",
		"dump -t PID --nonsense", "dump -t PID -q", "dump -t PID -Rq", "dump -tPIDx -R -D images -o log",
		"dump -t PID -R -D images -o log --ex", "dump -t PID --exec-cmd -- true", "dump -t PID -S", "restore -S -D images",
		"restore -D images -d --exec-cmd -- true", "restore --exec-cmd", "restore -D work -d -o log", "restore -d -D missing",
		"dump restore -t PID", "restore dump", "dump -t PID -d --ps-socket 1", "dump -t PID --ms",
		"--help", "-h", "dump --help", "dump -t PID -h -R", "--version", "-V", "dump -V", "restore --version -D x", "help", "version",
	)
	for _, tr := range []trial{
		{line: "dump -t PID -R -D images -o log", env: "POSIXLY_CORRECT=1"},
		{line: "-t PID -R -D images -o log -v4 dump", env: "POSIXLY_CORRECT=1"},
		{line: "-d -D images -o log -v4 restore", env: "POSIXLY_CORRECT="},
		{line: "-D images -o log -v4 restore -d", env: "POSIXLY_CORRECT="},
	} {
		b.alike(t, tr)
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// TestDropinConfigFiles: all four of CRIU's configuration files, alone and
// together, show in the verbosity, the log's name and the order of scripts.
func TestDropinConfigFiles(t *testing.T) {
	b := newBench(t)
	for _, name := range []string{"/etc/criu/default.conf", "/root/.criu/default.conf"} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(filepath.Dir(name)) })
	}
	script := func(n string) string { return "action-script " + trialDir + "/script" + n + "\n" }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	named := map[string]string{"named.conf": "log-file named.log", "bad.conf": "nonsense", "odd.conf": "log-file a b"}
	for _, both := range []string{"dump -t PID -R -D images ", "restore -d -D images "} {
		// /etc/criu/default.conf and ~/.criu/default.conf
		for _, files := range [][2]string{{"", ""}, {"log-file etc.log\n" + script(""), ""},
			{"log-file etc.log\n" + script(""), "log-file home.log\nverbosity=4\n" + script("2")},
			{"# nothing\n\nlog-file \"etc.log\" # why\nleave-running\n", "verbosity\nverbosity\n"},
			{"nonsense\n", ""}, {"log-file a b\n", ""}, {"", "tree x\n"}} {
			write("/etc/criu/default.conf", files[0])
			write("/root/.criu/default.conf", files[1])
			for _, tr := range []trial{
				{line: both},
				{line: both + "-o line.log"},
				{line: both + "--no-default-config"},
				{line: both + "--no-default-c"},
				{line: both + "--config named.conf"},
				{line: both, env: "CRIU_CONFIG_FILE=named.conf"},
				{line: both + "--config=named.conf --action-script /tmp/trial/script", env: "CRIU_CONFIG_FILE=bad.conf"},
				{line: both + "--no-default-config", env: "CRIU_CONFIG_FILE=named.conf HOME=/"},
			} {
				tr.files = named
				b.alike(t, tr)
			}
		}
		write("/etc/criu/default.conf", "")
		write("/root/.criu/default.conf", "")
		for _, line := range []string{"--config bad.conf", "--config=odd.conf", "--config missing", "--config images", "--config", "-o --config=named.conf", "--config named.conf --config bad.conf"} {
			b.alike(t, trial{line: both + line, files: named})
		}
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// TestDropinOtherCommands: what neither dumps nor restores is CRIU's.
func TestDropinOtherCommands(t *testing.T) {
	b := newBench(t)
	b.each(t, "",
		"check", "check --all", "check --feature mem_dirty_track", "check --feature bad", "check --feature list", "check -v4 -o log", "check more",
		"pre-dump", "pre-dump -t PID -D images -o log -v4", "pre-dump -t PID -D images --track-mem -o log -R", "pre-dump -t 0",
		"pre-dump -t PID --lazy-pages", "pre-dump -t PID -D missing", "dedup", "dedup -D images", "dedup -D missing",
		"cpuinfo", "cpuinfo dump -D images", "cpuinfo check -D images", "cpuinfo bad",
		"page-server --port x", "page-server -D missing", "page-server --address 300.1.1.1 --port 1", "page-server more",
		"service -h", "service more", "service --address /missing/socket", "lazy-pages", "lazy-pages -D missing", "lazy-pages -D images more",
		"exec", "exec -t PID", "show", "show x",
		"swrk", "swrk 0", "swrk 77", "swrk x", "swrk 1 2", "-D images swrk 77", "swrk 3", "swrk --nonsense 3",
	)
	noCRIULeft(t)
	nothingLeft(t)
}

// TestDropinScripts: action scripts that fail, and what comes of it.
func TestDropinScripts(t *testing.T) {
	b := newBench(t)
	for _, stage := range []string{"pre-dump", "post-dump", "network-lock", "pre-restore", "setup-namespaces", "post-restore", "pre-resume", "post-resume"} {
		for _, both := range []string{"dump -t PID -R -D images -v4 -o log", "dump -t PID -D images -v4 -o log", "restore -d -D images -v4 -o log"} {
			b.alike(t, trial{line: both + " --action-script /tmp/trial/script2 --action-script /tmp/trial/script", env: "FAIL_STAGE=" + stage})
		}
	}
	noCRIULeft(t)
	nothingLeft(t)
}
