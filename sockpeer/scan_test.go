// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

var types = []sockpeer.Type{sockpeer.Stream, sockpeer.Seqpacket, sockpeer.Dgram}

func TestScanOutbound(t *testing.T) {
	needRoot(t)
	names := map[string]func(dir string) sockpeer.Name{
		"path":           func(dir string) sockpeer.Name { return sockpeer.Name(dir + "/s") },
		"odd bytes":      func(dir string) sockpeer.Name { return sockpeer.Name(dir + "/a\n\"b\\\x80\xff\t  ") },
		"at sign":        func(dir string) sockpeer.Name { return sockpeer.Name(dir + "/@") },
		"abstract":       func(string) sockpeer.Name { return "\x00sockpeer-test" },
		"abstract odd":   func(string) sockpeer.Name { return "\x00so\x00ck\x00peer\xff\n \x00" },
		"abstract slash": func(string) sockpeer.Name { return "\x00/run/x" },
	}
	for _, typ := range types {
		for what, name := range names {
			t.Run(typ.String()+" "+what, func(t *testing.T) {
				noLeak(t)
				name := name(t.TempDir())
				l := listener(t, typ, name)
				peer := l
				fd := connected(t, typ, name)
				if typ != sockpeer.Dgram {
					peer = accept(t, l)
				}
				ino := inode(t, fd)
				p := given(t, "hold", fd)
				c := only(t, p.pid)
				exe, err := os.Executable()
				check(t, err)
				want := sockpeer.Peer{Inode: inode(t, peer), Name: name, PID: os.Getpid(), Exe: exe, VFS: c.Peer.VFS}
				if c.Peer != want {
					t.Errorf("peer %+v, want %+v", c.Peer, want)
				}
				if hasFile := c.Peer.VFS != (sockpeer.VFS{}); hasFile == name.Abstract() {
					t.Errorf("VFS %+v of %s", c.Peer.VFS, name)
				}
				if c.Inode != ino || c.Type != typ || c.Direction != sockpeer.Outbound || c.Name != "" || c.Busy() != "" ||
					c.State != sockpeer.Established || c.Unaccepted || c.Shutdown != 0 || c.Flags != unix.O_RDWR {
					t.Errorf("%+v", c)
				}
				if want := (sockpeer.Holder{PID: p.pid, TID: p.pid, FD: 3}); len(c.Holders) != 1 || c.Holders[0] != want {
					t.Errorf("holders %+v", c.Holders)
				}
			})
		}
	}
}

func TestScanDirection(t *testing.T) {
	needRoot(t)
	noLeak(t)
	dir := t.TempDir()
	server, client := sockpeer.Name(dir+"/server"), sockpeer.Name(dir+"/client")
	setups := map[string]struct {
		// make returns our half and the outer one.
		make func(t *testing.T) (ours, theirs int)
		want sockpeer.Direction
		name sockpeer.Name
	}{
		"inbound": {func(t *testing.T) (int, int) {
			l := listener(t, sockpeer.Stream, server)
			theirs := connected(t, sockpeer.Stream, server)
			ours, _, err := unix.Accept(l)
			check(t, err)
			return ours, theirs
		}, sockpeer.Inbound, server},
		"inbound, both named": {func(t *testing.T) (int, int) {
			l := listener(t, sockpeer.Seqpacket, server)
			theirs := newSocket(t, sockpeer.Seqpacket)
			check(t, unix.Bind(theirs, address(client)))
			check(t, unix.Connect(theirs, address(server)))
			ours, _, err := unix.Accept(l)
			check(t, err)
			return ours, theirs
		}, sockpeer.Inbound, server},
		"outbound, both named": {func(t *testing.T) (int, int) {
			l := listener(t, sockpeer.Stream, server)
			ours := newSocket(t, sockpeer.Stream)
			check(t, unix.Bind(ours, address(client)))
			check(t, unix.Connect(ours, address(server)))
			return ours, accept(t, l)
		}, sockpeer.Outbound, client},
		"socketpair": {func(t *testing.T) (int, int) {
			return pair(t, sockpeer.Stream)
		}, sockpeer.Outbound, ""},
	}
	for what, s := range setups {
		t.Run(what, func(t *testing.T) {
			os.Remove(string(server))
			os.Remove(string(client))
			ours, theirs := s.make(t)
			closing(t, theirs)
			peer := inode(t, theirs)
			c := only(t, given(t, "hold", ours).pid)
			if c.Direction != s.want || c.Name != s.name || c.Peer.Inode != peer || c.Peer.PID != os.Getpid() {
				t.Errorf("%+v", c)
			}
		})
	}
}

