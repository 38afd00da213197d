// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"bytes"
	"os"

	"criuhook/criuhook/criurpc"
)

// neverAsks reports that a CRIU surely does not ask for external files: it is a
// program without the name of that question in it. Versions tell little about
// forks and backports. Of anything else, such as a script that starts CRIU,
// only a dump tells.
func neverAsks(criu string) bool {
	program, err := os.ReadFile(criu) // one to three megabytes
	return err == nil && bytes.HasPrefix(program, []byte("\x7fELF")) && !bytes.Contains(program, []byte(criurpc.StageQueryExtFiles))
}
