// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/image"
	"criuhook/sockpeer"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func ptr[T any](v T) *T { return &v }

// filterOf reads a socket's filter (SO_GET_FILTER is SO_ATTACH_FILTER), encoded
// as CRIU does it.
func filterOf(t *testing.T, fd int) (out []uint64) {
	t.Helper()
	prog := make([]unix.SockFilter, 64)
	n := uint32(len(prog)) // of instructions
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		uintptr(unsafe.Pointer(&prog[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		t.Fatal(e)
	}
	for _, f := range prog[:n] {
		out = append(out, uint64(f.Code)<<48|uint64(f.Jt)<<40|uint64(f.Jf)<<32|uint64(f.K))
	}
	return out
}

// dumped is what CRIU 4.2 notes of a socket's options (dump_socket_opts,
// criu/sockets.c).
func dumped(t *testing.T, fd int) *sk_opts.SkOptsEntry {
	t.Helper()
	get := func(opt int) uint32 {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
		ok(t, err)
		return uint32(v)
	}
	timeout := func(opt int) (sec, usec *uint64) {
		tv, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, opt)
		ok(t, err)
		return ptr(uint64(tv.Sec)), ptr(uint64(tv.Usec))
	}
	o := &sk_opts.SkOptsEntry{
		SoSndbuf: ptr(get(unix.SO_SNDBUF)), SoRcvbuf: ptr(get(unix.SO_RCVBUF)),
		SoBufLock: ptr(get(unix.SO_BUF_LOCK)), SoPriority: ptr(get(unix.SO_PRIORITY)), SoRcvlowat: ptr(get(unix.SO_RCVLOWAT)),
		SoPasscred: ptr(get(unix.SO_PASSCRED) != 0), SoPasssec: ptr(get(unix.SO_PASSSEC) != 0),
		SoDontroute: ptr(get(unix.SO_DONTROUTE) != 0), SoNoCheck: ptr(get(unix.SO_NO_CHECK) != 0),
		SoBroadcast: ptr(get(unix.SO_BROADCAST) != 0), SoKeepalive: ptr(get(unix.SO_KEEPALIVE) != 0),
		SoOobinline: ptr(get(unix.SO_OOBINLINE)), Reuseaddr: ptr(get(unix.SO_REUSEADDR) != 0), SoReuseport: ptr(get(unix.SO_REUSEPORT) != 0),
		SoFilter: filterOf(t, fd),
	}
	if mark := get(unix.SO_MARK); mark != 0 {
		o.SoMark = &mark
	}
	o.SoSndTmoSec, o.SoSndTmoUsec = timeout(unix.SO_SNDTIMEO)
	o.SoRcvTmoSec, o.SoRcvTmoUsec = timeout(unix.SO_RCVTIMEO)
	var l unix.Linger
	n := uint32(unsafe.Sizeof(l))
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER,
		uintptr(unsafe.Pointer(&l)), uintptr(unsafe.Pointer(&n)), 0); e != 0 {
		t.Fatal(e)
	}
	if l.Onoff != 0 {
		o.SoLinger = ptr(uint32(l.Linger))
	}
	dev, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
	ok(t, err)
	if dev != "" {
		o.SoBoundDev = &dev
	}
	return o
}

// imageOf is a socket as the images hold it.
func imageOf(t *testing.T, fd int) *image.Socket {
	t.Helper()
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	ok(t, err)
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	ok(t, err)
	sig, err := unix.FcntlInt(uintptr(fd), unix.F_GETSIG, 0)
	ok(t, err)
	return &image.Socket{
		Inode: 77, Type: sockpeer.Type(typ), State: sockpeer.Closed, Flags: uint32(flags), Options: dumped(t, fd),
		Owner: &fown.FownEntry{Uid: ptr(uint32(0)), Euid: ptr(uint32(0)), Signum: ptr(uint32(sig)), PidType: ptr(uint32(0)), Pid: ptr(uint32(0))},
	}
}

func plain(t *testing.T, typ sockpeer.Type) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0)
	ok(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// option sets one of SOL_SOCKET.
func option(opt, v int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, v) }
}