func TestScanUnaccepted(t *testing.T) {
	needRoot(t)
	for _, typ := range types[:2] {
		t.Run(typ.String(), func(t *testing.T) {
			noLeak(t)
			name := sockpeer.Name(t.TempDir() + "/s")
			listener(t, typ, name)
			c := only(t, given(t, "hold", connected(t, typ, name)).pid)
			if !c.Unaccepted || c.Busy() == "" || c.Peer.Inode != 0 || c.Peer.Name != name || c.Peer.PID != os.Getpid() || c.Peer.UID != 0 {
				t.Errorf("%+v", c)
			}
		})
	}
}

func TestScanLeavesOut(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name(t.TempDir() + "/s")
	setups := map[string]func(t *testing.T) []int{
		"both halves": func(t *testing.T) []int {
			a, b := pair(t, sockpeer.Stream)
			return []int{a, b}
		},
		"a listener and who waits in it": func(t *testing.T) []int {
			return []int{dup(listener(t, sockpeer.Stream, name)), connected(t, sockpeer.Stream, name)}
		},
		"the peer has gone": func(t *testing.T) []int {
			a, b := pair(t, sockpeer.Stream)
			unix.Close(b)
			return []int{a}
		},
		"not connected": func(t *testing.T) []int {
			return []int{newSocket(t, sockpeer.Stream), newSocket(t, sockpeer.Dgram)}
		},
		"no unix socket": func(t *testing.T) []int {
			a, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
			check(t, err)
			b, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			check(t, err)
			return []int{a, b}
		},
	}
	for what, fds := range setups {
		t.Run(what, func(t *testing.T) {
			os.Remove(string(name))
			given := fds(t)
			p := start(t, "hold", given...)
			for _, fd := range given {
				unix.Close(fd)
			}
			if s := scan(t, p.pid); len(s.Connections) != 0 {
				t.Errorf("%+v", s.Connections)
			}
		})
	}
}

func TestScanSeveralHolders(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	p := given(t, "parent", a)
	c := only(t, p.pid)
	// fd 3 of the parent, 4 of its child.
	if len(c.Holders) != 2 || c.Holders[0].FD != 3 || c.Holders[0].PID != p.pid || c.Holders[1].FD != 4 || c.Holders[1].PID == p.pid {
		t.Errorf("%+v", c.Holders)
	}
	s := scan(t, c.Holders[1].PID)
	if len(s.Connections) != 1 || len(s.Processes) != 1 {
		t.Errorf("the child alone: %+v", s)
	}
	all, err := sockpeer.ScanAll()
	check(t, err)
	if got := find(all, c.Inode); got == nil || len(got.Holders) != 2 {
		t.Errorf("ScanAll: %+v", got)
	}

	a, b = pair(t, sockpeer.Dgram)
	closing(t, b)
	if c := only(t, given(t, "dup", a).pid); len(c.Holders) != 2 || c.Holders[0].FD != 3 || c.Holders[1].FD != 100 {
		t.Errorf("two fds: %+v", c.Holders)
	}
}

func TestScanFlags(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	check(t, unix.SetNonblock(a, true))
	c := only(t, given(t, "flags", a).pid)
	if !c.Holders[0].Cloexec || c.Flags != unix.O_RDWR|unix.O_NONBLOCK {
		t.Errorf("flags %o, %+v", c.Flags, c.Holders)
	}
}

func TestScanThreadTable(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	_, err := unix.Write(b, []byte("12345"))
	check(t, err)
	p := given(t, "thread", a)
	tid := must(strconv.Atoi(p.line()))(t)
	c := only(t, p.pid)
	if len(c.Holders) != 1 || c.Holders[0] != (sockpeer.Holder{PID: p.pid, TID: tid, FD: 3}) {
		t.Errorf("%+v, thread %d", c.Holders, tid)
	}
	if c.Peer.PID != os.Getpid() || c.RecvQueue != 5 {
		t.Errorf("%+v", c)
	}
}

func TestScanLeaderGone(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	p := given(t, "leader", a)
	eventually(t, "the first thread is a zombie", func() bool { return procState(p.pid) == "Z" })
	if c := only(t, p.pid); len(c.Holders) != 1 {
		t.Errorf("a socket of one table: %+v", c.Holders)
	}
}

