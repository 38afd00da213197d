// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// No event tells that a restore is over, so it is asked for, rarely enough not
// to take the processor from the restore.
const (
	firstPause   = 2 * time.Millisecond
	longestPause = 50 * time.Millisecond
)

// Release takes the inherited fds away from a CRIU that outlives its restore.
//
// CRIU queues every inherited fd in a datagram socket connected to itself
// (fdstore.c). When it stays as the parent of the restored tree, or becomes the
// command of --exec-cmd, the queue stays, and the peer of an inherited socket
// never learns that the application closed it. Release waits until the restore
// is over and empties the queue.
//
// It is to run in another process, which CRIU must not have as its child. criu
// is a process that is about to become CRIU by exec, is CRIU already, or has
// become the command of --exec-cmd. Its command line, when it is CRIU, must
// have the option --inherit-fd spelled out, by which it is told from that
// command. Release returns nil also when the process ends, be it because the
// restore failed or because it was one with --restore-detached.
//
// Until when CRIU needs the queue: its tasks close the socket before they enter
// the restorer, but CRIU itself fetches from it later, to seal memfds
// (apply_memfd_seals) and to tell the lazy-pages daemon that it is done
// (lazy_pages_finish_restore). So Release waits for what comes after all of the
// restore (cr-restore.c, restore_root_task; crtools.c): CRIU waits for any
// child, with no flags and no interest in its status, which it does nowhere
// else; or it has become another program.
func Release(ctx context.Context, criu int) error {
	pidfd, err := unix.PidfdOpen(criu, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d to empty CRIU's fd store in it: %w", criu, err)
	}
	defer unix.Close(pidfd)
	return ReleaseBy(ctx, criu, pidfd)
}

// ReleaseBy is [Release] for who has a pidfd of the process already, so that no
// other one is taken for it that has its pid by now.
func ReleaseBy(ctx context.Context, criu, pidfd int) error {
	s := &fdStore{pid: criu, pidfd: pidfd, fd: -1}
	defer s.close()
	for pause := firstPause; ; pause = min(pause+pause/4, longestPause) {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for CRIU, process %d, to need its fd store no more: %w", criu, context.Cause(ctx))
		}
		if ended, err := s.ended(pause); ended || err != nil {
			return err
		}
		was := s.now
		over, err := s.over()
		if errors.Is(err, unix.ESRCH) {
			continue // it is on its way out, and soon the pidfd says so
		}
		if err != nil {
			if ended, _ := s.ended(0); ended {
				return nil
			}
			return fmt.Errorf("look whether CRIU, process %d, needs its fd store any more: %w", criu, err)
		}
		if over {
			return s.empty()
		}
		if s.now != was {
			pause = firstPause
		}
	}
}

// fdStore is CRIU's socket of fds, and the process that has it.
type fdStore struct {
	pid, pidfd int
	fd         int     // our duplicate of the socket; -1: not found yet
	now        program // what the process runs
	criu       program // what it ran when it was CRIU with the socket
}

// program tells one exec from the next: where code and stack are. All zero: the
// process has no memory any more.
type program struct{ startCode, endCode, startStack uint64 }

// ended waits for the process to end, but not longer than that.
func (s *fdStore) ended(wait time.Duration) (bool, error) {
	p := []unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, int(wait.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return false, fmt.Errorf("wait for the end of process %d: %w", s.pid, err)
	}
	return n > 0, nil
}

// over reports whether the socket is there and nobody needs it any more.
func (s *fdStore) over() (bool, error) {
	var err error
	if s.now, err = s.program(); err != nil || s.now == (program{}) {
		return false, err
	}
	if s.fd < 0 {
		if s.fd, err = s.find(); err != nil || s.fd < 0 {
			return false, err
		}
	}
	if s.criu == (program{}) {
		is, err := s.isCRIU()
		if err != nil {
			return false, err
		}
		// All that was the same program's, if it is still the same.
		if p, err := s.program(); err != nil || p != s.now {
			return false, err
		}
		if !is {
			return true, nil
		}
		s.criu = s.now
	}
	if s.now != s.criu {
		return true, nil
	}
	return s.waitsForChildren()
}

