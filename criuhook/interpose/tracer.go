// SPDX-License-Identifier: Apache-2.0

package interpose

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// Decide is called when CRIU asks sock_diag for unix sockets. It returns the
// forms of the connections and how many network namespaces CRIU will ask; 0:
// the tree is not frozen yet, ask again at the next request. An error leaves
// every answer as it is, so that CRIU fails by itself on what it cannot dump.
type Decide func() (forms map[uint32]Form, netns int, err error)

// Tracer follows one CRIU process. Its methods must be called from one
// goroutine, which New locks to its thread: ptrace(2) knows threads only.
type Tracer struct {
	// BeforeSeize, if not nil, is called with each thread that CRIU is about
	// to seize, and then stops.
	BeforeSeize func(tid int)

	pid int
	// call is the system call CRIU is in, set at its entry.
	call syscallEntry
	done int // dumps of unix sockets of the frozen tree read to their end
	// inUnixDump: CRIU has asked for unix sockets and not read the last yet.
	inUnixDump bool
	// asked: it has just done so.
	asked bool
}

// New begins to trace CRIU: when it returns, CRIU runs on and every system
// call of its stops it. [ErrTraced] if that is not possible.
func New(criu int) (*Tracer, error) {
	runtime.LockOSThread()
	if err := ptrace(unix.PTRACE_SEIZE, criu, 0, unix.PTRACE_O_TRACESYSGOOD); err != nil {
		runtime.UnlockOSThread()
		return nil, cannotTrace(criu, err)
	}
	t := &Tracer{pid: criu}
	if err := ptrace(unix.PTRACE_INTERRUPT, criu, 0, 0); err != nil {
		return nil, fmt.Errorf("stop CRIU, process %d: %w", criu, err)
	}
	// The first stop is the one just asked for, or a signal that came before.
	stop, err := t.wait()
	if err != nil {
		return nil, err
	}
	if stop.exited {
		return nil, ErrEnded
	}
	if err := t.resume(stop); err != nil {
		return nil, err
	}
	return t, nil
}

// cannotTrace explains why. TracerPid tells who traces CRIU already.
func cannotTrace(criu int, err error) error {
	switch by := TracerOf(criu); {
	case by != 0:
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", by))
		return fmt.Errorf("%w: process %d (%s) traces it already (CRIU is process %d): %w",
			ErrTraced, by, strings.TrimSpace(string(comm)), criu, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_SYS_PTRACE is missing or the kernel forbids it (kernel.yama.ptrace_scope; CRIU is process %d): %w",
			ErrTraced, criu, err)
	}
	return fmt.Errorf("%w: CRIU is process %d: %w", ErrTraced, criu, err)
}

// TracerOf returns the process that traces another one, 0 for nobody.
func TracerOf(pid int) int {
	thread := statusNumber(pid, "TracerPid")
	if thread == 0 {
		return 0
	}
	// TracerPid is the thread that called ptrace(2), for which proc(5) has
	// a directory too.
	if by := statusNumber(thread, "Tgid"); by != 0 {
		return by
	}
	return thread // it is just ending
}

// statusNumber reads a number from /proc/PID/status (proc(5)); 0: not there.
func statusNumber(pid int, key string) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, ok := strings.Cut(string(b), "\n"+key+":")
	if !ok {
		return 0
	}
	line, _, _ := strings.Cut(rest, "\n")
	n, _ := strconv.Atoi(strings.TrimSpace(line))
	return n
}

// Run follows CRIU until it has read what it wants from sock_diag, or ends,
// and leaves it untraced. alive is called at every stop, for a watchdog: Run
// itself has no deadline, because a process that waits for a stop cannot be
// woken without one; the end of our process frees CRIU too.
func (t *Tracer) Run(decide Decide, alive func()) error {
	var forms map[uint32]Form
	wanted := 0 // network namespaces; 0: not decided yet
	for {
		stop, err := t.wait()
		if err != nil {
			return err
		}
		alive()
		if stop.exited {
			if wanted == 0 {
				return ErrEnded
			}
			return nil
		}
		if stop.syscall {
			buf, err := t.step()
			if err != nil {
				t.detach()
				return err
			}
			if t.asked && wanted == 0 {
				if forms, wanted, err = decide(); err != nil {
					t.detach()
					return err
				}
				// What it read of a running tree counts for nothing.
				t.asked, t.done = false, 0
			}
			if err := t.answer(buf, forms); err != nil {
				t.detach()
				return err
			}
			if wanted > 0 && (t.done >= wanted || t.createsFile()) {
				return t.detach()
			}
		}
		if err := t.resume(stop); err != nil {
			return err
		}
	}
}

// stop is why CRIU stands still.
type stop struct {
	syscall bool
	exited  bool
	listen  bool // a group-stop, to be kept
	signal  int  // to be delivered
}

func (t *Tracer) wait() (stop, error) {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(t.pid, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return stop{}, fmt.Errorf("wait for CRIU, process %d: %w", t.pid, err)
		}
		break
	}
	switch {
	case ws.Exited(), ws.Signaled():
		return stop{exited: true}, nil
	case ws.StopSignal() == unix.SIGTRAP|0x80:
		return stop{syscall: true}, nil
	case int(ws)>>16 == unix.PTRACE_EVENT_STOP:
		switch ws.StopSignal() {
		case unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
			return stop{listen: true}, nil
		}
		return stop{}, nil // our own PTRACE_INTERRUPT
	}
	return stop{signal: int(ws.StopSignal())}, nil
}

