// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"encoding/binary"
	"os"
)

// compatCall is the name of any call of a 32-bit program.
const compatCall = "a system call of a 32-bit program"

// compat reports whether the table's process runs a 32-bit program: its system
// calls have other numbers. The auxiliary vector tells, not the program's file,
// which may be in a file system whose server is stopped too.
func (t *waitTable) compat(tid int) bool {
	if !t.auxvRead {
		b, err := os.ReadFile(procPath(tid, "auxv"))
		if err != nil || len(b) == 0 {
			return false // a zombie, or gone
		}
		t.auxvRead, t.is32 = true, is32(b)
	}
	return t.is32
}

// is32 tells from /proc/PID/auxv whether a program is of 32 bits: then the
// kernel keeps its pairs of type and value as 32-bit words. Types are small
// numbers, so a word that holds a value too is none (fs/compat_binfmt_elf.c).
func is32(auxv []byte) bool {
	for ; len(auxv) >= 16; auxv = auxv[16:] {
		typ := binary.NativeEndian.Uint64(auxv)
		if typ>>32 != 0 {
			return true
		}
		if typ == 0 { // AT_NULL
			break
		}
	}
	return false
}
