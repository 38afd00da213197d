// SPDX-License-Identifier: Apache-2.0

package sockpeer

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxPasses bounds how often a scan looks again for processes that were forked
// while it read the others.
const maxPasses = 3

// Scan returns the connections of the tree below root whose other half is
// outside of it.
func Scan(root int) (*Snapshot, error) { return ScanStopped(root, nil) }

// ScanStopped is Scan for a tree whose threads have been stopped. calls is what
// was noted of them before.
func ScanStopped(root int, calls Calls) (*Snapshot, error) {
	s := newScan()
	s.calls = calls
	defer s.close()
	for range maxPasses {
		pids, err := Tree(root)
		if err != nil {
			return nil, fmt.Errorf("scan the tree of process %d: %w", root, err)
		}
		more, err := s.read(pids)
		if err != nil {
			return nil, fmt.Errorf("scan the tree of process %d: %w", root, err)
		}
		if !more {
			break
		}
	}
	s.outside = func(h Holder, peer uint32) bool { return len(s.holders[peer]) == 0 }
	snap, err := s.snapshot()
	if err != nil {
		return nil, fmt.Errorf("scan the tree of process %d: %w", root, err)
	}
	mapped := snap.Processes[root].Mapped
	p, err := ReadProcess(root)
	if err != nil {
		return nil, fmt.Errorf("scan the tree of process %d: %w", root, err)
	}
	p.Mapped = mapped
	snap.Processes[root] = p
	return snap, nil
}

// ScanAll returns the connections of all processes, each seen from the tree
// below its first holder.
func ScanAll() (*Snapshot, error) {
	s := newScan()
	defer s.close()
	up, err := parents()
	if err != nil {
		return nil, err
	}
	if _, err := s.read(slices.Sorted(maps.Keys(up))); err != nil {
		return nil, fmt.Errorf("scan all processes: %w", err)
	}
	s.outside = func(h Holder, peer uint32) bool {
		return !slices.ContainsFunc(s.holders[peer], func(p Holder) bool { return below(up, p.PID, h.PID) })
	}
	return s.snapshot()
}

// allProcesses in scan.owned: all have been read.
const allProcesses = 0

// shutdownBoth is the kernel's SHUTDOWN_MASK (include/net/sock.h).
const shutdownBoth = 3

// scan is a snapshot in the making.
type scan struct {
	seen    map[int]bool // processes read
	tables  []fdTable
	tids    map[int][]int
	holders map[uint32][]Holder // by inode
	diags   map[uint64]*diagConn
	spaces  map[uint64]netns
	sockets map[uint32]diagSocket
	// waiting maps a listener's pending connections to the listener.
	waiting map[uint32]uint32
	outside func(h Holder, peer uint32) bool
	// tasksNetns are the namespaces tasks are in, not merely sockets.
	tasksNetns []uint64
	// owners are the holders of sockets, of the processes in owned.
	owners map[uint32]int
	owned  map[int]bool
	calls  Calls
	// unowned are connections whose peer's half nobody was seen to hold: the
	// pid of their peer may be anybody's.
	unowned map[uint32]bool
}

func newScan() *scan {
	return &scan{
		seen:    map[int]bool{},
		tids:    map[int][]int{},
		holders: map[uint32][]Holder{},
		diags:   map[uint64]*diagConn{},
		spaces:  map[uint64]netns{},
		sockets: map[uint32]diagSocket{},
		waiting: map[uint32]uint32{},
		owners:  map[uint32]int{},
		owned:   map[int]bool{},
		unowned: map[uint32]bool{},
	}
}

func (s *scan) close() {
	for _, d := range s.diags {
		d.Close()
	}
	for _, n := range s.spaces {
		n.Close()
	}
}

// read adds processes; more reports whether there was one not seen before.
func (s *scan) read(pids []int) (more bool, err error) {
	for _, pid := range pids {
		if s.seen[pid] {
			continue
		}
		s.seen[pid], more = true, true
		if err := s.readProcess(pid); err != nil && !gone(err) {
			return more, err
		}
	}
	return more, nil
}

func (s *scan) readProcess(pid int) error {
	tids, err := numbers(procPath(pid, "task"))
	if err != nil {
		return err
	}
	s.tids[pid] = tids
	if err := s.readNetns(pid, tids); err != nil {
		return err
	}
	tables, err := fdTables(pid, tids)
	if err != nil {
		return err
	}
	s.tables = append(s.tables, tables...)
	for _, t := range tables {
		for fd, ino := range t.sockets {
			s.holders[ino] = append(s.holders[ino], Holder{PID: t.pid, TID: t.tid, FD: fd})
		}
	}
	return nil
}