func (t *Tracer) resume(s stop) error {
	req := unix.PTRACE_SYSCALL
	if s.listen {
		req = unix.PTRACE_LISTEN
	}
	if err := ptrace(req, t.pid, 0, uintptr(s.signal)); err != nil && err != unix.ESRCH {
		return fmt.Errorf("let CRIU, process %d, run on: %w", t.pid, err)
	}
	return nil // ESRCH: killed; the next wait says so
}

func (t *Tracer) detach() error {
	if err := ptrace(unix.PTRACE_DETACH, t.pid, 0, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("detach from CRIU, process %d: %w", t.pid, err)
	}
	return nil
}

type syscallEntry struct {
	nr   uint64
	args [6]uint64
}

// step looks at the system call CRIU stopped in. It notes that CRIU has asked
// sock_diag for unix sockets; if CRIU has just read from sock_diag, it returns
// what, and where it stands in CRIU's memory.
func (t *Tracer) step() (remote, error) {
	info, err := syscallInfo(t.pid)
	if err != nil {
		if err == unix.ESRCH {
			return remote{}, nil // killed
		}
		return remote{}, fmt.Errorf("read the system call of CRIU, process %d: %w", t.pid, err)
	}
	switch info.op {
	case opEntry:
		t.call = syscallEntry{nr: info.nr, args: info.args}
		if t.BeforeSeize != nil && info.nr == unix.SYS_PTRACE && info.args[0] == unix.PTRACE_SEIZE {
			t.BeforeSeize(int(info.args[1]))
		}
		return remote{}, nil
	case opExit:
	default:
		return remote{}, nil
	}
	sent, received := t.call.nr == unix.SYS_SENDMSG, t.call.nr == unix.SYS_RECVMSG
	if !sent && !received || info.rval < nlHeaderLen || !t.isSockDiag(int(t.call.args[0])) {
		return remote{}, nil
	}
	buf, err := t.readMsg(t.call.args[1], int(info.rval))
	if err != nil {
		return remote{}, err
	}
	if sent {
		t.inUnixDump = asksForUnix(buf.data)
		t.asked = t.inUnixDump
		return remote{}, nil
	}
	return buf, nil
}

// answer edits what CRIU has read while it reads unix sockets.
func (t *Tracer) answer(r remote, forms map[uint32]Form) error {
	if !t.inUnixDump || r.data == nil {
		return nil
	}
	done, err := endsDump(r.data)
	if err != nil {
		return fmt.Errorf("read what CRIU got from sock_diag: %w", err)
	}
	if done {
		t.inUnixDump = false
		t.done++
	}
	return t.rewrite(r, forms)
}

// createsFile reports whether CRIU has entered a call that makes a file: its
// images come after the sockets.
func (t *Tracer) createsFile() bool {
	return t.call.nr == unix.SYS_OPENAT && t.call.args[2]&unix.O_CREAT != 0
}

func (t *Tracer) isSockDiag(fd int) bool {
	s, err := sockpeer.Duplicate(t.pid, fd)
	if err != nil {
		return false
	}
	defer s.Close()
	domain, err := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_NETLINK {
		return false
	}
	proto, err := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && proto == unix.NETLINK_SOCK_DIAG
}

// remote is a piece of CRIU's memory.
type remote struct {
	addr uint64
	data []byte
}

// readMsg reads n bytes that were sent or received through a struct msghdr.
// CRIU uses one buffer.
func (t *Tracer) readMsg(msghdr uint64, n int) (remote, error) {
	hdr := make([]byte, unsafe.Sizeof(unix.Msghdr{}))
	if err := t.read(msghdr, hdr); err != nil {
		return remote{}, err
	}
	iov := binary.NativeEndian.Uint64(hdr[unsafe.Offsetof(unix.Msghdr{}.Iov):])
	if count := binary.NativeEndian.Uint64(hdr[unsafe.Offsetof(unix.Msghdr{}.Iovlen):]); count != 1 {
		return remote{}, fmt.Errorf("CRIU, process %d, talks to sock_diag with %d buffers, expected 1", t.pid, count)
	}
	vec := make([]byte, unsafe.Sizeof(unix.Iovec{}))
	if err := t.read(iov, vec); err != nil {
		return remote{}, err
	}
	r := remote{addr: binary.NativeEndian.Uint64(vec), data: make([]byte, n)}
	if size := binary.NativeEndian.Uint64(vec[8:]); uint64(n) > size {
		return remote{}, fmt.Errorf("CRIU, process %d, moved %d bytes through a buffer of %d", t.pid, n, size)
	}
	return r, t.read(r.addr, r.data)
}

func (t *Tracer) read(addr uint64, b []byte) error {
	n, err := unix.ProcessVMReadv(t.pid, []unix.Iovec{iovec(b)}, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	if err != nil {
		return fmt.Errorf("read %d bytes of the memory of CRIU, process %d: %w", len(b), t.pid, err)
	}
	return nil
}

// rewrite edits an answer where CRIU is about to read it.
func (t *Tracer) rewrite(r remote, forms map[uint32]Form) error {
	changed, err := edit(r.data, forms)
	if err != nil {
		return fmt.Errorf("edit what CRIU got from sock_diag: %w", err)
	}
	if !changed {
		return nil
	}
	n, err := unix.ProcessVMWritev(t.pid, []unix.Iovec{iovec(r.data)}, []unix.RemoteIovec{{Base: uintptr(r.addr), Len: len(r.data)}}, 0)
	if err == nil && n != len(r.data) {
		err = unix.EFAULT
	}
	if err != nil {
		return fmt.Errorf("write %d bytes to the memory of CRIU, process %d: %w", len(r.data), t.pid, err)
	}
	return nil
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	return v
}
