// SPDX-License-Identifier: Apache-2.0

package prelude

import (
	"encoding/binary"
	"fmt"
	"io"
	"path"
)

// sssdVersions are the protocol versions of sssd's services, by the name of
// the pipe (sssd: src/sss_client/sss_cli.h). The pam and sudo responders need
// to be told before anything else.
var sssdVersions = map[string]uint32{
	"nss": 1, "pam": 3, "sudo": 1, "autofs": 1, "pac": 1, "ssh": 0,
}

// sssd sends SSS_GET_VERSION and reads the version. A packet is a header of
// four u32 in host order (length, command, status, reserved) and a body.
func sssd(rw io.ReadWriter, pipe string) error {
	const (
		getVersion = 1
		length     = 20
	)
	version, ok := sssdVersions[path.Base(pipe)]
	if !ok {
		return fmt.Errorf("no sssd service has a pipe called %s (nss, pam, sudo, autofs, ssh, pac)", path.Base(pipe))
	}
	packet := func(version uint32) []byte {
		var b []byte
		for _, v := range []uint32{length, getVersion, 0, 0, version} {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	if _, err := rw.Write(packet(version)); err != nil {
		return fmt.Errorf("send GET_VERSION: %w", err)
	}
	reply := make([]byte, length)
	if _, err := io.ReadFull(rw, reply); err != nil {
		return fmt.Errorf("read the version: %w", err)
	}
	if string(reply) != string(packet(version)) {
		return unexpected(reply)
	}
	return nil
}
