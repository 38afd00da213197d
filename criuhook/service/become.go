// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// BecomeVerb is the hidden verb of this program that becomes a CRIU with the
// rights of a client.
//
// It is a program of its own because of what comes before: a child that has not yet
// executed a program has ours stand still until it has (CLONE_VFORK), all of our
// threads with the next garbage collection. With the client's uid it could be
// stopped by the client's SIGSTOP right then, and the service with it.
const BecomeVerb = "become"

// becomeOptions are its arguments for a client, up to CRIU's path.
func becomeOptions(c *Client) []string {
	args := []string{BecomeVerb, fmt.Sprintf("--uid=%d", c.UID), fmt.Sprintf("--gid=%d", c.GID)}
	for some := range slices.Chunk(c.Groups, 1000) { // an argument can have 128 KiB
		args = append(args, "--groups="+strings.Join(strings.Fields(strings.Trim(fmt.Sprint(some), "[]")), ","))
	}
	return append(args, "--")
}

// Become executes CRIU with the client's ids and groups, with
// CAP_CHECKPOINT_RESTORE as its only capability, and with no_new_privs: should
// CRIU's program be set-user-id or have file capabilities, it still becomes no
// more than that. The last of its arguments is the number of the RPC socket, where
// the request that comes is answered with the error if this fails.
func Become(c *Client, criu string, args, env []string) error {
	runtime.LockOSThread() // ends with the program
	err := c.become()
	if err == nil {
		err = syscall.Exec(criu, append([]string{criu}, args...), env)
	}
	err = fmt.Errorf("start %s as CRIU of uid %d, gid %d: %w", criu, c.UID, c.GID, err)
	if sock, e := strconv.Atoi(args[len(args)-1]); e == nil {
		answerOnce(sock, err)
	}
	return err
}

// become changes this thread alone: the others end when CRIU is executed.
func (c *Client) become() error {
	const capability = unix.CAP_CHECKPOINT_RESTORE
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	bit := uint32(1) << (capability % 32)
	caps[capability/32] = unix.CapUserData{Effective: bit, Permitted: bit, Inheritable: bit}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"setgroups", c.setGroups},
		{"setresgid", func() error { return setIDs(unix.SYS_SETRESGID, c.GID) }},
		{"keep capabilities", func() error { return unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0) }},
		{"setresuid", func() error { return setIDs(unix.SYS_SETRESUID, c.UID) }},
		{"capset", func() error { return unix.Capset(&header, &caps[0]) }},
		{"take CAP_CHECKPOINT_RESTORE along", func() error {
			return unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, capability, 0, 0)
		}},
		{"set no_new_privs", func() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

// setIDs sets real, effective and saved id. Raw: what package syscall has changes
// every thread.
func setIDs(call uintptr, id uint32) error {
	if _, _, e := unix.RawSyscall(call, uintptr(id), uintptr(id), uintptr(id)); e != 0 {
		return e
	}
	return nil
}

// answerOnce answers the request that is on its way, in the place of CRIU.
func answerOnce(sock int, why error) {
	b := make([]byte, 64<<10)
	n, err := unix.Read(sock, b)
	if err != nil || n <= 0 {
		return
	}
	req, _ := Decode(b[:n]) // nil has the type EMPTY
	if out, err := proto.Marshal(Answer(req.GetType(), why)); err == nil {
		_ = unix.Sendmsg(sock, out, nil, nil, unix.MSG_NOSIGNAL)
	}
}
