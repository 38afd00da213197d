// SPDX-License-Identifier: Apache-2.0

package interpose_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// actVariable makes the test binary a process that talks to sock_diag as CRIU
// does.
const actVariable = "INTERPOSE_TEST_ACT"

func init() {
	if os.Getenv(actVariable) != "" {
		runtime.LockOSThread() // the first thread is the one traced
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(actVariable) != "" {
		act()
		return
	}
	os.Exit(m.Run())
}

// act answers each line of stdin with one of its own.
func act() {
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, unix.SIGUSR1)
	nl, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		cmd, arg, _ := strings.Cut(in.Text(), " ")
		switch cmd {
		case "ping":
			fmt.Println("pong")
		case "signal":
			fmt.Println(<-usr1)
		case "unix":
			fmt.Println(sockets(dump(nl, unix.AF_UNIX)))
		case "inet":
			dump(nl, unix.AF_INET)
			fmt.Println("read")
		case "create":
			fd, err := unix.Open(arg, unix.O_CREAT|unix.O_RDWR, 0o600)
			unix.Close(fd)
			fmt.Println(err)
		case "exit":
			os.Exit(0)
		}
	}
}

// dump asks as CRIU's libnetlink.c does: sendmsg, and recvmsg through one buffer.
func dump(nl int, family byte) (out []byte) {
	ne := binary.NativeEndian
	req := make([]byte, 16+56)
	if family == unix.AF_UNIX {
		req = req[:16+24]
	}
	ne.PutUint32(req, uint32(len(req)))
	ne.PutUint16(req[4:], 20) // SOCK_DIAG_BY_FAMILY
	ne.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	ne.PutUint32(req[8:], 24680)
	req[16] = family
	if family == unix.AF_UNIX {
		ne.PutUint32(req[20:], ^uint32(0))
		ne.PutUint32(req[28:], 0x3f) // UDIAG_SHOW_…
	} else {
		req[17] = unix.IPPROTO_TCP
		ne.PutUint32(req[20:], ^uint32(0))
	}
	msg(unix.SYS_SENDMSG, nl, req)
	buf := make([]byte, 16384)
	for {
		n := msg(unix.SYS_RECVMSG, nl, buf)
		for b := buf[:n]; len(b) >= 16; {
			size, typ := ne.Uint32(b), ne.Uint16(b[4:])
			if typ == unix.NLMSG_DONE || typ == unix.NLMSG_ERROR {
				return out
			}
			out = append(out, b[:size]...)
			b = b[size:]
		}
	}
}

func msg(call uintptr, fd int, b []byte) int {
	iov := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	hdr := unix.Msghdr{Iov: &iov, Iovlen: 1}
	for {
		n, _, e := unix.Syscall(call, uintptr(fd), uintptr(unsafe.Pointer(&hdr)), 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			panic(e)
		}
		return int(n)
	}
}

// sockets writes inode:state:peer:shutdown of each; -1: no such attribute.
func sockets(b []byte) string {
	ne := binary.NativeEndian
	var out strings.Builder
	for len(b) > 0 {
		size := ne.Uint32(b)
		m := b[16:size]
		b = b[size:]
		peer, shut := -1, -1
		for a := m[16:]; len(a) >= 4; a = a[min((int(ne.Uint16(a))+3)&^3, len(a)):] {
			switch ne.Uint16(a[2:]) {
			case 2:
				peer = int(ne.Uint32(a[4:]))
			case 6:
				shut = int(a[4])
			}
		}
		fmt.Fprintf(&out, " %d:%d:%d:%d", ne.Uint32(m[4:]), m[2], peer, shut)
	}
	return out.String() + " "
}
