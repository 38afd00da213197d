// SPDX-License-Identifier: Apache-2.0

package interpose_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/interpose"
)

// patience bounds every wait for a condition.
const patience = 20 * time.Second

type tracee struct {
	t   *testing.T
	pid int
	in  io.Writer
	out *bufio.Reader
	raw *os.File // under out
}

func start(t *testing.T) *tracee {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: tracing may need CAP_SYS_PTRACE")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), actVariable+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		unix.Kill(cmd.Process.Pid, unix.SIGKILL)
		cmd.Wait() // ECHILD if the tracer has waited for it
	})
	p := &tracee{t: t, pid: cmd.Process.Pid, in: in, out: bufio.NewReader(out), raw: out.(*os.File)}
	if got := p.hear(); got != "ready" {
		t.Fatal(got)
	}
	return p
}

func (p *tracee) tell(cmd string) {
	p.t.Helper()
	_, err := io.WriteString(p.in, cmd+"\n")
	check(p.t, err)
}

func (p *tracee) hear() string {
	p.t.Helper()
	s, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%v after %q", err, s)
	}
	return strings.TrimSuffix(s, "\n")
}

func (p *tracee) ask(cmd string) string {
	p.t.Helper()
	p.tell(cmd)
	return p.hear()
}

// shown asserts how the tracee was shown sockets.
func (p *tracee) shown(what string, sockets string, want ...string) {
	p.t.Helper()
	for _, w := range want {
		if !strings.Contains(sockets, " "+w+" ") {
			ino, _, _ := strings.Cut(w, ":")
			_, got, _ := strings.Cut(sockets, " "+ino+":")
			got, _, _ = strings.Cut(got, " ")
			p.t.Errorf("%s: socket %s:%s, want %s", what, ino, got, w)
		}
	}
}

// traced is a tracer at work.
type traced struct {
	t    *testing.T
	done chan error
}

// follow returns when the tracee is traced.
func follow(t *testing.T, pid int, decide interpose.Decide) *traced {
	t.Helper()
	began, done := make(chan error), make(chan error, 1)
	go func() {
		tr, err := interpose.New(pid)
		began <- err
		if err == nil {
			done <- tr.Run(decide, func() {})
		}
	}()
	check(t, <-began)
	return &traced{t, done}
}

func (tr *traced) ended() error {
	tr.t.Helper()
	select {
	case err := <-tr.done:
		return err
	case <-time.After(patience):
		tr.t.Fatal("the tracer does not end")
		return nil
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pair(t *testing.T, typ int) (a, b uint32) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	var ino [2]uint32
	for i, fd := range fds {
		var st unix.Stat_t
		check(t, unix.Fstat(fd, &st))
		ino[i] = uint32(st.Ino)
		t.Cleanup(func() { unix.Close(fd) })
	}
	return ino[0], ino[1]
}

func (p *tracee) untraced() {
	p.t.Helper()
	if by := interpose.TracerOf(p.pid); by != 0 {
		p.t.Errorf("process %d is still traced by %d", p.pid, by)
	}
	if got := p.ask("ping"); got != "pong" {
		p.t.Error(got)
	}
}

func as(ino uint32, state int, peer int64, shut int) string {
	return fmt.Sprintf("%d:%d:%d:%d", ino, state, peer, shut)
}

func TestRunHides(t *testing.T) {
	p := start(t)
	a, b := pair(t, unix.SOCK_STREAM)
	c, d := pair(t, unix.SOCK_SEQPACKET)
	e, f := pair(t, unix.SOCK_DGRAM)
	for range 100 { // so that the answer comes in several pieces
		pair(t, unix.SOCK_STREAM)
	}
	var asked atomic.Int32
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) {
		asked.Add(1)
		return map[uint32]interpose.Form{a: interpose.Dormant, c: interpose.Dead, e: interpose.Dead}, 2, nil
	})
	if by := interpose.TracerOf(p.pid); by == 0 {
		t.Error("not traced")
	}
	hidden := []string{
		as(a, 7, -1, 0), as(b, 1, int64(a), 0),
		as(c, 1, -1, 3), as(d, 1, int64(c), 0),
		as(e, 7, -1, 0), as(f, 1, int64(e), 0),
	}
	p.ask("inet")
	if asked.Load() != 0 {
		t.Error("decided at a question for another family")
	}
	p.shown("first namespace", p.ask("unix"), hidden...)
	p.ask("inet")
	p.shown("second namespace", p.ask("unix"), hidden...)
	check(t, tr.ended())
	p.untraced()
	if asked.Load() != 1 {
		t.Errorf("decided %d times", asked.Load())
	}
	p.shown("afterwards", p.ask("unix"), as(a, 1, int64(b), 0), as(c, 1, int64(d), 0))
}