// readNetns opens the network namespaces of a process' threads.
func (s *scan) readNetns(pid int, tids []int) error {
	for _, tid := range tids {
		path := procPath(pid, "task", strconv.Itoa(tid), "ns/net")
		link, err := os.Readlink(path)
		if err != nil {
			continue // a zombie has none, or it is gone
		}
		var ino uint64
		if _, err := fmt.Sscanf(link, "net:[%d]", &ino); err != nil {
			return fmt.Errorf("read %s: %q is no namespace", path, link)
		}
		if slices.Contains(s.tasksNetns, ino) {
			continue
		}
		ns, err := openNetns(path)
		if err != nil {
			if gone(err) {
				continue
			}
			return err
		}
		s.tasksNetns = append(s.tasksNetns, ns.inode)
		if err := s.addNetns(ns); err != nil {
			return err
		}
	}
	return nil
}

// addNetns takes ownership of ns.
func (s *scan) addNetns(ns netns) error {
	if _, ok := s.spaces[ns.inode]; ok {
		return ns.Close()
	}
	s.spaces[ns.inode] = ns
	d, err := dialDiag(ns)
	if err != nil {
		return err
	}
	s.diags[ns.inode] = d
	return nil
}

// snapshot asks sock_diag, after the fd tables: what is in them then exists.
func (s *scan) snapshot() (*Snapshot, error) {
	for _, d := range s.diags {
		all, err := d.all()
		if err != nil {
			return nil, err
		}
		for _, sk := range all {
			s.add(sk)
		}
	}
	if err := s.findMissing(); err != nil {
		return nil, err
	}
	out := &Snapshot{Processes: map[int]Process{}, Netns: slices.Compact(slices.Sorted(slices.Values(s.tasksNetns)))}
	for ino, holders := range s.holders {
		sk, ok := s.sockets[ino]
		if !ok {
			continue
		}
		c, ok, err := s.connection(sk, holders)
		if err != nil {
			return nil, err
		}
		if ok {
			out.Connections = append(out.Connections, c)
		}
	}
	slices.SortFunc(out.Connections, func(a, b Connection) int {
		return cmp.Or(cmp.Compare(a.Holders[0].PID, b.Holders[0].PID), cmp.Compare(a.Holders[0].FD, b.Holders[0].FD),
			cmp.Compare(a.Inode, b.Inode))
	})
	s.addWaiters(out.Connections)
	s.addElsewhere(out.Connections)
	out.Pending = s.pending()
	for _, c := range out.Connections {
		for _, h := range c.Holders {
			if _, ok := out.Processes[h.PID]; ok {
				continue
			}
			p, err := ReadProcess(h.PID)
			if err != nil && !gone(err) {
				return nil, err
			}
			p.PID = h.PID
			out.Processes[h.PID] = p
		}
	}
	addMapped(out.Processes)
	return out, nil
}

func (s *scan) add(sk diagSocket) {
	s.sockets[sk.inode] = sk
	for _, icon := range sk.icons {
		s.waiting[icon] = sk.inode
	}
}

