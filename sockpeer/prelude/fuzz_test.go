// SPDX-License-Identifier: Apache-2.0

package prelude_test

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"criuhook/sockpeer/prelude"
)

// counted is a daemon that counts what is read.
type counted struct {
	script
	r    io.Reader
	read int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.read += n
	return n, err
}

// speak runs a prelude on answers, and tells how many bytes of them it took.
func speak(kind string, p prelude.Peer, r io.Reader) (read int, err error) {
	c := &counted{r: r}
	err = prelude.Run(kind, c, p)
	return c.read, err
}

// checkPrelude checks what has to be so whatever the daemon answers: it takes no
// more than most bytes; if it is content, then with just the bytes that it took,
// however these arrive, and not with fewer. It returns what it took if so.
func checkPrelude(t *testing.T, kind string, p prelude.Peer, answers []byte, most int) (took []byte, ok bool) {
	t.Helper()
	n, err := speak(kind, p, bytes.NewReader(answers))
	if n > most {
		t.Fatalf("%d bytes read, %d are enough: %v", n, most, err)
	}
	if err != nil {
		return nil, false
	}
	for _, r := range []io.Reader{bytes.NewReader(answers[:n]), iotest.OneByteReader(bytes.NewReader(answers))} {
		if m, err := speak(kind, p, r); err != nil || m != n {
			t.Fatalf("the same answers the second time: %d of %d bytes read, %v", m, n, err)
		}
	}
	if _, err := speak(kind, p, bytes.NewReader(answers[:n-1])); err == nil {
		t.Fatalf("content with %d bytes less one", n)
	}
	return answers[:n], true
}

func FuzzSSSD(f *testing.F) {
	versions := map[string]uint32{"nss": 1, "pam": 3, "private/pam": 3, "sudo": 1, "autofs": 1, "ssh": 0, "pac": 1}
	for name, v := range versions {
		f.Add(name, host(20, 1, 0, 0, v))
		f.Add(name, append(host(20, 1, 0, 0, v), "more"...))
		f.Add(name, host(20, 1, 0, 0, v+1))
	}
	f.Add("infopipe", host(20, 1, 0, 0, 1))
	f.Fuzz(func(t *testing.T, name string, answers []byte) {
		took, ok := checkPrelude(t, "sssd", prelude.Peer{Path: "/var/lib/sss/pipes/" + name}, answers, 20)
		v, known := versions[name]
		if !known {
			return // it goes by the last part of the name
		}
		if want := host(20, 1, 0, 0, v); ok != bytes.HasPrefix(answers, want) || ok && !bytes.Equal(took, want) {
			t.Errorf("%s: content %t with %x, took %x", name, ok, answers, took)
		}
	})
}

func FuzzLwmsg(f *testing.F) {
	good := []byte{0, 0, 0, 19, 3, 3, 0, 0, 0, 0x20, 0, 1, 2, 3, 4, 5, 6, 7, 8}
	f.Add(good)
	f.Add(append(bytes.Clone(good), "more"...))
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		f.Add(bad)
	}
	f.Add([]byte{0, 0, 0, 10, 5, 3, 0, 0, 0, 19})
	f.Fuzz(func(t *testing.T, answers []byte) {
		_, ok := checkPrelude(t, "lwmsg", prelude.Peer{}, answers, len(good))
		if want := len(answers) >= len(good) && bytes.HasPrefix(answers, good[:len(good)-8]); ok != want {
			t.Errorf("content %t with %x", ok, answers)
		}
	})
}

func FuzzDBus(f *testing.F) {
	f.Add(bus(reply, acquired))
	f.Add(bus(acquired, reply, []byte("more")))
	f.Add(bus(reply, reply))
	f.Add([]byte("REJECTED EXTERNAL\r\n"))
	f.Add(bus([]byte{'B', 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 16, 8, 1, 'g', 0, 1, 's', 0, 0, 5, 1, 'u', 0, 0, 0, 0, 1}, acquired))
	f.Fuzz(func(t *testing.T, answers []byte) {
		// Two lines and two messages: header, fields and body each.
		const most = 2*512 + 2*(16+4096+4096)
		took, ok := checkPrelude(t, "dbus", prelude.Peer{UID: 1000}, answers, most)
		if ok && (!bytes.HasPrefix(took, []byte("OK")) || !bytes.Contains(took, []byte("NameAcquired"))) {
			t.Errorf("content with %q", took)
		}
	})
}
