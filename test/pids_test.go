// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/test/app"
)

// In a container pids are low, and those of a restore are the next ones that the
// kernel gives: nobody but the tree may take any before it is there.

// inNamespace is what pid 1 of a new pid namespace does: it has the next pid be
// $2, makes /proc/sys read-only if $1 is "ro", and runs the rest of its
// arguments, in place of itself if $3 is "exec". It ends when its stdin does,
// and with it everything else.
const inNamespace = `
exec 9>/proc/sys/kernel/ns_last_pid || exit
if [ "$1" = ro ]; then
	mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys || exit
	! true 2>/dev/null >/proc/sys/kernel/ns_last_pid || exit
fi
echo $(($2 - 1)) >&9
exec 9>&-
how=$3
shift 3
[ "$how" != exec ] || exec "$@" </dev/null
"$@" </dev/null &
wait $!
echo "ended: $?"
read -r line`

const noAnswer = "no answer of the daemon"

// single is an application of one thread, with the same commands on its control
// socket as far as they are needed here: any is a request on its connection.
const single = `
use Socket;
my ($control, $daemon) = @ARGV;
open(STDIN, "<", "/dev/null"); open(STDOUT, ">", "/dev/null"); open(STDERR, ">", "/dev/null");
$SIG{PIPE} = "IGNORE";
socket(my $c, AF_UNIX, SOCK_STREAM, 0) or die; connect($c, sockaddr_un($daemon)) or die;
socket(my $l, AF_UNIX, SOCK_STREAM, 0) or die; bind($l, sockaddr_un($control)) or die; listen($l, 9);
while (accept(my $a, $l)) {
	sysread($a, my $b, 999);
	syswrite($c, "x\n");
	syswrite($a, sysread($c, $b, 2) == 2 ? "{}\n" : "{\"err\":\"` + noAnswer + `\"}\n");
}`

// namespace is a pid namespace in which something runs.
type namespace struct {
	cmd    *exec.Cmd
	stdin  *os.File
	lines  chan string // what is written to stdout and stderr
	output bytes.Buffer
}

// inside runs a command in a pid namespace of its own. It has pid 1, or that
// of next.
func inside(t testing.TB, access string, next int, how string, argv ...string) *namespace {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-pf", "--mount-proc", "--kill-child", "--", "sh", "-c", inNamespace, "sh", access, strconv.Itoa(next), how}, argv...)
	n := &namespace{cmd: exec.Command("unshare", args...), stdin: w, lines: make(chan string, 1000)}
	n.cmd.Stdin, n.cmd.Stdout, n.cmd.Stderr, n.cmd.Dir = r, theirs, theirs, "/"
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = n.cmd.Start()
	r.Close()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(n.lines)
		defer out.Close()
		for s := bufio.NewScanner(out); s.Scan(); {
			n.lines <- s.Text()
		}
	}()
	return n
}

// exit waits for the exit code of the command; -1: there is none.
func (n *namespace) exit() int {
	late := time.After(criuTime)
	for {
		select {
		case line, ok := <-n.lines:
			if code, is := strings.CutPrefix(line, "ended: "); is {
				i, _ := strconv.Atoi(code)
				return i
			}
			if !ok {
				return -1
			}
			fmt.Fprintln(&n.output, line)
		case <-late:
			return -1
		}
	}
}