func TestScanNetns(t *testing.T) {
	needRoot(t)
	noLeak(t)
	a, b := pair(t, sockpeer.Stream)
	closing(t, b)
	p := given(t, "netns", a)
	link := p.line()
	ours := must(os.Readlink("/proc/self/ns/net"))(t)
	s := scan(t, p.pid)
	var got []string
	for _, n := range s.Netns {
		got = append(got, fmt.Sprintf("net:[%d]", n))
	}
	if len(got) != 2 || !strings.Contains(strings.Join(got, " "), link) || !strings.Contains(strings.Join(got, " "), ours) {
		t.Errorf("namespaces %v, want %s and %s", got, ours, link)
	}
	if c := s.Connections; len(c) != 1 || fmt.Sprintf("net:[%d]", c[0].Netns) != ours {
		t.Errorf("%+v", c)
	}
}

// lostThread runs fn on a thread that then ends. The process' first cannot.
func lostThread(fn func()) {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			lostThread(fn)
			runtime.UnlockOSThread()
		} else {
			fn()
		}
		close(done)
	}()
	<-done
}

// TestScanLostNetns: a socket of a namespace that no task is in any more.
func TestScanLostNetns(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name(filepath.Join(t.TempDir(), "s"))
	l := listener(t, sockpeer.Stream, name)
	fd := -1
	lostThread(func() {
		if unix.Unshare(unix.CLONE_NEWNET) == nil {
			fd, _ = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		}
	})
	check(t, unix.Connect(fd, address(name)))
	peer := accept(t, l)
	p := given(t, "hold", fd)
	s := scan(t, p.pid)
	if len(s.Connections) != 1 || len(s.Netns) != 1 {
		t.Fatalf("%+v", s)
	}
	c := s.Connections[0]
	if c.Netns == s.Netns[0] || c.Peer.Inode != inode(t, peer) || c.Peer.Name != name || c.Peer.PID != os.Getpid() {
		t.Errorf("%+v", c)
	}
}

func TestScanQueuesAndShutdown(t *testing.T) {
	needRoot(t)
	noLeak(t)
	for _, typ := range types {
		a, b := pair(t, typ)
		closing(t, b)
		ino := inode(t, a)
		p := given(t, "hold", a)
		_, err := unix.Write(b, []byte("abc"))
		check(t, err)
		c := only(t, p.pid)
		if c.RecvQueue != 3 || c.SendQueue != 0 || c.Busy() == "" {
			t.Errorf("%v, unread by us: %+v", typ, c)
		}
		sock, err := sockpeer.Duplicate(p.pid, 3)
		check(t, err)
		_, err = unix.Read(sock.FD(), make([]byte, 10))
		check(t, err)
		_, err = unix.Write(sock.FD(), []byte("abc"))
		check(t, err)
		c = only(t, p.pid)
		if c.RecvQueue != 0 || c.SendQueue == 0 || c.Busy() == "" {
			t.Errorf("%v, unread by the peer: %+v", typ, c)
		}
		_, err = unix.Read(b, make([]byte, 10))
		check(t, err)
		check(t, unix.Shutdown(sock.FD(), unix.SHUT_WR))
		c = only(t, p.pid)
		if c.Inode != ino || c.Shutdown != 2 || c.Busy() != "" {
			t.Errorf("%v, sending shut down: %+v", typ, c)
		}
		check(t, sock.Close())
		p.stop()
	}
}

func TestScanMixedIdentity(t *testing.T) {
	needRoot(t)
	for what, want := range map[string]bool{"": false, "uid": true, "gid": true, "groups": true, "capabilities": true} {
		t.Run(what, func(t *testing.T) {
			noLeak(t)
			a, b := pair(t, sockpeer.Stream)
			closing(t, b)
			p := given(t, "mixed "+what, a)
			if got := scan(t, p.pid).Processes[p.pid]; got.MixedIdentity != want || got.Identity.UID != 0 {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestScanPending(t *testing.T) {
	needRoot(t)
	noLeak(t)
	name := sockpeer.Name(t.TempDir() + "/s")
	l := dup(listener(t, sockpeer.Stream, name))
	inside := connected(t, sockpeer.Stream, name)
	p := start(t, "hold", l, inside)
	unix.Close(l)
	unix.Close(inside)
	if s := scan(t, p.pid); len(s.Pending) != 0 {
		t.Errorf("who waits is inside: %+v", s.Pending)
	}
	closing(t, connected(t, sockpeer.Stream, name))
	unix.Close(connected(t, sockpeer.Stream, name)) // gone, but not what it might have sent
	want := []sockpeer.Pending{{Listener: sockpeer.Holder{PID: p.pid, TID: p.pid, FD: 3}, Name: name, Count: 2}}
	if s := scan(t, p.pid); !slices.Equal(s.Pending, want) {
		t.Errorf("%+v, want %+v", s.Pending, want)
	}
}
