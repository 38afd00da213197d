// SPDX-License-Identifier: Apache-2.0

package sockpeer_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// acts are what a process of the tests can do. Each says "ready" and ends
// when its stdin does.
var acts = map[string]func(arg string){
	"hold":   func(string) { readyUntilEOF() },
	"exit":   func(string) {},
	"parent": parent,
	"flags":  func(string) { unix.CloseOnExec(3); readyUntilEOF() },
	"dup":    func(string) { unix.Dup2(3, 100); readyUntilEOF() },
	"thread": ownTable,
	"netns":  ownNetns,
	"accept": acceptOne,
	"block":  block,
	"churn":  churn,
	"leader": leaderGone,
	"epoll":  blockEpoll,
	"mixed":  mixed,
	"moved":  moved,
}

func readyUntilEOF() {
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// parent holds fd 3 and what else it was given, and has a child that holds the
// same under other numbers.
func parent(string) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), actVariable+"=hold")
	cmd.ExtraFiles = []*os.File{os.Stdin, os.NewFile(3, "3")}
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	io.ReadFull(out, make([]byte, len("ready\n")))
	readyUntilEOF()
	in.Close()
	cmd.Wait()
}

// ownTable moves fd 3 into the fd table of one thread.
func ownTable(string) {
	tid := make(chan int)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FILES); err != nil {
			panic(err)
		}
		tid <- unix.Gettid()
		select {}
	}()
	id := <-tid
	unix.Close(3)
	fmt.Println("ready")
	fmt.Println(id)
	io.Copy(io.Discard, os.Stdin)
}

// leaderGone: the first thread ends, two others live on.
func leaderGone(string) {
	n := make(chan bool)
	for range 2 {
		go func() {
			runtime.LockOSThread()
			n <- true
			unix.Pause()
		}()
	}
	<-n
	<-n
	go func() {
		runtime.LockOSThread()
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	// init locked the main goroutine to the first thread.
	unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

// The first thread runs the main function, so that acts know where they are.
func init() {
	if os.Getenv(actVariable) != "" {
		runtime.LockOSThread()
	}
}

// ownNetns has a thread in a network namespace of its own.
func ownNetns(string) {
	ino := make(chan string)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		link, _ := os.Readlink("/proc/thread-self/ns/net")
		ino <- link
		select {}
	}()
	link := <-ino
	fmt.Println("ready")
	fmt.Println(link)
	io.Copy(io.Discard, os.Stdin)
}

// acceptOne accepts from the listener at fd 3.
func acceptOne(string) {
	fmt.Println("ready")
	if _, _, err := unix.Accept(3); err != nil {
		panic(err)
	}
	fmt.Println("accepted")
	io.Copy(io.Discard, os.Stdin)
}

// block waits on fd 3 in the named system call, again and again.
func block(call string) {
	wait, ok := blockers[call]
	if !ok {
		panic(call)
	}
	go func() {
		runtime.LockOSThread()
		for {
			wait(3)
		}
	}()
	readyUntilEOF()
}

// blockers wait on a socket until it is ready, or interrupted.
var blockers = map[string]func(fd int){
	"read": func(fd int) {
		var b [8]byte
		unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b)), 8)
	},
	"write": func(fd int) {
		var b [4096]byte
		unix.Syscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b)), 4096)
	},
	"recvfrom": func(fd int) {
		var b [8]byte
		unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), 8, 0, 0, 0)
	},
	"recvmsg": func(fd int) {
		var b [8]byte
		iov := unix.Iovec{Base: &b[0], Len: 8}
		msg := unix.Msghdr{Iov: &iov, Iovlen: 1}
		unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), 0)
	},
	"ppoll": func(fd int) {
		p := pollfds(fd)
		unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), uintptr(len(p)), 0, 0, 0, 0)
	},
	"pselect6": func(fd int) {
		var set unix.FdSet
		set.Set(fd)
		unix.Syscall6(unix.SYS_PSELECT6, uintptr(fd+1), uintptr(unsafe.Pointer(&set)), 0, 0, 0, 0)
	},
	"epoll_pwait": func(fd int) {
		ep := epoll(fd)
		defer unix.Close(ep)
		epollWait(ep)
	},
}