// program reads /proc/PID/stat.
func (s *fdStore) program() (program, error) {
	b, err := os.ReadFile(s.proc("stat"))
	if err != nil {
		return program{}, err
	}
	// Field 2, the name in brackets, may hold anything; field 3 follows it.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const startCode, endCode, startStack = 26 - 3, 27 - 3, 28 - 3
	if len(f) <= startStack {
		return program{}, fmt.Errorf("%s has only %d fields", s.proc("stat"), len(f)+2)
	}
	var n [3]uint64
	for i, k := range [...]int{startCode, endCode, startStack} {
		if n[i], err = strconv.ParseUint(f[k], 10, 64); err != nil {
			return program{}, fmt.Errorf("field %d of %s: %w", k+3, s.proc("stat"), err)
		}
	}
	p := program{n[0], n[1], n[2]}
	if p == (program{1, 1, 0}) {
		// The kernel's way to hide it (fs/proc/array.c, do_task_stat).
		return program{}, fmt.Errorf("%s: %w: run as the same user, or with CAP_SYS_PTRACE", s.proc("stat"), unix.EPERM)
	}
	return p, nil
}

// find returns a duplicate of the socket, or -1 if the process has none.
func (s *fdStore) find() (int, error) {
	dir := s.proc("fd")
	d, err := os.Open(dir)
	if err != nil {
		return -1, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return -1, err
	}
	for _, name := range names {
		n, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		target, err := os.Readlink(dir + "/" + name)
		if err != nil || !strings.HasPrefix(target, "socket:[") {
			continue // closed meanwhile, or no socket
		}
		fd, err := unix.PidfdGetfd(s.pidfd, n, 0)
		if errors.Is(err, unix.EBADF) {
			continue
		}
		if err != nil {
			return -1, fmt.Errorf("duplicate fd %d of process %d: %w", n, s.pid, err)
		}
		if isFDStore(fd) {
			return fd, nil
		}
		unix.Close(fd)
	}
	return -1, nil
}

// isFDStore knows the socket by its abstract name, which has the socket's own
// inode in it: /criu-fdstore-INODE, and since CRIU 3.16 -RUN after it.
func isFDStore(fd int) bool {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	un, ok := sa.(*unix.SockaddrUnix)
	if !ok {
		return false
	}
	name, ok := strings.CutPrefix(un.Name, "@/criu-fdstore-")
	if !ok {
		return false
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	inode, _, _ := strings.Cut(name, "-")
	return inode == strconv.FormatUint(st.Ino, 16)
}

// isCRIU tells CRIU from the command of --exec-cmd, which has the socket too.
func (s *fdStore) isCRIU() (bool, error) {
	b, err := os.ReadFile(s.proc("cmdline"))
	return len(b) == 0 || bytes.Contains(b, []byte("\x00--inherit-fd")), err
}

// waitsForChildren: the process is in wait(NULL), see wait4(2) and proc(5).
func (s *fdStore) waitsForChildren() (bool, error) {
	b, err := os.ReadFile(s.proc("syscall"))
	if err != nil {
		return false, err
	}
	f := strings.Fields(string(b)) // "running", or number, six arguments, SP, PC
	if len(f) < 5 || f[0] != strconv.Itoa(unix.SYS_WAIT4) {
		return false, nil
	}
	var arg [4]uint64
	for i := range arg {
		if arg[i], err = strconv.ParseUint(f[1+i], 0, 64); err != nil {
			return false, fmt.Errorf("%s: %w", s.proc("syscall"), err)
		}
	}
	pid, status, options, usage := int32(arg[0]), arg[1], int32(arg[2]), arg[3]
	return pid == -1 && status == 0 && options == 0 && usage == 0, nil
}

// empty receives all there is. As no room is given for the fds that come with
// it, the kernel closes them (net/core/scm.c, scm_destroy).
func (s *fdStore) empty() error {
	var b [16]byte
	for {
		_, _, err := unix.Recvfrom(s.fd, b[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("empty CRIU's fd store in process %d: %w", s.pid, err)
		}
	}
}

func (s *fdStore) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
}

func (s *fdStore) proc(file string) string { return "/proc/" + strconv.Itoa(s.pid) + "/" + file }
