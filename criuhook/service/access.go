// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Policy says who may have what done. The zero value lets root in alone.
type Policy struct {
	UIDs, GIDs []uint32 // besides root, for their own processes
}

// Admit tells whether a client may ask for anything at all.
func (p Policy) Admit(c *Client) error {
	switch {
	case c.UID == 0, slices.Contains(p.UIDs, c.UID), slices.Contains(p.GIDs, c.GID):
		return nil
	case slices.ContainsFunc(c.Groups, func(g uint32) bool { return slices.Contains(p.GIDs, g) }):
		return nil
	}
	return refuse(unix.EPERM, "uid %d, gid %d may not use this service: root may, and the uids and gids of the section \"service\" in the configuration", c.UID, c.GID)
}

// othersMay are the requests of clients other than root.
//
// A restore is not among them. What is restored is what the images say: ids,
// capabilities, files opened by name, and in criuhook.img who connects where; and
// the images are the client's to change, also while they are read. The kernel
// would bound what CRIU can do as the client, but not what is connected on the
// client's behalf, and the restored processes could keep CRIU's
// CAP_CHECKPOINT_RESTORE.
var othersMay = []rpc.CriuReqType{
	rpc.CriuReqType_DUMP, rpc.CriuReqType_PRE_DUMP, rpc.CriuReqType_SINGLE_PRE_DUMP,
	rpc.CriuReqType_VERSION, rpc.CriuReqType_FEATURE_CHECK,
}

// othersOptions are the options that clients other than root may set, by their
// names in CRIU's rpc.proto. What is not here has CRIU run a program, read
// configuration, act on namespaces, cgroups or mounts, or name files by path.
var othersOptions = []protoreflect.Name{
	"images_dir_fd", "work_dir_fd", "pid", "parent_img", "log_file", "log_level",
	"leave_running", "leave_stopped", "notify_scripts", "timeout", "display_stats",
	"ext_unix_sk", "tcp_established", "tcp_close", "tcp_skip_in_flight", "shell_job", "file_locks",
	"evasive_devices", "track_mem", "auto_dedup", "pre_dump_mode", "ghost_limit", "cpu_cap",
	"skip_file_rwx_check", "unprivileged", "ps",
}

// Allow tells whether a client that was admitted may make a request.
func (p Policy) Allow(c *Client, req *rpc.CriuReq) error {
	if c.UID == 0 {
		return nil
	}
	kind := req.GetType()
	switch {
	case kind == rpc.CriuReqType_RESTORE:
		return refuse(unix.EPERM, "uid %d may not restore: images that others than root can change decide what rights a restored process has; have root restore them", c.UID)
	case !slices.Contains(othersMay, kind):
		return refuse(unix.EPERM, "uid %d may not make the request %s: only root may", c.UID, kind)
	}
	if err := known(req.ProtoReflect(), "the request"); err != nil {
		return err
	}
	opts := req.GetOpts()
	if opts == nil {
		opts = &rpc.CriuOpts{}
	}
	if err := known(opts.ProtoReflect(), "its options"); err != nil {
		return err
	}
	var bad []string
	opts.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(othersOptions, f.Name()) {
			bad = append(bad, string(f.Name()))
		}
		return true
	})
	if len(bad) > 0 {
		slices.Sort(bad)
		return refuse(unix.EPERM, "uid %d may not set the option %s: only root may", c.UID, strings.Join(bad, ", "))
	}
	if kind == rpc.CriuReqType_VERSION || kind == rpc.CriuReqType_FEATURE_CHECK {
		return nil
	}
	if opts.GetImagesDirFd() < 0 {
		return refuse(unix.EPERM, "uid %d has to give images_dir_fd, an open directory", c.UID)
	}
	if strings.ContainsRune(opts.GetLogFile(), '/') || opts.GetLogFile() == "." || opts.GetLogFile() == ".." {
		return refuse(unix.EINVAL, "log_file %q has to be a plain name", opts.GetLogFile())
	}
	if opts.Unprivileged != nil && !opts.GetUnprivileged() {
		return refuse(unix.EINVAL, "uid %d has CRIU work in its mode --unprivileged alone: leave the option unprivileged out", c.UID)
	}
	pid := c.PID
	if opts.Pid != nil {
		pid = int(opts.GetPid())
	}
	return owns(c, pid)
}

// known refuses fields that an older criuhook than CRIU cannot judge.
func known(m protoreflect.Message, what string) error {
	if len(m.GetUnknown()) > 0 {
		return refuse(unix.EPERM, "%s has fields that are not known here: only root may send those", what)
	}
	var err error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Kind() == protoreflect.MessageKind && !f.IsList() && f.Name() != "opts" {
			err = known(v.Message(), string(f.Name()))
		}
		return err == nil
	})
	return err
}

// kindOf is what a request is called in the log.
func kindOf(req *rpc.CriuReq) string {
	opts := req.GetOpts()
	if opts != nil && opts.Pid != nil {
		return fmt.Sprintf("%s of process %d", req.GetType(), opts.GetPid())
	}
	return req.GetType().String()
}