func epollWait(ep int) {
	var ev [4]unix.EpollEvent
	unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(&ev)), 4, ^uintptr(0), 0, 0)
}

func pollOne(fd int) {
	p := pollfds(fd)
	unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), uintptr(len(p)), 0, 0, 0, 0)
}

// epollBlockers wait on a socket by way of epoll instances.
var epollBlockers = map[string]func(fd int){
	"nested": func(fd int) { epollWait(epoll(epoll(epoll(fd)))) },
	"polled": func(fd int) { pollOne(epoll(fd)) },
	"selected": func(fd int) {
		ep := epoll(epoll(fd))
		var set unix.FdSet
		set.Set(ep)
		unix.Syscall6(unix.SYS_PSELECT6, uintptr(ep+1), uintptr(unsafe.Pointer(&set)), 0, 0, 0, 0)
	},
	"renumbered": func(fd int) {
		ep := epoll(fd)
		unix.Dup2(fd, 50)
		unix.Close(fd)
		epollWait(ep)
	},
	"number used again": func(fd int) {
		ep := epoll(fd)
		unix.Dup2(fd, 50)
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			panic(err)
		}
		unix.Dup2(p[0], fd)
		epollWait(ep)
	},
	"nested, renumbered": func(fd int) {
		ep := epoll(fd)
		outer := epoll(ep)
		unix.Dup2(ep, 60)
		unix.Close(ep)
		epollWait(outer)
	},
}

// blockEpoll waits on fd 3 as one of epollBlockers.
func blockEpoll(how string) {
	go func() {
		runtime.LockOSThread()
		epollBlockers[how](3)
		panic("the socket became ready")
	}()
	readyUntilEOF()
}

// mixed has a thread of another identity.
func mixed(what string) {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		switch what {
		case "uid":
			unix.RawSyscall(unix.SYS_SETRESUID, 1000, 1000, 1000)
		case "gid":
			unix.RawSyscall(unix.SYS_SETRESGID, 1000, 1000, 1000)
		case "groups":
			groups := [1]uint32{1000}
			unix.RawSyscall(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&groups)), 0)
		case "capabilities":
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			unix.Capget(&hdr, &data[0])
			data[0].Effective &^= 1
			unix.Capset(&hdr, &data[0])
		}
		done <- true
		select {}
	}()
	<-done
	readyUntilEOF()
}

// moved takes another root, or another file system over a directory.
func moved(arg string) {
	how, arg, _ := strings.Cut(arg, " ")
	dir, over, _ := strings.Cut(arg, " ")
	var err error
	switch how {
	case "chroot":
		err = unix.Chroot(dir)
	case "mount":
		err = errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount(dir, over, "", unix.MS_BIND, ""))
	}
	if err != nil {
		panic(err)
	}
	readyUntilEOF()
}

// pollfds has other entries than the socket: an fd to be left out and one that
// is not open.
func pollfds(fd int) [3]unix.PollFd {
	return [3]unix.PollFd{{Fd: -1, Events: unix.POLLIN}, {Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(fd), Events: 0}}
}

func epoll(fd int) int {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		panic(err)
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		panic(err)
	}
	return ep
}

// churn opens and closes sockets and starts and ends processes, while fd 3
// stays. Its argument is an abstract name somebody listens at.
func churn(name string) {
	var wg sync.WaitGroup
	stop := make(chan bool)
	loop := func(fn func()) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					fn()
				}
			}
		})
	}
	loop(func() {
		if p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			unix.Close(p[0])
			unix.Close(p[1])
		}
	})
	loop(func() {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			unix.Connect(fd, &unix.SockaddrUnix{Name: name})
			unix.Close(fd)
		}
	})
	loop(func() {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{actVariable + "=exit"}
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(3)), strconv.Itoa(3))}
		cmd.Run()
		cmd.ExtraFiles[0].Close()
	})
	loop(func() {
		done := make(chan bool)
		go func() {
			runtime.LockOSThread() // a thread that ends
			unix.Unshare(unix.CLONE_FILES)
			close(done)
		}()
		<-done
	})
	readyUntilEOF()
	close(stop)
	wg.Wait()
}

func dup(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		panic(err)
	}
	return n
}
