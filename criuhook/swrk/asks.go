// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"bytes"
	"os"

	"criuhook/criuhook/criurpc"
)

// Asks reports whether a CRIU asks for external files, if that is known: a program
// that does has the name of that question in it. Versions tell little about forks
// and backports. Of anything else, such as a script that starts CRIU, only a dump
// tells.
func Asks(criu string) (asks, known bool) {
	program, err := os.ReadFile(criu) // one to three megabytes
	if err != nil || !bytes.HasPrefix(program, []byte("\x7fELF")) {
		return false, false
	}
	return bytes.Contains(program, []byte(criurpc.StageQueryExtFiles)), true
}
