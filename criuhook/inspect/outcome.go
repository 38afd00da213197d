// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bytes"
	"fmt"
	"strings"
	"time"

	"criuhook/criuhook/image"
	"criuhook/proto"
	"criuhook/sockpeer"
)

// Result is what becomes of a connection.
type Result string

// Unknown: it cannot be told from here. Broken: the record and the images do
// not fit, a restore would fail or leave the socket as it is.
const (
	Reconnect Result = "reconnect"
	Hangup    Result = "hangup"
	Fail      Result = "fail"
	Unknown   Result = "unknown"
	Broken    Result = "broken"
)

// Outcome is what a restore here and now would do with a connection.
type Outcome struct {
	Result Result
	// Listener is who listens at the name; nil: nobody, or nobody asked.
	Listener *sockpeer.Listener
	// Why says what the result rests on, a sentence for people.
	Why string
}

// unconnected: it is restored as a socket without a peer, else as one that the
// peer has closed.
func unconnected(c *proto.Connection) bool {
	return c.GetAction() == proto.Action_ACTION_RECONNECT || sockpeer.Type(c.GetType()) == sockpeer.Dgram
}

// misfit is the outcome where the images do not fit the record, else nil.
func misfit(c *proto.Connection, form Form) *Outcome {
	dormant := unconnected(c)
	switch {
	case form == Missing:
		return &Outcome{Result: Broken, Why: "the images do not hold this socket: " + image.RecordName + " is of another dump"}
	case dormant && form != Dormant, !dormant && form != Dead:
		return &Outcome{Result: Broken, Why: fmt.Sprintf("it is %s in the images, as criuhook leaves none: they were changed, or %s is of another dump", form, image.RecordName)}
	}
	return nil
}

func outcome(c *proto.Connection, ownNetns bool, listeners []sockpeer.Listener) Outcome {
	if c.GetAction() == proto.Action_ACTION_HANGUP {
		why := "the application finds it closed by the peer"
		if unconnected(c) {
			why = "the application finds it unconnected"
		}
		return Outcome{Result: Hangup, Why: why}
	}
	r := c.GetReconnect()
	to := sockpeer.Name(r.GetTo())
	if path := c.GetPeer().GetPath(); bytes.Equal(r.GetTo(), path) && len(path) > 0 {
		// The application's mounts are not ours: by the daemon's own name.
		own := outcomeAt(sockpeer.Name(c.GetPeer().GetName()), c, ownNetns, listeners)
		own.Why += fmt.Sprintf(" (for the application %s)", to)
		return own
	}
	return outcomeAt(to, c, ownNetns, listeners)
}

func outcomeAt(to sockpeer.Name, c *proto.Connection, ownNetns bool, listeners []sockpeer.Listener) Outcome {
	r := c.GetReconnect()
	if to.Abstract() && ownNetns {
		return Outcome{Result: Unknown, Why: fmt.Sprintf("%s is an abstract name in the network namespace that the restore makes", to)}
	}
	if !to.Abstract() && !strings.HasPrefix(string(to), "/") {
		return Outcome{Result: Unknown, Why: fmt.Sprintf("%s depends on the directory it is looked up in", to)}
	}
	l, exists, err := sockpeer.FindListener(listeners, to, sockpeer.Type(c.GetType()))
	switch {
	case err != nil:
		return Outcome{Result: Unknown, Why: err.Error()}
	case l == nil && !exists:
		return absent(r, nil, fmt.Sprintf("%s does not exist here", to))
	case l == nil:
		return absent(r, nil, fmt.Sprintf("%s exists here, but nobody in this network namespace listens", to))
	case r.GetListenerUid() >= 0 && l.UID >= 0 && l.UID != r.GetListenerUid():
		return absent(r, l, fmt.Sprintf("uid %d listens at %s, expected is uid %d", l.UID, to, r.GetListenerUid()))
	case l.UID < 0:
		return Outcome{Reconnect, l, fmt.Sprintf("somebody listens at %s; as whom is not visible", to)}
	}
	return Outcome{Reconnect, l, fmt.Sprintf("uid %d listens at %s", l.UID, to)}
}

// absent is the outcome without the right listener.
func absent(r *proto.Reconnect, l *sockpeer.Listener, why string) Outcome {
	if l == nil {
		why += fmt.Sprintf(", and a restore gives it %s to come", time.Duration(r.GetTimeoutNs()))
	}
	if r.GetAbsentFails() {
		return Outcome{Fail, l, why}
	}
	return Outcome{Hangup, l, why}
}
