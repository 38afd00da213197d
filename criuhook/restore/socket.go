// SPDX-License-Identifier: Apache-2.0

package restore

import (
	"errors"
	"fmt"
	"math"

	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/sockpeer"
)

// settable are the file status flags that fcntl(F_SETFL) can set on a socket,
// and that mean the same whoever sets them. O_ASYNC is not one: with it the
// kernel notes the number of the descriptor, for the signal.
const settable = unix.O_NONBLOCK | unix.O_APPEND | unix.O_NOATIME

// inheritable says why CRIU cannot be given a socket made by newSocket in place
// of s, or returns "" if it can: everything of s but a connection can be set
// before a process of the tree exists.
func inheritable(s *image.Socket) (why string) {
	switch {
	case s.State == sockpeer.Listening:
		return "it listens"
	case s.Shutdown != 0:
		return "it is shut down"
	case s.Queued > 0:
		return "bytes wait in its queue"
	case s.Type != sockpeer.Stream && s.Type != sockpeer.Dgram && s.Type != sockpeer.Seqpacket:
		return "it is of " + s.Type.String()
	case s.OwnNetns:
		return "its network namespace is made by the restore"
	case s.Name != "":
		return "it is bound to a name"
	case s.Flags&unix.O_ACCMODE != unix.O_RDWR || s.Flags&^(unix.O_ACCMODE|unix.O_CLOEXEC|settable) != 0:
		return fmt.Sprintf("of its file flags %#o not all can be set", s.Flags)
	case s.Options == nil || s.Owner == nil:
		return "the images do not tell its options"
	case s.Owner.GetPid() != 0:
		return "it sends signals to a process (F_SETOWN)"
	case s.Owner.GetSignum() > uint32(unix.SizeofLong*8):
		return fmt.Sprintf("it sends signal %d (F_SETSIG)", s.Owner.GetSignum())
	case len(s.Options.ProtoReflect().GetUnknown()) > 0 || len(s.Owner.ProtoReflect().GetUnknown()) > 0:
		return "it has options that only a newer CRIU knows"
	}
	return unusualOption(s.Options)
}

// unusualOption finds an option that a unix socket cannot have, or a value that
// it cannot have.
func unusualOption(o *sk_opts.SkOptsEntry) (why string) {
	switch {
	case o.TcpKeepcnt != nil || o.TcpKeepidle != nil || o.TcpKeepintvl != nil:
		return "it has options of TCP"
	case len(o.GetSoFilter()) > math.MaxUint16:
		return "its filter is too long"
	case max(o.GetSoSndbuf(), o.GetSoRcvbuf(), o.GetSoLinger(), o.GetSoRcvlowat()) > math.MaxInt32:
		return "an option of it is out of range"
	}
	return ""
}

// newSocket makes an unconnected socket with the type, the file flags and the
// options of s, close-on-exec. s must be inheritable.
func newSocket(s *image.Socket) (*sockpeer.Socket, error) {
	if why := inheritable(s); why != "" {
		return nil, fmt.Errorf("make socket %d anew: %s", s.Inode, why)
	}
	fd, err := unix.Socket(unix.AF_UNIX, int(s.Type)|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket %d anew: %w", s.Inode, err)
	}
	if err := setAll(fd, s); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make socket %d anew: %w", s.Inode, err)
	}
	return sockpeer.NewSocket(fd, fmt.Sprintf("socket %d, made anew", s.Inode)), nil
}

func setAll(fd int, s *image.Socket) error {
	if err := setOptions(fd, s.Options); err != nil {
		return err
	}
	if sig := int(s.Owner.GetSignum()); sig != 0 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETSIG, sig); err != nil {
			return fmt.Errorf("set its signal to %d: %w", sig, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, int(s.Flags&settable)); err != nil {
		return fmt.Errorf("set its file flags %#o: %w", s.Flags, err)
	}
	return nil
}

