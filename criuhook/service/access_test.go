// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"criuhook/criuhook/service"
)

func TestAdmit(t *testing.T) {
	p := service.Policy{UIDs: []uint32{1000}, GIDs: []uint32{2000}}
	for _, tt := range []struct {
		name   string
		client service.Client
		ok     bool
	}{
		{"root", service.Client{}, true},
		{"a named user", service.Client{UID: 1000, GID: 1}, true},
		{"a named group", service.Client{UID: 1, GID: 2000}, true},
		{"a named supplementary group", service.Client{UID: 1, GID: 1, Groups: []uint32{7, 2000}}, true},
		{"anybody else", service.Client{UID: 1001, GID: 1001, Groups: []uint32{1000}}, false},
		{"a uid that is a named gid", service.Client{UID: 2000, GID: 1}, false},
		{"a gid that is a named uid", service.Client{UID: 1, GID: 1000}, false},
		{"root's group", service.Client{UID: 1, GID: 0, Groups: []uint32{0}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := p.Admit(&tt.client)
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, unix.EPERM) {
				t.Errorf("%v", err)
			}
		})
	}
	if (service.Policy{}).Admit(&service.Client{UID: 1}) == nil {
		t.Error("without configuration others than root are let in")
	}
}

// me is this process as a client that is not root's, whatever it runs as.
func me() *service.Client {
	return &service.Client{PID: os.Getpid(), UID: 4242, GID: 4242}
}

func request(kind rpc.CriuReqType, opts *rpc.CriuOpts) *rpc.CriuReq {
	if opts != nil && opts.ImagesDirFd == nil {
		opts.ImagesDirFd = proto.Int32(3)
	}
	return &rpc.CriuReq{Type: kind.Enum(), Opts: opts}
}