func timeout(opt int, sec, usec int64) func(int) error {
	return func(fd int) error {
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &unix.Timeval{Sec: sec, Usec: usec})
	}
}

func control(cmd, v int) func(int) error {
	return func(fd int) error { _, err := unix.FcntlInt(uintptr(fd), cmd, v); return err }
}

func TestNewSocketOptions(t *testing.T) {
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 3}, {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: 0xfedcba98}, {Code: unix.BPF_RET, K: 0}, {Code: unix.BPF_RET, K: 0xffff}}
	for _, c := range []struct {
		what string
		set  func(fd int) error
	}{
		{"nothing", nil},
		{"SO_SNDBUF", option(unix.SO_SNDBUF, 30000)},
		{"SO_SNDBUF, the smallest", option(unix.SO_SNDBUF, 0)},
		{"SO_SNDBUFFORCE", option(unix.SO_SNDBUFFORCE, 5<<20)},
		{"SO_RCVBUF", option(unix.SO_RCVBUF, 40000)},
		{"SO_RCVBUFFORCE", option(unix.SO_RCVBUFFORCE, 6<<20)},
		{"SO_BUF_LOCK", option(unix.SO_BUF_LOCK, 1)},
		{"SO_PRIORITY", option(unix.SO_PRIORITY, 5)},
		{"SO_PRIORITY, beyond 6", option(unix.SO_PRIORITY, 77)},
		{"SO_RCVLOWAT", option(unix.SO_RCVLOWAT, 9)},
		{"SO_MARK", option(unix.SO_MARK, 0x1234)},
		{"SO_MARK, all bits", option(unix.SO_MARK, -1)},
		{"SO_PASSCRED", option(unix.SO_PASSCRED, 1)},
		{"SO_PASSSEC", option(unix.SO_PASSSEC, 1)},
		{"SO_DONTROUTE", option(unix.SO_DONTROUTE, 1)},
		{"SO_NO_CHECK", option(unix.SO_NO_CHECK, 1)},
		{"SO_BROADCAST", option(unix.SO_BROADCAST, 1)},
		{"SO_KEEPALIVE", option(unix.SO_KEEPALIVE, 1)},
		{"SO_OOBINLINE", option(unix.SO_OOBINLINE, 1)},
		{"SO_REUSEADDR", option(unix.SO_REUSEADDR, 1)},
		{"SO_REUSEPORT", option(unix.SO_REUSEPORT, 1)},
		{"SO_LINGER", func(fd int) error {
			return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 17})
		}},
		{"SO_LINGER of 0", func(fd int) error {
			return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}},
		{"SO_SNDTIMEO", timeout(unix.SO_SNDTIMEO, 3, 500000)},
		{"SO_RCVTIMEO", timeout(unix.SO_RCVTIMEO, 0, 4000)},
		{"SO_BINDTODEVICE", func(fd int) error { return unix.BindToDevice(fd, "lo") }},
		{"SO_ATTACH_FILTER", func(fd int) error {
			return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
		}},
		{"O_NONBLOCK", control(unix.F_SETFL, unix.O_NONBLOCK)},
		{"O_APPEND", control(unix.F_SETFL, unix.O_APPEND)},
		{"O_NOATIME", control(unix.F_SETFL, unix.O_NOATIME)},
		{"F_SETSIG", control(unix.F_SETSIG, int(unix.SIGUSR1))},
	} {
		for _, typ := range []sockpeer.Type{sockpeer.Stream, sockpeer.Dgram, sockpeer.Seqpacket} {
			t.Run(c.what+" "+typ.String(), func(t *testing.T) {
				fd := plain(t, typ)
				before := imageOf(t, fd)
				if c.set != nil {
					switch err := c.set(fd); {
					case errors.Is(err, unix.EPERM) && os.Geteuid() != 0:
						t.Skip("not root")
					case errors.Is(err, unix.EOPNOTSUPP):
						t.Skip("this kernel has no such option on unix sockets")
					default:
						ok(t, err)
					}
				}
				want := imageOf(t, fd)
				if (cmp.Diff(before, want, cmp.Comparer(proto.Equal)) == "") != (c.set == nil) {
					t.Fatal("the test sees no difference by this option")
				}
				s, err := newSocket(want)
				ok(t, err)
				defer s.Close()
				if diff := cmp.Diff(want, imageOf(t, s.FD()), cmp.Comparer(proto.Equal)); diff != "" {
					t.Errorf("(-wanted +made)\n%s", diff)
				}
				if flags, err := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0); err != nil || flags != unix.FD_CLOEXEC {
					t.Errorf("descriptor flags %d, %v", flags, err)
				}
				if connected, err := s.Connected(); connected || err != nil {
					t.Errorf("connected: %v, %v", connected, err)
				}
				if !strings.Contains(s.Name(), "77") {
					t.Errorf("its name is %q", s.Name())
				}
			})
		}
	}
}

