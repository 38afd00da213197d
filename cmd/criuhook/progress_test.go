// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal makes a pseudo terminal (pts(4)): what is written to the second can
// be read from the first.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip("no pseudo terminals here: ", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Skip("no pseudo terminals here: ", err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func TestProgressOnATerminal(t *testing.T) {
	master, slave := terminal(t)
	if err := master.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	p := newProgress(slave, dir)
	p.start(os.Getpid())
	in := bufio.NewReader(master)
	line, err := in.ReadString('K') // of "erase to the end of the line"
	if err != nil || !strings.HasPrefix(line, "\rdumping: 3.0 MiB of about ") {
		t.Fatalf("got %q, %v", line, err)
	}
	if _, err := p.Write([]byte("a message\n")); err != nil {
		t.Fatal(err)
	}
	if s := p.stop(); !strings.HasPrefix(s, "3.0 MiB in ") {
		t.Errorf("done: %q", s)
	}
	text, err := in.ReadString('\n')
	if err != nil || !strings.HasSuffix(text, eraseLine+"a message\r\n") {
		t.Errorf("got %q, %v", text, err)
	}
	// Whatever was shown again is erased.
	fmt.Fprintln(slave, "end")
	text, err = in.ReadString('\n')
	if err != nil || text != "end\r\n" && !strings.HasSuffix(text, eraseLine+"end\r\n") {
		t.Errorf("got %q, %v", text, err)
	}
}

func TestNoProgressElsewhere(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	var b bytes.Buffer
	for name, p := range map[string]*progress{"pipe": newProgress(write, "/nowhere"), "buffer": newProgress(&b, "/nowhere")} {
		p.start(os.Getpid())
		fmt.Fprintln(p, "a message")
		if s := p.stop(); !strings.HasPrefix(s, "0 KiB in ") {
			t.Errorf("%s: done: %q", name, s)
		}
	}
	write.Close()
	var piped bytes.Buffer
	if _, err := piped.ReadFrom(read); err != nil || piped.String() != "a message\n" || b.String() != "a message\n" {
		t.Errorf("%q, %q, %v", &piped, &b, err)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 KiB", 1536: "2 KiB", 1<<20 - 1: "1024 KiB", 1 << 20: "1.0 MiB", 5 << 30: "5120.0 MiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
