// SPDX-License-Identifier: Apache-2.0

package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"criuhook/criuhook/image"
	"criuhook/test/app"
	"criuhook/test/echo"
)

// The head of a record: magic, version, length, checksum.
const (
	versionAt = 8
	lengthAt  = 12
	sumAt     = 16
	payloadAt = 48
)

// TestDamagedRecord: whatever is wrong with criuhook.img, the restore fails
// and says so; nothing of the application runs.
func TestDamagedRecord(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := dumpClient(t, alice, "reconnect", "t-reconnect")
		srv := daemonAt(t, "unix", d.path)
		record, plan := filepath.Join(d.dir, image.RecordName), filepath.Join(d.dir, image.PlanName)
		good, err := os.ReadFile(record)
		if err != nil {
			t.Fatal(err)
		}
		put := func(b []byte) func() error { return func() error { return os.WriteFile(record, b, 0o600) } }
		flip := func(at int) func() error {
			b := bytes.Clone(good)
			b[at] ^= 0x10
			return put(b)
		}
		newer := bytes.Clone(good)
		binary.LittleEndian.PutUint32(newer[versionAt:], 7)

		type damage struct {
			name string
			do   func() error
			says []string
		}
		table := []damage{
			{"newer version", put(newer), []string{"newer", "version is 7"}},
			{"older version", put(append(append(bytes.Clone(good[:versionAt]), 0, 0, 0, 0), good[lengthAt:]...)), []string{"damaged"}},
			{"one byte more", put(append(bytes.Clone(good), 0)), []string{"damaged"}},
			{"text", put([]byte("hello\n")), []string{"damaged"}},
			{"huge", func() error { return errors.Join(put(good)(), os.Truncate(record, 1<<30)) }, []string{"bytes"}},
			{"a directory", func() error { return os.Mkdir(record, 0o700) }, []string{"not a regular file"}},
			{"a FIFO", func() error { return unix.Mkfifo(record, 0o600) }, []string{"not a regular file"}},
			{"a link", func() error {
				return errors.Join(os.WriteFile(record+".good", good, 0o600), os.Symlink(image.RecordName+".good", record))
			}, []string{"not a regular file"}},
			{"a plan only", func() error { return os.WriteFile(plan, good, 0o600) }, []string{"never finished", image.PlanName}},
		}
		for _, n := range []int{0, 1, versionAt - 1, versionAt, lengthAt, sumAt, payloadAt - 1, payloadAt, payloadAt + 1, len(good) / 2, len(good) - 1} {
			table = append(table, damage{fmt.Sprint("truncated to ", n), put(good[:n]), []string{"damaged"}})
		}
		for _, at := range []int{0, versionAt - 1, lengthAt, lengthAt + 3, sumAt, payloadAt - 1, payloadAt, len(good) / 2, len(good) - 1} {
			table = append(table, damage{fmt.Sprint("a bit flipped at ", at), flip(at), []string{"damaged"}})
		}
		for _, c := range table {
			t.Run(c.name, func(t *testing.T) {
				if err := errors.Join(os.RemoveAll(record), c.do()); err != nil {
					t.Fatal(err)
				}
				r := d.TryRestore(t, d.dir)
				if r.Code == 0 {
					t.Error("the restore did not fail")
					d.Kill(t)
				}
				r.wantMessage(t, append(c.says, image.RecordName)...)
				noPanic(t, r)
				d.Gone(t)
				if err := errors.Join(os.RemoveAll(plan), os.RemoveAll(record), put(good)()); err != nil {
					t.Fatal(err)
				}
			})
		}
		wantClients(t, srv, 0, 0)
		d.wantRestored(t, srv)
	})
}

func noPanic(t testing.TB, r Result) {
	t.Helper()
	for _, s := range []string{"goroutine ", "panic:"} {
		if strings.Contains(r.Output, s) || strings.Contains(r.Log, s) {
			t.Errorf("criuhook crashed:\n%s\n%s", r.Output, r.tail())
		}
	}
}

// swap exchanges the records of two dumps.
func swap(t testing.TB, a, b string) {
	t.Helper()
	a, b = filepath.Join(a, image.RecordName), filepath.Join(b, image.RecordName)
	if err := errors.Join(os.Rename(a, a+".x"), os.Rename(b, a), os.Rename(a+".x", b)); err != nil {
		t.Fatal(err)
	}
}

