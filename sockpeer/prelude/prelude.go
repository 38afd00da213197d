// SPDX-License-Identifier: Apache-2.0

// Package prelude speaks the first words of a daemon's protocol on a new
// connection, so that the application, which has spoken them on the old one,
// can go on. A prelude reads its own replies and not a byte more.
package prelude

import (
	"encoding/hex"
	"fmt"
	"io"
)

// Peer is what a prelude may need to know of whom it talks to.
type Peer struct {
	// Path is the daemon's name; some protocols have one per service.
	Path string
	// UID is the user id the daemon sees on our side.
	UID uint32
}

// Run speaks the prelude called kind. "none" and "" say nothing. rw must end
// its reads and writes with an error when time is over.
func Run(kind string, rw io.ReadWriter, p Peer) error {
	var err error
	switch kind {
	case "", "none":
		return nil
	case "sssd":
		err = sssd(rw, p.Path)
	case "lwmsg":
		err = lwmsg(rw)
	case "dbus":
		err = dbus(rw, p.UID)
	default:
		return fmt.Errorf("no prelude is called %q (none, sssd, lwmsg, dbus)", kind)
	}
	if err != nil {
		return fmt.Errorf("greet the daemon at %s, prelude %s: %w", p.Path, kind, err)
	}
	return nil
}

// unexpected describes a wrong answer; only its beginning, for it is data
// from elsewhere.
func unexpected(b []byte) error {
	const most = 32
	dots := ""
	if len(b) > most {
		b, dots = b[:most], "…"
	}
	return fmt.Errorf("unexpected answer %s%s", hex.EncodeToString(b), dots)
}