func TestInheritable(t *testing.T) {
	fd := plain(t, sockpeer.Stream)
	newer := protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1)
	for _, c := range []struct {
		why    string // "": it is
		change func(s *image.Socket)
	}{
		{"", func(*image.Socket) {}},
		// Half of a connection: its options can be set all the same.
		{"", func(s *image.Socket) { s.State, s.Peer = sockpeer.Established, 78 }},
		{"", func(s *image.Socket) { s.Flags |= unix.O_CLOEXEC }},
		{"listens", func(s *image.Socket) { s.State = sockpeer.Listening }},
		{"shut down", func(s *image.Socket) { s.Shutdown = 1 }},
		{"queue", func(s *image.Socket) { s.Queued = 1 }},
		{"type 3", func(s *image.Socket) { s.Type = unix.SOCK_RAW }},
		{"network namespace", func(s *image.Socket) { s.OwnNetns = true }},
		{"name", func(s *image.Socket) { s.Name = "\x00own" }},
		{"file flags", func(s *image.Socket) { s.Flags |= unix.O_ASYNC }},
		{"file flags", func(s *image.Socket) { s.Flags = unix.O_RDONLY }},
		{"options", func(s *image.Socket) { s.Options = nil }},
		{"options", func(s *image.Socket) { s.Owner = nil }},
		{"F_SETOWN", func(s *image.Socket) { s.Owner.Pid = ptr(uint32(5)) }},
		{"F_SETSIG", func(s *image.Socket) { s.Owner.Signum = ptr(uint32(65)) }},
		{"newer CRIU", func(s *image.Socket) { s.Options.ProtoReflect().SetUnknown(newer) }},
		{"newer CRIU", func(s *image.Socket) { s.Owner.ProtoReflect().SetUnknown(newer) }},
		{"TCP", func(s *image.Socket) { s.Options.TcpKeepidle = ptr(uint32(1)) }},
		{"filter", func(s *image.Socket) { s.Options.SoFilter = make([]uint64, 1<<16) }},
		{"out of range", func(s *image.Socket) { s.Options.SoSndbuf = ptr(uint32(1 << 31)) }},
	} {
		s := imageOf(t, fd)
		c.change(s)
		why := inheritable(s)
		if (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
			t.Errorf("%q, want %q", why, c.why)
		}
		made, err := newSocket(s)
		if (err == nil) != (c.why == "") || err != nil && !strings.Contains(err.Error(), why) {
			t.Errorf("%s: newSocket: %v", c.why, err)
		}
		if made != nil {
			made.Close()
		}
	}
}

func TestNewSocketFails(t *testing.T) {
	s := imageOf(t, plain(t, sockpeer.Stream))
	s.Options.SoBoundDev = ptr("no-such-device")
	before := openFDs(t)
	made, err := newSocket(s)
	if made != nil || !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "no-such-device") || !strings.Contains(err.Error(), "77") {
		t.Errorf("%v", err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("descriptors %s became %s", before, after)
	}
}

func openFDs(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	ok(t, err)
	return fmt.Sprint(entries)
}
