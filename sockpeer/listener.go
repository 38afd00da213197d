// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Listener is a socket that connect() can reach: one that listens, or a
// datagram socket with a name.
type Listener struct {
	Inode uint32
	Type  Type
	Name  Name // as it was bound
	VFS   VFS
	// UID is the user who made the socket; -1: not known (before Linux 5.3).
	UID int64
}

// Listeners returns the listeners that were made in our network namespace. It
// needs no privileges.
func Listeners() ([]Listener, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag in our network namespace: %w", err)
	}
	d := &diagConn{c: c}
	defer d.Close()
	all, err := d.all()
	if err != nil {
		return nil, err
	}
	var out []Listener
	for _, s := range all {
		if s.name != "" && (s.state == Listening || s.typ == Dgram) {
			out = append(out, Listener{Inode: s.inode, Type: s.typ, Name: s.name, VFS: s.vfs, UID: s.uid})
		}
	}
	slices.SortFunc(out, func(a, b Listener) int { return cmp.Compare(a.Inode, b.Inode) })
	return out, nil
}

// FindListener returns who connect() to the name would reach, seen from our
// mount namespace, or nil: the name may not exist (exists is false), nobody
// may listen there, or it was made in another network namespace, where paths
// lead but sock_diag does not.
func FindListener(listeners []Listener, to Name, t Type) (found *Listener, exists bool, err error) {
	if to.Abstract() {
		i := slices.IndexFunc(listeners, func(l Listener) bool { return l.Name == to && l.Type == t })
		if i < 0 {
			return nil, false, nil
		}
		return &listeners[i], true, nil
	}
	info, err := os.Stat(string(to))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look for a listener: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeSocket == 0 {
		return nil, true, nil
	}
	for i, l := range listeners {
		// Some file systems (btrfs, overlay) show stat another device
		// than sock_diag; the name then decides.
		if l.Type == t && l.VFS.Inode == uint32(st.Ino) && (l.VFS.Dev == kernelDev(st.Dev) || l.Name == to) {
			return &listeners[i], true, nil
		}
	}
	return nil, true, nil
}

// kernelDev is a device number as the kernel keeps it (include/linux/kdev_t.h).
func kernelDev(dev uint64) uint32 { return unix.Major(dev)<<20 | unix.Minor(dev) }
