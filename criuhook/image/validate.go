// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"criuhook/proto"
)

// Bounds of a record.
const (
	maxConnections = 65536
	maxHolders     = 65536 // of one connection
	maxGroups      = 65536 // the kernel's NGROUPS_MAX
	maxCaches      = 65536
	maxName        = 108 // sizeof sun_path, unix(7)
	maxPath        = 4096
	maxText        = 64 << 10
	maxTimeout     = 10 * time.Minute
)

// Validate checks a record as writing and reading one does.
func Validate(rec *proto.Record) error { return validate(rec) }

// validate checks all that a reader of the record relies on.
func validate(rec *proto.Record) error {
	if rec == nil {
		return errors.New("it is missing")
	}
	if len(rec.GetConnections()) > maxConnections {
		return fmt.Errorf("%d connections, at most %d are possible", len(rec.GetConnections()), maxConnections)
	}
	if len(rec.GetCaches()) > maxCaches {
		return fmt.Errorf("%d caches, at most %d are possible", len(rec.GetCaches()), maxCaches)
	}
	if len(rec.GetWrittenBy()) > maxText || len(rec.GetDumpId()) > maxText {
		return errors.New("version or dump id is too long")
	}
	seen := make(map[uint32]bool, len(rec.GetConnections()))
	for _, c := range rec.GetConnections() {
		if err := validateConnection(c); err != nil {
			return fmt.Errorf("connection with inode %d: %w", c.GetInode(), err)
		}
		if seen[c.GetInode()] {
			return fmt.Errorf("connection with inode %d: it is there twice", c.GetInode())
		}
		seen[c.GetInode()] = true
	}
	for _, c := range rec.GetCaches() {
		if p := c.GetPath(); p == "" || len(p) > maxPath {
			return fmt.Errorf("the path of a cache has %d bytes, 1 to %d are possible", len(p), maxPath)
		}
	}
	return nil
}

func validateConnection(c *proto.Connection) error {
	if c.GetInode() == 0 {
		return errors.New("there is no such inode")
	}
	switch c.GetType() {
	case unix.SOCK_STREAM, unix.SOCK_SEQPACKET, unix.SOCK_DGRAM:
	default:
		return fmt.Errorf("unknown type %d", c.GetType())
	}
	if len(c.GetName()) > maxName || len(c.GetPeer().GetName()) > maxName || len(c.GetPeer().GetPath()) > maxName {
		return fmt.Errorf("a name is longer than %d bytes", maxName)
	}
	if u := c.GetPeer().GetUid(); u < -1 || u > math.MaxUint32 {
		return fmt.Errorf("the peer's uid cannot be %d", u)
	}
	if len(c.GetPeer().GetExe()) > maxPath {
		return errors.New("the peer's executable is too long a path")
	}
	if len(c.GetRule()) > maxText || len(c.GetBusy()) > maxText || len(c.GetReason()) > maxText {
		return errors.New("a text in it is too long")
	}
	if n := len(c.GetHolders()); n == 0 || n > maxHolders {
		return fmt.Errorf("%d holders, 1 to %d are possible", n, maxHolders)
	}
	for _, h := range c.GetHolders() {
		if h.GetPid() <= 0 || h.GetFd() < 0 || len(h.GetComm()) > maxName {
			return fmt.Errorf("holder pid %d fd %d is not possible", h.GetPid(), h.GetFd())
		}
	}
	if n := len(c.GetIdentity().GetGroups()); n > maxGroups {
		return fmt.Errorf("%d groups, at most %d are possible", n, maxGroups)
	}
	switch c.GetAction() {
	case proto.Action_ACTION_RECONNECT:
		if c.GetReconnect() == nil {
			return errors.New("it is to be reconnected, but not said how")
		}
		return validateReconnect(c.GetReconnect())
	case proto.Action_ACTION_HANGUP:
		if c.GetReconnect() != nil {
			return errors.New("it is to be hung up, and yet said how to reconnect")
		}
		return nil
	}
	return fmt.Errorf("unknown action %d", c.GetAction())
}

func validateReconnect(r *proto.Reconnect) error {
	if n := len(r.GetTo()); n == 0 || n > maxName {
		return fmt.Errorf("the name to connect to has %d bytes, 1 to %d are possible", n, maxName)
	}
	if len(r.GetOrTo()) > maxName {
		return fmt.Errorf("the other name to connect to is longer than %d bytes", maxName)
	}
	switch r.GetPrelude() {
	case "none", "sssd", "lwmsg", "dbus":
	default:
		return fmt.Errorf("unknown prelude %.40q", r.GetPrelude())
	}
	if t := time.Duration(r.GetTimeoutNs()); t < 0 || t > maxTimeout {
		return fmt.Errorf("the timeout is %v, 0 to %v are possible", t, maxTimeout)
	}
	if u := r.GetListenerUid(); u < -1 || u > math.MaxUint32 {
		return fmt.Errorf("the listener's uid cannot be %d", u)
	}
	return nil
}