func TestAllow(t *testing.T) {
	const dump, restore = rpc.CriuReqType_DUMP, rpc.CriuReqType_RESTORE
	root := &service.Client{PID: os.Getpid()}
	for _, tt := range []struct {
		name   string
		client *service.Client
		req    *rpc.CriuReq
		errno  error  // nil: it may
		want   string // in the reason
	}{
		{"root dumps", root, request(dump, &rpc.CriuOpts{Pid: proto.Int32(1)}), nil, ""},
		{"root restores", root, request(restore, &rpc.CriuOpts{Root: proto.String("/"), ExecCmd: []string{"true"}}), nil, ""},
		{"a version", me(), request(rpc.CriuReqType_VERSION, nil), nil, ""},
		{"features", me(), request(rpc.CriuReqType_FEATURE_CHECK, nil), nil, ""},
		{"a restore", me(), request(restore, &rpc.CriuOpts{}), unix.EPERM, "may not restore"},
		{"a page server", me(), request(rpc.CriuReqType_PAGE_SERVER, &rpc.CriuOpts{}), unix.EPERM, "PAGE_SERVER"},
		{"waiting", me(), &rpc.CriuReq{Type: rpc.CriuReqType_WAIT_PID.Enum(), Pid: proto.Uint32(1)}, unix.EPERM, "WAIT_PID"},
		{"an answer", me(), request(rpc.CriuReqType_NOTIFY, nil), unix.EPERM, "NOTIFY"},
		{"nothing", me(), &rpc.CriuReq{}, unix.EPERM, "EMPTY"},
		{"somebody else's process", me(), request(dump, &rpc.CriuOpts{Pid: proto.Int32(1)}), unix.EPERM, "process 1"},
		{"no such process", me(), request(dump, &rpc.CriuOpts{Pid: proto.Int32(1<<22 + 1)}), unix.ESRCH, "process 4194305"},
		{"a pid that is none", me(), request(dump, &rpc.CriuOpts{Pid: proto.Int32(-1)}), unix.ESRCH, "process -1"},
		{"oneself with other ids", me(), request(dump, &rpc.CriuOpts{}), unix.EPERM, "of its tree"},
		{"a directory by name", me(), request(dump, &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), ImagesDir: proto.String("/tmp")}), unix.EPERM, "images_dir"},
		{"no directory", me(), request(dump, &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1)}), unix.EPERM, "images_dir_fd"},
		{"a log elsewhere", me(), request(dump, &rpc.CriuOpts{LogFile: proto.String("../log")}), unix.EINVAL, "plain name"},
		{"a CRIU that thinks it is root's", me(), request(dump, &rpc.CriuOpts{Unprivileged: proto.Bool(false)}), unix.EINVAL, "--unprivileged"},
		{"configuration", me(), request(dump, &rpc.CriuOpts{ConfigFile: proto.String("/tmp/x")}), unix.EPERM, "config_file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := service.Policy{}.Allow(tt.client, tt.req)
			if tt.errno == nil && err == nil {
				return
			}
			if !errors.Is(err, tt.errno) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// judged are the options that have been looked at. What a newer CRIU brings has
// to be, too.
var judged = map[protoreflect.Name]bool{ // true: others than root may set it
	"images_dir_fd": true, "work_dir_fd": true, "pid": true, "parent_img": true, "log_file": true, "log_level": true,
	"leave_running": true, "leave_stopped": true, "notify_scripts": true, "timeout": true, "display_stats": true,
	"ext_unix_sk": true, "tcp_established": true, "tcp_close": true, "tcp_skip_in_flight": true, "shell_job": true,
	"file_locks": true, "evasive_devices": true, "track_mem": true, "auto_dedup": true, "pre_dump_mode": true,
	"ghost_limit": true, "cpu_cap": true, "skip_file_rwx_check": true, "unprivileged": true, "ps": true,

	"images_dir": false, "root": false, "link_remap": false, "veths": false, "force_irmap": false, "exec_cmd": false,
	"ext_mnt": false, "manage_cgroups": false, "cg_root": false, "rst_sibling": false, "inherit_fd": false,
	"auto_ext_mnt": false, "ext_sharing": false, "ext_masters": false, "skip_mnt": false, "enable_fs": false,
	"unix_sk_ino": false, "manage_cgroups_mode": false, "irmap_scan_paths": false, "external": false, "empty_ns": false,
	"join_ns": false, "cgroup_props": false, "cgroup_props_file": false, "cgroup_dump_controller": false,
	"freeze_cgroup": false, "weak_sysctls": false, "lazy_pages": false, "status_fd": false, "orphan_pts_master": false,
	"config_file": false, "lsm_profile": false, "tls_cacert": false, "tls_cacrl": false, "tls_cert": false,
	"tls_key": false, "tls": false, "tls_no_cn_verify": false, "cgroup_yard": false, "pidfd_store_sk": false,
	"lsm_mount_context": false, "network_lock": false, "mntns_compat_mode": false, "log_to_stderr": false,
}

// TestOptionsOfOthers sets each option that CRIU's protocol has.
func TestOptionsOfOthers(t *testing.T) {
	fields := (&rpc.CriuOpts{}).ProtoReflect().Descriptor().Fields()
	var names []string
	for i := range fields.Len() {
		f := fields.Get(i)
		names = append(names, string(f.Name()))
		want, ok := judged[f.Name()]
		if !ok {
			t.Errorf("the option %s is new: may others than root set it?", f.Name())
			continue
		}
		opts := &rpc.CriuOpts{Pid: proto.Int32(1 << 23)} // there is no such process: the last that is looked at
		m := opts.ProtoReflect()
		switch v := m.NewField(f); {
		case f.IsList():
			if f.Kind() == protoreflect.MessageKind {
				v.List().Append(v.List().NewElement())
			} else {
				v.List().Append(protoreflect.ValueOfString("x"))
			}
			m.Set(f, v)
		case f.Kind() == protoreflect.MessageKind:
			m.Set(f, v)
		case f.Name() != "pid":
			m.Set(f, f.Default())
		}
		err := service.Policy{}.Allow(me(), request(rpc.CriuReqType_DUMP, opts))
		if got := !errors.Is(err, unix.EPERM); got != want && f.Name() != "images_dir_fd" {
			t.Errorf("%s: %v", f.Name(), err)
		}
	}
	for name := range judged {
		if !slices.Contains(names, string(name)) {
			t.Errorf("CRIU has no option %s", name)
		}
	}
}

// TestUnknownFields: what this program does not know, it cannot judge.
func TestUnknownFields(t *testing.T) {
	field := []byte{0xf8, 0x3f, 1} // number 1023, varint 1
	for name, change := range map[string]func(*rpc.CriuReq){
		"request": func(r *rpc.CriuReq) { r.ProtoReflect().SetUnknown(field) },
		"options": func(r *rpc.CriuReq) { r.Opts.ProtoReflect().SetUnknown(field) },
		"page server": func(r *rpc.CriuReq) {
			r.Opts.Ps = &rpc.CriuPageServerInfo{}
			r.Opts.Ps.ProtoReflect().SetUnknown(field)
		},
	} {
		req := request(rpc.CriuReqType_DUMP, &rpc.CriuOpts{Pid: proto.Int32(1 << 23)})
		change(req)
		if err := (service.Policy{}).Allow(me(), req); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "not known") {
			t.Errorf("%s: %v", name, err)
		}
		if err := (service.Policy{}).Allow(&service.Client{}, req); err != nil {
			t.Errorf("%s, of root: %v", name, err)
		}
	}
}