// TestRunNotFrozenYet: what CRIU asks before it has frozen the tree, to learn
// of the kernel, is neither edited nor counted.
func TestRunNotFrozenYet(t *testing.T) {
	p := start(t)
	a, b := pair(t, unix.SOCK_STREAM)
	var asked atomic.Int32
	var frozen atomic.Bool
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) {
		asked.Add(1)
		if !frozen.Load() {
			return nil, 0, nil
		}
		return map[uint32]interpose.Form{a: interpose.Dormant}, 1, nil
	})
	for range 2 {
		p.shown("before", p.ask("unix"), as(a, 1, int64(b), 0))
	}
	if asked.Load() != 2 {
		t.Errorf("decided %d times at 2 questions", asked.Load())
	}
	frozen.Store(true)
	p.shown("frozen", p.ask("unix"), as(a, 7, -1, 0), as(b, 1, int64(a), 0))
	check(t, tr.ended())
	p.untraced()
}

func TestRunEndsAtImages(t *testing.T) {
	p := start(t)
	a, _ := pair(t, unix.SOCK_STREAM)
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) {
		return map[uint32]interpose.Form{a: interpose.Dormant}, 3, nil
	})
	if got := p.ask("create " + filepath.Join(t.TempDir(), "early")); got != "<nil>" {
		t.Fatal(got)
	}
	p.shown("one of three", p.ask("unix"), as(a, 7, -1, 0))
	if got := p.ask("create " + filepath.Join(t.TempDir(), "image")); got != "<nil>" {
		t.Fatal(got)
	}
	check(t, tr.ended())
	p.untraced()
}

func TestRunRefused(t *testing.T) {
	p := start(t)
	a, b := pair(t, unix.SOCK_STREAM)
	refused := errors.New("refused")
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) { return nil, 0, refused })
	p.shown("refused", p.ask("unix"), as(a, 1, int64(b), 0))
	if err := tr.ended(); !errors.Is(err, refused) {
		t.Error(err)
	}
	p.untraced()
}

func never() (map[uint32]interpose.Form, int, error) { return nil, 0, errors.New("asked") }

func TestRunTraceeEnds(t *testing.T) {
	for what, end := range map[string]func(p *tracee){
		"exits":     func(p *tracee) { p.tell("exit") },
		"is killed": func(p *tracee) { unix.Kill(p.pid, unix.SIGKILL) },
		"never asks for unix sockets": func(p *tracee) {
			p.ask("inet")
			p.ask("ping")
			p.tell("exit")
		},
	} {
		t.Run(what, func(t *testing.T) {
			p := start(t)
			tr := follow(t, p.pid, never)
			end(p)
			if err := tr.ended(); !errors.Is(err, interpose.ErrEnded) {
				t.Error(err)
			}
		})
	}
	p := start(t)
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) { return nil, 2, nil })
	p.ask("unix")
	check(t, unix.Kill(p.pid, unix.SIGKILL))
	if err := tr.ended(); err != nil {
		t.Errorf("killed after the first answer: %v", err)
	}
	p = start(t)
	tr = follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) {
		return nil, 2, unix.Kill(p.pid, unix.SIGKILL)
	})
	p.tell("unix")
	if err := tr.ended(); err != nil {
		t.Errorf("killed while it was stopped: %v", err)
	}
}

