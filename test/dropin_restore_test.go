// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDropinRestores: where CRIU stays, what it becomes, who is the parent of
// what it restored, and what that inherits.
func TestDropinRestores(t *testing.T) {
	b := newBench(t)
	const restore = "restore -D images -v4 -o log "
	b.each(t, restore,
		"", "-s", "-W work --pidfile r.pid", "--action-script /tmp/trial/script --action-script /tmp/trial/script2", "--log-pid --display-stats",
		"-d", "-d -S", "-dS -s --pidfile r.pid", "--restore-detached --restore-sibling", "-S",
		"--exec-cmd -- perl -e wait;exit($?)", "--exec-cmd --pidfile r.pid -- perl -e wait;exit(9)", "--exec-cmd -W work -- perl -e system('pwd');wait;kill(9,$$)",
		"--exec-cmd -- true", "--exec-cmd -- false", "--exec-cmd -- /missing", "--exec-cmd true", "--exec-cmd perl -e wait", "-- --exec-cmd true",
		"-d --close 3", "--close 3 --close 1", "-d --status-fd 3",
	)
	for _, options := range []string{"", "-d ", "-d -S ", "--exec-cmd "} {
		var command string
		if strings.HasPrefix(options, "--exec") {
			command = " -- perl -e wait"
		}
		for _, inherit := range []string{"--inherit-fd fd[3]:pipe:[INO]", "--inherit-fd=fd[3]:pipe:[INO] --close 3", "--inherit-fd fd[3]:pipe:[1]", "--inherit-fd fd[9]:pipe:[INO]"} {
			b.alike(t, trial{line: restore + options + inherit + command, pipe: true})
		}
	}
	for _, line := range []string{"--version", "dump", restore + "-d", dumps + "-o other.log", restore + "--exec-cmd -- true", "check", "dump -t PID -D missing"} {
		b.alike(t, trial{line: line, verb: true})
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// TestDropinPages: memory that goes elsewhere, or is partly in other images.
func TestDropinPages(t *testing.T) {
	b := newBench(t)
	const server = "page-server -d --address 127.0.0.1 --port 12345 -D work -W . -v4 -o server.log --pidfile page-server.pid"
	for _, tr := range []trial{
		{line: dumps + "--page-server --address 127.0.0.1 --port 12345", before: server},
		{line: dumps + "--page-server --address 127.0.0.1 --port 12345 --auto-dedup", before: server},
		{line: "dump -t PID -D images -v4 -o log --page-server --address 127.0.0.1 --port 12345", before: server},
		{line: dumps + "--page-server --address 127.0.0.1 --port 12346"},
		{line: dumps + "--page-server --ps-socket 3", server: true},
		{line: dumps + "--prev-images-dir ../work", before: "pre-dump -t PID -D work -o pre.log"},
		{line: dumps + "--prev-images-dir ../work --track-mem", before: "pre-dump -t PID -D work -o pre.log --track-mem"},
		{line: dumps + "--prev-images-dir ../work --auto-dedup", before: "dump -R -t PID -D work -o pre.log"},
		{line: "pre-dump -t PID -D images -o log --prev-images-dir ../work", before: "dump -R -t PID -D work -o pre.log"},
	} {
		b.alike(t, tr)
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// TestDropinTerminal: a job of a shell on a terminal is restored on the terminal,
// in the session and among the children of whoever restores it.
func TestDropinTerminal(t *testing.T) {
	need(t)
	var outcomes []string
	for _, w := range []way{byStock, byDropin} {
		outcomes = append(outcomes, shellJob(t, w))
	}
	if outcomes[0] != outcomes[1] || !strings.Contains(outcomes[0], "fd 1 is the terminal") {
		t.Errorf("the drop-in: %s\nstock CRIU: %s", outcomes[1], outcomes[0])
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// shellJob dumps and restores a job, each on a terminal of its own.
func shellJob(t *testing.T, w way) string {
	t.Helper()
	on := func(args ...string) (*exec.Cmd, *os.File, string) {
		t.Helper()
		master, slave := terminal(t)
		defer slave.Close()
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = "/", slave, slave, slave
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, master) }()
		return cmd, master, slave.Name()
	}
	dir := images(t)
	shell, master, _ := on("sh", "-c", "sleep 1000000 & wait")
	defer master.Close()
	var job int
	eventually(t, "the job runs", func() bool {
		for _, pid := range sessionOf(shell.Process.Pid) {
			if contentsOf(fmt.Sprintf("/proc/%d/comm", pid)) == "sleep\n" {
				job = pid
			}
		}
		return job != 0
	})
	w.dump(job, dir, "--shell-job", "-v4", "-o", "dump.log").run(t, root, filepath.Join(dir, "dump.log")).want(t, "dump", 0)
	_ = shell.Wait() // its job is gone
	awaitFree(t, []int{job})

	c := w.restore(dir, false, "--shell-job", "-v4", "-o", "restore.log")
	criu, master, tty := on(append([]string{c.file}, c.args[1:]...)...)
	defer master.Close()
	eventually(t, "the job is restored", func() bool {
		return finalWait.MatchString(contentsOf(fmt.Sprintf("/proc/%d/syscall", criu.Process.Pid))) && stateOf(job) == "S"
	})
	var out strings.Builder
	for fd := range 3 {
		if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", job, fd)); link == tty {
			fmt.Fprintf(&out, "fd %d is the terminal, ", fd)
		}
	}
	f := strings.Fields(contentsOf(fmt.Sprintf("/proc/%d/stat", job)))
	of := strings.Fields(contentsOf(fmt.Sprintf("/proc/%d/stat", criu.Process.Pid)))
	fmt.Fprintf(&out, "parent %v, group %v, session %v, terminal %v, foreground %v, ",
		f[3] == strconv.Itoa(criu.Process.Pid), f[4] == of[4], f[5] == of[5], f[6] == of[6], f[7] == of[7])
	if err := unix.Kill(job, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = criu.Wait()
	awaitFree(t, []int{job})
	return out.String() + criu.ProcessState.String()
}

// terminal makes a pseudo terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}