// asNobody runs the test in a process of a user's, if this one is root's.
func asNobody(t *testing.T) (done bool) {
	t.Helper()
	const nobody = 65534
	if os.Getuid() != 0 {
		return false
	}
	tmp, err := os.MkdirTemp("", "service-")
	if err == nil {
		t.Cleanup(func() { os.RemoveAll(tmp) })
		err = os.Chown(tmp, nobody, nobody)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("as uid %d: %v\n%s", nobody, err, out)
	}
	return true
}

// TestOwns: a user's own process, as the user.
func TestOwns(t *testing.T) {
	if asNobody(t) {
		return
	}
	c := &service.Client{PID: os.Getpid(), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	if err := (service.Policy{}).Allow(c, request(rpc.CriuReqType_DUMP, &rpc.CriuOpts{})); err != nil {
		t.Error(err)
	}
}

// FuzzDecode: whatever a client sends is refused or understood, and what others
// than root get through holds nothing that they may not say.
func FuzzDecode(f *testing.F) {
	for _, req := range []*rpc.CriuReq{
		request(rpc.CriuReqType_DUMP, &rpc.CriuOpts{Pid: proto.Int32(1), LogFile: proto.String("log")}),
		request(rpc.CriuReqType_RESTORE, &rpc.CriuOpts{ExecCmd: []string{"sh"}}),
		request(rpc.CriuReqType_VERSION, nil),
		{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true), Opts: &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), External: []string{"unix[1]"}}},
	} {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := service.Decode(b)
		if err != nil {
			return
		}
		// No process: what is fuzzed looks at none.
		if opts := req.GetOpts(); opts != nil {
			opts.Pid = proto.Int32(-1)
		}
		err = service.Policy{}.Allow(&service.Client{UID: 1, GID: 1, PID: -1}, req)
		if err == nil {
			if k := req.GetType(); k != rpc.CriuReqType_VERSION && k != rpc.CriuReqType_FEATURE_CHECK {
				t.Errorf("%v gets through", req)
			}
			return
		}
		answer := service.Answer(req.GetType(), err)
		out, err := proto.Marshal(answer)
		if err != nil || answer.GetSuccess() || answer.GetCrErrno() == 0 || answer.GetCrErrmsg() == "" {
			t.Errorf("the answer %v: %v, %v", answer, out, err)
		}
	})
}