// findMissing looks for unix sockets that a task holds and no dump showed:
// sockets of a namespace no task is in any more, and those the kernel skipped.
func (s *scan) findMissing() error {
	for ino, holders := range s.holders {
		if _, ok := s.sockets[ino]; ok {
			continue
		}
		f := s.open(ino, holders)
		if f == nil {
			continue
		}
		err := s.findOne(ino, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *scan) findOne(ino uint32, f *Socket) error {
	if !f.IsUnix() {
		return nil
	}
	ns, err := socketNetns(f)
	if err != nil {
		return err
	}
	id := ns.inode
	if err := s.addNetns(ns); err != nil {
		return err
	}
	sk, err := s.diags[id].one(ino)
	if err != nil || sk == nil {
		return err
	}
	s.add(*sk)
	if _, ok := s.sockets[sk.peer]; sk.peer != 0 && !ok {
		peer, err := s.diags[id].one(sk.peer)
		if err != nil {
			return err
		}
		if peer != nil {
			s.add(*peer)
		}
	}
	return nil
}

// open duplicates a socket from the first holder that still has it, or
// returns nil.
func (s *scan) open(ino uint32, holders []Holder) *Socket {
	for _, h := range holders {
		if f, err := duplicateSocket(h, ino); err == nil {
			return f
		}
	}
	return nil
}

// connection describes a socket, if it is a connection that leaves the tree.
func (s *scan) connection(sk diagSocket, holders []Holder) (Connection, bool, error) {
	if sk.state == Listening {
		return Connection{}, false, nil
	}
	listener, pending := s.waiting[sk.inode]
	switch {
	case sk.peer != 0:
		if !s.outside(holders[0], sk.peer) {
			return Connection{}, false, nil
		}
	case sk.typ == Dgram, sk.state != Established, sk.shutdown == shutdownBoth && !pending:
		// not connected, or the peer has gone: CRIU can dump it as it is
		return Connection{}, false, nil
	case pending && !s.outside(holders[0], listener):
		return Connection{}, false, nil
	}

	c := Connection{
		Inode: sk.inode, Type: sk.typ, State: sk.state, Name: sk.name, Netns: sk.netns,
		RecvQueue: sk.rqueue, SendQueue: sk.wqueue, Shutdown: sk.shutdown,
		Unaccepted: sk.typ != Dgram && sk.peer == 0,
		Peer:       Peer{Inode: sk.peer, UID: -1},
	}
	other, visible := s.sockets[sk.peer]
	if sk.peer == 0 {
		other, visible = s.sockets[listener]
	}
	if visible {
		c.Peer.Name, c.Peer.VFS = other.name, other.vfs
	}

	if c.Type == Dgram && visible {
		c.Peer.UID = other.uid
	}
	// Without a duplicate (gone, or a kernel without pidfd_getfd for threads)
	// the peer's owner stays unknown.
	if f := s.open(sk.inode, holders); f != nil {
		describePeer(f, &c)
		f.Close()
	}
	c.Direction = s.direction(sk, c.Peer)
	// Not accepted: the listener is all that somebody holds.
	if !s.findOwner(&c.Peer, cmp.Or(sk.peer, listener)) {
		s.unowned[c.Inode] = true
	}

	slices.SortFunc(holders, byHolder)
	for _, h := range holders {
		flags, err := readFdFlags(h.PID, h.TID, h.FD)
		if err != nil {
			if gone(err) {
				continue
			}
			return Connection{}, false, fmt.Errorf("read flags of fd %d of process %d: %w", h.FD, h.PID, err)
		}
		h.Cloexec = flags&unix.O_CLOEXEC != 0
		c.Flags = flags &^ unix.O_CLOEXEC
		c.Holders = append(c.Holders, h)
	}
	return c, len(c.Holders) > 0, nil
}

// describePeer asks the socket itself.
func describePeer(f *Socket, c *Connection) {
	if name, err := peerName(f); err == nil && name != "" {
		c.Peer.Name = name
	}
	if c.Type == Dgram {
		return // SO_PEERCRED is for connections (unix(7))
	}
	if cred, err := unix.GetsockoptUcred(f.fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
		c.Peer.UID, c.Peer.PID = int64(cred.Uid), int(cred.Pid)
	}
}

// direction tells who called connect(). The accepted half takes over the
// listener's name, so one name is enough of a sign; if both have one, the one
// that somebody listens on decides.
func (s *scan) direction(sk diagSocket, peer Peer) Direction {
	switch {
	case sk.name == "":
		return Outbound
	case peer.Name == "":
		return Inbound
	case sk.typ == Dgram:
		return Outbound
	}
	for _, l := range s.sockets {
		if l.state == Listening && l.name == sk.name && (sk.vfs == VFS{} || l.vfs == sk.vfs) {
			return Inbound
		}
	}
	return Outbound
}

// findOwner fills in who holds the peer's half, or its listener. SO_PEERCRED
// names who called listen(): under socket activation that is somebody else,
// and after its end the pid may be anybody's.
func (s *scan) findOwner(p *Peer, inode uint32) (found bool) {
	s.readOwners(p.PID)
	if _, ok := s.owners[inode]; !ok && inode != 0 {
		s.readAllOwners()
	}
	pid, ok := s.owners[inode]
	if ok {
		p.PID, p.Exe = pid, readExe(pid)
	}
	return ok
}

// readOwners reads which sockets a process holds, once a scan.
func (s *scan) readOwners(pid int) {
	if pid <= 0 || s.owned[pid] {
		return
	}
	s.owned[pid] = true
	t, err := readFDTable(pid, pid)
	if err != nil {
		return // gone, or not ours to see
	}
	for _, ino := range t.sockets {
		if _, ok := s.owners[ino]; !ok {
			s.owners[ino] = pid
		}
	}
}

func (s *scan) readAllOwners() {
	if s.owned[allProcesses] {
		return
	}
	s.owned[allProcesses] = true
	pids, _ := numbers("/proc")
	for _, pid := range pids {
		s.readOwners(pid)
	}
}

// addWaiters finds the threads that are blocked on a connection.
func (s *scan) addWaiters(conns []Connection) {
	byInode := make(map[uint32]*Connection, len(conns))
	targets := make(map[uint32]bool, len(conns))
	for i := range conns {
		byInode[conns[i].Inode] = &conns[i]
		targets[conns[i].Inode] = true
	}
	for _, t := range s.tables {
		table := newWaitTable(t, targets)
		if table == nil {
			continue
		}
		tids := s.tids[t.pid]
		if t.tid != t.pid {
			tids = []int{t.tid}
		}
		for _, tid := range tids {
			for ino, w := range table.waits(tid, s.calls[tid]) {
				c := byInode[ino]
				c.Waiters = append(c.Waiters, w)
			}
		}
	}
}