// TestNewTraceeKilled: CRIU can end before its first stop.
func TestNewTraceeKilled(t *testing.T) {
	for range 20 {
		p := start(t)
		done := make(chan error)
		go func() {
			tr, err := interpose.New(p.pid)
			if err == nil {
				err = tr.Run(never, func() {})
			}
			done <- err
		}()
		unix.Kill(p.pid, unix.SIGKILL)
		if err := <-done; !errors.Is(err, interpose.ErrEnded) && !errors.Is(err, interpose.ErrTraced) {
			t.Fatal(err)
		}
	}
}

func TestNewTraced(t *testing.T) {
	p := start(t)
	tr := follow(t, p.pid, never)
	_, err := interpose.New(p.pid)
	comm, _ := os.ReadFile("/proc/self/comm")
	want := fmt.Sprintf("process %d (%s)", interpose.TracerOf(p.pid), strings.TrimSpace(string(comm)))
	if !errors.Is(err, interpose.ErrTraced) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want it to name %s", err, want)
	}
	p.tell("exit")
	tr.ended()
	if _, err := interpose.New(1 << 22); !errors.Is(err, interpose.ErrTraced) || !errors.Is(err, unix.ESRCH) {
		t.Errorf("no such process: %v", err)
	}
}

func TestRunSignals(t *testing.T) {
	p := start(t)
	a, _ := pair(t, unix.SOCK_STREAM)
	tr := follow(t, p.pid, func() (map[uint32]interpose.Form, int, error) {
		return map[uint32]interpose.Form{a: interpose.Dormant}, 1, nil
	})
	for range 10 {
		check(t, unix.Tgkill(p.pid, p.pid, unix.SIGUSR1))
		if got := p.ask("signal"); got != unix.SIGUSR1.String() {
			t.Fatal(got)
		}
	}
	// Stopped by somebody: it stays so until somebody lets it go on.
	check(t, unix.Kill(p.pid, unix.SIGSTOP))
	p.asleep()
	p.tell("ping")
	p.asleep()
	p.silent()
	check(t, unix.Kill(p.pid, unix.SIGCONT))
	if got := p.hear(); got != "pong" {
		t.Error(got)
	}
	p.shown("afterwards", p.ask("unix"), as(a, 7, -1, 0))
	check(t, tr.ended())
	p.untraced()
}

// TestNewStopped: CRIU was stopped before it was traced.
func TestNewStopped(t *testing.T) {
	p := start(t)
	check(t, unix.Kill(p.pid, unix.SIGSTOP))
	p.asleep()
	tr := follow(t, p.pid, never)
	p.tell("ping")
	p.asleep()
	p.silent()
	check(t, unix.Kill(p.pid, unix.SIGCONT))
	if got := p.hear(); got != "pong" {
		t.Error(got)
	}
	p.tell("exit")
	if err := tr.ended(); !errors.Is(err, interpose.ErrEnded) {
		t.Error(err)
	}
}

// silent asserts that it has said nothing that was not heard.
func (p *tracee) silent() {
	p.t.Helper()
	conn, err := p.raw.SyscallConn()
	check(p.t, err)
	check(p.t, conn.Control(func(fd uintptr) {
		if n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err != nil || n > 0 || p.out.Buffered() > 0 {
			p.t.Errorf("a stopped process answers: %d bytes, %v", n, err)
		}
	}))
}

// asleep waits until the process is in a stop it does not leave: seen in it
// again and again, while a tracer that let it run on would have been at work.
func (p *tracee) asleep() {
	p.t.Helper()
	end := time.Now().Add(patience)
	for in := 0; in < 200; runtime.Gosched() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
		check(p.t, err)
		_, rest, _ := strings.Cut(string(b), ") ")
		if rest[0] == 'T' || rest[0] == 't' {
			in++
		} else {
			in = 0
		}
		if time.Now().After(end) {
			p.t.Fatalf("the process does not stop, state %c", rest[0])
		}
	}
}