// setOptions sets what CRIU sets (restore_socket_opts, criu/sockets.c).
func setOptions(fd int, o *sk_opts.SkOptsEntry) error {
	var errs []error
	set := func(name string, opt, v int) {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, v); err != nil {
			errs = append(errs, fmt.Errorf("set %s to %d: %w", name, v, err))
		}
	}
	on := func(name string, opt int, v bool) {
		if v {
			set(name, opt, 1)
		}
	}
	errs = append(errs,
		setBuffer(fd, "SO_SNDBUF", unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, int(o.GetSoSndbuf())),
		setBuffer(fd, "SO_RCVBUF", unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, int(o.GetSoRcvbuf())))
	if o.SoBufLock != nil { // after the sizes, which lock
		set("SO_BUF_LOCK", unix.SO_BUF_LOCK, int(o.GetSoBufLock()))
	}
	if o.SoPriority != nil {
		set("SO_PRIORITY", unix.SO_PRIORITY, int(int32(o.GetSoPriority())))
	}
	if o.SoRcvlowat != nil {
		set("SO_RCVLOWAT", unix.SO_RCVLOWAT, int(o.GetSoRcvlowat()))
	}
	if o.GetSoMark() != 0 { // 0 without the capability for it
		set("SO_MARK", unix.SO_MARK, int(int32(o.GetSoMark())))
	}
	on("SO_PASSCRED", unix.SO_PASSCRED, o.GetSoPasscred())
	on("SO_PASSSEC", unix.SO_PASSSEC, o.GetSoPasssec())
	on("SO_DONTROUTE", unix.SO_DONTROUTE, o.GetSoDontroute())
	on("SO_NO_CHECK", unix.SO_NO_CHECK, o.GetSoNoCheck())
	on("SO_BROADCAST", unix.SO_BROADCAST, o.GetSoBroadcast())
	on("SO_OOBINLINE", unix.SO_OOBINLINE, o.GetSoOobinline() != 0)
	on("SO_KEEPALIVE", unix.SO_KEEPALIVE, o.GetSoKeepalive())
	// CRIU leaves these two to inet sockets. SO_REUSEPORT is one of those
	// only, since Linux 6.13.
	on("SO_REUSEADDR", unix.SO_REUSEADDR, o.GetReuseaddr())
	if o.GetSoReuseport() {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		if err != nil && err != unix.EOPNOTSUPP {
			errs = append(errs, fmt.Errorf("set SO_REUSEPORT: %w", err))
		}
	}
	if o.SoLinger != nil {
		l := unix.Linger{Onoff: 1, Linger: int32(o.GetSoLinger())}
		errs = append(errs, named("SO_LINGER", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &l)))
	}
	errs = append(errs,
		setTimeout(fd, "SO_SNDTIMEO", unix.SO_SNDTIMEO, o.GetSoSndTmoSec(), o.GetSoSndTmoUsec()),
		setTimeout(fd, "SO_RCVTIMEO", unix.SO_RCVTIMEO, o.GetSoRcvTmoSec(), o.GetSoRcvTmoUsec()),
		setDevice(fd, o.GetSoBoundDev()),
		setFilter(fd, o.GetSoFilter()))
	return errors.Join(errs...)
}

// named says which option an error is of.
func named(option string, err error) error {
	if err != nil {
		return fmt.Errorf("set %s: %w", option, err)
	}
	return nil
}

// setBuffer sets the size of a buffer. The kernel doubles what it is told, and
// tells the double (socket(7)).
func setBuffer(fd int, name string, force, opt, size int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size/2)
	if err != unix.EPERM {
		return named(name, err)
	}
	// Without CAP_NET_ADMIN up to net.core's limit, without an error beyond it.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, size/2); err != nil {
		return named(name, err)
	}
	got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
	if err == nil && got < size/2*2 {
		err = fmt.Errorf("%d is beyond the limit, it became %d: %w", size, got, unix.EPERM)
	}
	return named(name, err)
}

func setTimeout(fd int, name string, opt int, sec, usec uint64) error {
	tv := unix.Timeval{Sec: int64(sec), Usec: int64(usec)}
	return named(name, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &tv))
}

func setDevice(fd int, device string) error {
	if device == "" {
		return nil
	}
	return named("SO_BINDTODEVICE to "+device, unix.BindToDevice(fd, device))
}

// setFilter attaches a classic BPF filter. The images hold an instruction in 64
// bits: code, jt, jf, k from the top (decode_filter, criu/sockets.c).
func setFilter(fd int, filter []uint64) error {
	if len(filter) == 0 {
		return nil
	}
	prog := make([]unix.SockFilter, len(filter))
	for i, f := range filter {
		prog[i] = unix.SockFilter{Code: uint16(f >> 48), Jt: uint8(f >> 40), Jf: uint8(f >> 32), K: uint32(f)}
	}
	return named("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}))
}
