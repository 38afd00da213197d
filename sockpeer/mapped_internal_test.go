// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

const someMaps = `55d0c0000000-55d0c0001000 r--p 00000000 fe:00 12                         /usr/bin/app with blanks
55d0c0001000-55d0c0002000 r-xp 00001000 fe:00 12                         /usr/bin/app with blanks
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 r--s 00000000 fe:00 13                         /var/lib/sss/mc/passwd
7f0000002000-7f0000003000 r-xp 00000000 fe:00 14                         /usr/lib/libnss_sss.so.2 (deleted)
7f0000004000-7f0000005000 --xp 00000000 fe:00 14                         /usr/lib/libnss_sss.so.2 (deleted)
7f0000006000-7f0000007000 rwxp 00000000 00:00 0
7f0000008000-7f0000009000 rwxs 00000000 00:05 15                         /odd\012name
7fff00000000-7fff00001000 r-xp 00000000 00:00 0                          [vdso]
short r-xp
`

func TestParseMapped(t *testing.T) {
	want := []string{"/usr/bin/app with blanks", "/usr/lib/libnss_sss.so.2", `/odd\012name`}
	size := int64(len(someMaps))
	if got := parseMapped(strings.NewReader(someMaps), size); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	var many strings.Builder
	for i := range maxMapped + 1 {
		fmt.Fprintf(&many, "1-2 r-xp 0 0:0 1 /f%d\n", i)
	}
	for name, in := range map[string]struct {
		maps  string
		limit int64
	}{
		"longer than the limit": {someMaps, size - 1},
		"too many files":        {many.String(), 1 << 30},
		"a line without end":    {strings.Repeat("x", 1<<17), 1 << 30},
		"no mappings":           {"", 1},
	} {
		if got := parseMapped(strings.NewReader(in.maps), in.limit); got != nil {
			t.Errorf("%s: %d files, want that nothing is known", name, len(got))
		}
	}
}

func TestReadMapped(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	procs := map[int]Process{os.Getpid(): {Comm: "me"}, 1 << 30: {}}
	addMapped(procs)
	if got := procs[os.Getpid()]; got.Comm != "me" || !slices.Contains(got.Mapped, exe) {
		t.Errorf("%q is not among %q", exe, got.Mapped)
	}
	if got := procs[1<<30].Mapped; got != nil {
		t.Errorf("of a process that does not exist: %q", got)
	}
}

func BenchmarkReadMapped(b *testing.B) {
	for b.Loop() {
		readMapped(os.Getpid())
	}
}