// end ends all that is in it: who started it ends, and wants pid 1 to end with it
// (PR_SET_PDEATHSIG), whatever that has executed since.
func (n *namespace) end(t testing.TB) string {
	t.Helper()
	first := contentsOf(fmt.Sprintf("/proc/%d/task/%[1]d/children", n.cmd.Process.Pid))
	_ = n.cmd.Process.Kill()
	late := time.AfterFunc(patience, func() {
		t.Errorf("pid 1 of the namespace, process %s, did not end with who started it", first)
		if pid, _ := strconv.Atoi(strings.TrimSpace(first)); pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
	for line := range n.lines {
		fmt.Fprintln(&n.output, line)
	}
	late.Stop()
	n.stdin.Close()
	_ = n.cmd.Wait() // killed
	return n.output.String()
}

// low is an application with a low pid in images, the same as in a container.
type low struct {
	*App
	dir string
	ids []int // of its threads
}

// dumpLow dumps an application that has a pid, of one thread, or of several,
// which have those that follow.
func dumpLow(t testing.TB, pid, threads int) *low {
	t.Helper()
	_, path := daemon(t, "unix", "reconnect")
	control := filepath.Join(folder(t), "control")
	argv := []string{"setsid", "/proc/self/exe", app.Role, control}
	if threads == 1 {
		argv = []string{"setsid", "perl", "-e", single, control, path}
	} else { // setsid has a name of its own for /proc/self/exe
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		argv[1] = exe
	}
	dir := images(t)
	// $0 lets the application have its pid, and is no process in its session.
	const dump = `hook=$1; dir=$2; go=$3; shift 3
"$@" >/dev/null 2>&1 &
until [ -e "$go" ]; do sleep 0.01; done
echo 300 >/proc/sys/kernel/ns_last_pid
"$hook" dump -t $! -D "$dir"`
	ready := filepath.Join(folder(t), "go")
	n := inside(t, "rw", pid, "exec", append([]string{"sh", "-c", dump, "sh", criuhook, dir, ready}, argv...)...)
	a := &low{App: &App{Process: &Process{}, Control: control}, dir: dir}
	a.Awake(t)
	if threads > 1 {
		a.connect(t, "c", path)
		a.Request(t, "c")
	}
	if err := os.WriteFile(ready, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of the dump", func() bool {
		return n.cmd.Process.Signal(syscall.Signal(0)) != nil || stateOf(n.cmd.Process.Pid) == "Z"
	})
	if said := n.end(t); n.cmd.ProcessState.ExitCode() != 0 {
		t.Fatalf("dump: %s\n%s", said, contentsOf(filepath.Join(dir, "dump.log")))
	}
	a.PID = pid
	if a.ids = a.dumpedThreads(dir); a.ids == nil || threads > 1 && len(a.ids) == 1 {
		t.Fatalf("the threads in the images are %v, expected %d and more", a.ids, pid)
	}
	return a
}

// request makes a request on its connection, if w has made a new one.
func (a *low) request(w way) error {
	cmd := app.Command{Op: "request", Conn: "c"}
	if w == byStock {
		cmd.Op = "ping"
	}
	_, err := a.Try(cmd)
	if w == byStock && err != nil && err.Error() == noAnswer {
		return nil // it is there, but not its connection
	}
	return err
}

// lowRestores are ways to restore.
var lowRestores = []struct {
	by       way
	detached bool
	how      string // "exec": as pid 1
}{
	{byStock, true, ""},
	{byStock, false, "exec"},
	{byScript, true, ""},
	{byScript, false, "exec"},
	{byDropin, true, ""},
	{byDropin, false, ""},
	{byDropin, false, "exec"},
	{byRPC, true, ""},
	{byRPC, false, ""},
	{byRPC, false, "exec"},
}

// TestLowPIDs: whatever restores where stock CRIU alone does, does so with us. A
// restore that needs the very pid that CRIU, or the verb, has cannot work.
func TestLowPIDs(t *testing.T) {
	need(t)
	for pid := 3; pid <= 20; pid++ {
		t.Run(strconv.Itoa(pid), func(t *testing.T) {
			a := dumpLow(t, pid, 1+pid%2)
			for _, access := range []string{"ro", "rw"} {
				if access == "rw" && pid%5 > 1 {
					continue // the easier one
				}
				for _, r := range lowRestores {
					name := strings.TrimSuffix(fmt.Sprintf("%s %v detached=%v %s", access, r.by, r.detached, r.how), " ")
					a.restoreIn(t, name, access, 2, r.how, r.by.restore(a.dir, r.detached, "-v4", "-o", "restore.log"))
				}
			}
		})
	}
	nothingLeft(t)
}

// restoreIn restores in a new pid namespace where the next pid is next.
func (a *low) restoreIn(t testing.TB, name, access string, next int, how string, c command) {
	t.Helper()
	log := filepath.Join(a.dir, "restore.log")
	_ = os.Remove(log)
	n := inside(t, access, next, how, append([]string{c.file}, c.args[1:]...)...)
	var err error
	if slices.Contains(c.args, "-d") || slices.Contains(c.args, "--detach") {
		if code := n.exit(); code != 0 {
			err = fmt.Errorf("exit code %d", code)
		}
	}
	for end := time.Now().Add(patience); err == nil; time.Sleep(time.Millisecond) {
		if err = a.request(c.by); err == nil {
			break
		}
		if stateOf(n.cmd.Process.Pid) != "Z" && time.Now().Before(end) && !strings.Contains(contentsOf(log), "Restoring FAILED") {
			err = nil // not yet
		}
	}
	said := n.end(t)
	if err != nil {
		t.Errorf("%s: %v\n%s\n%s", name, err, said, Result{Log: contentsOf(log)}.tail())
	}
}

// TestInheritedBeyondSoftLimit: CRIU finds room to start beside more sockets than
// the soft limit allows it descriptors.
func TestInheritedBeyondSoftLimit(t *testing.T) {
	inheritWays(t, func(t *testing.T) {
		_, path := daemon(t, "unix", "reconnect")
		a := startApp(t, root, nil)
		const n = 150
		for i := range n {
			a.connect(t, strconv.Itoa(i), path)
		}
		dir := a.Dump(t)
		c := a.restoreBy.restore(dir, true, "-v4", "-o", "restore.log")
		c.args = append([]string{"prlimit", "--nofile=64:", c.file}, c.args[1:]...)
		c.file = "prlimit"
		c.run(t, root, filepath.Join(dir, "restore.log")).want(t, "restore", 0)
		for i := range n {
			a.Request(t, strconv.Itoa(i))
		}
		nothingLeft(t)
	})
}

// TestRestoreStopped: who stops the verb while it waits for a daemon wants no
// restore, and so none without the connection.
func TestRestoreStopped(t *testing.T) {
	eachWay(t, []way{byRPC}, func(t *testing.T) {
		srv, path := daemon(t, "unix", "slow")
		a := startApp(t, root, nil)
		a.connect(t, "c", path)
		a.Request(t, "c")
		dir := a.Dump(t)
		srv.Close()
		r := during(func() Result { return a.TryRestore(t, dir) }, func(done <-chan struct{}) {
			if pid := catchVerb(done); pid != 0 {
				// It opens them just before it connects, and listens to signals by then.
				eventually(t, "the verb has the images open", func() bool {
					links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
					return slices.ContainsFunc(links, func(l string) bool { to, _ := os.Readlink(l); return to == dir })
				})
				_ = unix.Kill(pid, unix.SIGINT)
			}
		})
		r.want(t, "restore", 1)
		if !strings.Contains(r.Output, "stopped by signal") || strings.Contains(r.Output, "hung up") {
			t.Errorf("it says:\n%s", r.Output)
		}
		if !isFree(a.PID) {
			t.Errorf("process %d is restored", a.PID)
		}
		nothingLeft(t)
	})
}

// TestRestorePrintsNoPID: the pid cannot be printed, and the verb stays with the
// tree all the same.
func TestRestorePrintsNoPID(t *testing.T) {
	need(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	dir := a.Dump(t)
	const quiet = `exec "$@" >/dev/full`
	c := byRPC.restore(dir, false, "-v4", "-o", "restore.log")
	c.args = append([]string{"sh", "-c", quiet, "sh", c.file}, c.args[1:]...)
	c.file = "sh"
	r := during(func() Result { return c.run(t, root, filepath.Join(dir, "restore.log")) }, func(<-chan struct{}) {
		a.Awake(t)
		a.Request(t, "c")
		_ = unix.Kill(a.PID, unix.SIGTERM)
	})
	r.want(t, "restore", 128+int(unix.SIGTERM))
	if !strings.Contains(r.Output, "its pid could not be printed") {
		t.Errorf("it says:\n%s", r.Output)
	}
	nothingLeft(t)
}