// TestRecordOfOtherImages: of another process.
func TestRecordOfOtherImages(t *testing.T) {
	ways(t, func(t *testing.T) {
		d := [2]*dumped{dumpClient(t, alice, "reconnect", "t-reconnect"), dumpClient(t, alice, "reconnect", "t-reconnect")}
		var srv [2]*echo.Server
		for i := range d {
			srv[i] = daemonAt(t, "unix", d[i].path)
		}
		swap(t, d[0].dir, d[1].dir)
		for i := range d {
			r := d[i].TryRestore(t, d[i].dir)
			if r.Code == 0 {
				t.Error("the restore did not fail")
				d[i].Kill(t)
			}
			r.wantMessage(t, image.RecordName, "not of these images")
			noPanic(t, r)
			d[i].Gone(t)
			wantClients(t, srv[i], 0, 0)
		}
		swap(t, d[0].dir, d[1].dir)
		for i := range d {
			d[i].wantRestored(t, srv[i])
		}
	})
}

// TestRecordOfAnEarlierDump: of the same process, whose connections were
// others then. It must not lead one to the daemon of another.
func TestRecordOfAnEarlierDump(t *testing.T) {
	ways(t, func(t *testing.T) {
		one, onePath := daemon(t, "unix", "reconnect-one")
		two, twoPath := daemon(t, "unix", "reconnect-two")
		a := startApp(t, alice, nil)
		const fd = 77
		a.connect(t, "c", onePath)
		a.Do(t, app.Command{Op: "move", Conn: "c", Value: fd, Option: unix.O_CLOEXEC})
		first := a.Dump(t, "--leave-running")
		a.connect(t, "d", twoPath)
		a.Do(t, app.Command{Op: "move", Conn: "d", Value: fd, Option: unix.O_CLOEXEC})
		a.Request(t, "d")
		second := a.Dump(t)
		a.Dumped(t, first)
		swap(t, first, second)
		for _, dir := range []string{first, second} {
			r := a.TryRestore(t, dir)
			if r.Code == 0 {
				t.Error("the restore did not fail")
				a.Kill(t)
			}
			r.wantMessage(t, image.RecordName, "not of these images")
			a.Gone(t)
		}
		wantClients(t, one, 1, 0)
		wantClients(t, two, 1, 0)
		nothingLeft(t)
	})
}

// TestBadRules: the dump fails, with file, line and column where there is one,
// and the application keeps its connection.
func TestBadRules(t *testing.T) {
	ways(t, func(t *testing.T) {
		srv, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		a.connect(t, "c", path)
		const file = "/etc/criuhook/rules.d/50-bad.yaml"
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(filepath.Dir(file)) })
		write := func(text string, mode os.FileMode) func() error {
			return func() error { return errors.Join(os.WriteFile(file, []byte(text), mode), os.Chmod(file, mode)) }
		}
		for _, c := range []struct {
			name string
			do   func() error
			says []string
		}{
			{"syntax", write("rules:\n  - {name: x, path: [\n", 0o644), []string{file + ":"}},
			{"unknown key", write("rules:\n  - name: x\n    pathh: /a\n", 0o644), []string{file + ":3:5", "pathh"}},
			{"bad glob", write("rules:\n  - {name: x, idle: hangup,\n     path: '/a['}\n", 0o644), []string{file + ":3:12"}},
			{"impossible", write("rules:\n  - {name: x, path: /a, idle: reconnect, busy: reconnect}\n", 0o644), []string{file + ":2:"}},
			{"group may write", write("rules: []\n", 0o664), []string{file, "chmod go-w"}},
			{"others may write", write("rules: []\n", 0o646), []string{file, "chmod go-w"}},
			{"of another user", func() error { return errors.Join(write("rules: []\n", 0o644)(), os.Chown(file, 1000, 1000)) }, []string{file, "chown"}},
			{"a directory", func() error { return os.Mkdir(file, 0o755) }, []string{file, "not a regular file"}},
			{"a FIFO", func() error { return unix.Mkfifo(file, 0o644) }, []string{file, "not a regular file"}},
			{"a link to nowhere", func() error { return os.Symlink("/nowhere", file) }, []string{file, unix.ENOENT.Error()}},
		} {
			t.Run(c.name, func(t *testing.T) {
				if err := errors.Join(os.RemoveAll(file), c.do()); err != nil {
					t.Fatal(err)
				}
				r := a.TryDump(t, images(t))
				if r.Code == 0 {
					t.Error("the dump did not fail")
				}
				r.wantMessage(t, c.says...)
				noPanic(t, r)
				a.Request(t, "c")
				wantClients(t, srv, 0, 1)
				nothingLeft(t)
			})
		}
	})
}
