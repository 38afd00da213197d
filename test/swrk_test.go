// SPDX-License-Identifier: Apache-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// TestSwrkAlike: what fails, or is none of our business, is answered as the real
// "criu swrk" answers it: type, errno, message, end of the connection, exit status.
func TestSwrkAlike(t *testing.T) {
	need(t)
	const nobody = 1<<22 - 7
	req := func(kind rpc.CriuReqType, opts *rpc.CriuOpts) *rpc.CriuReq {
		return &rpc.CriuReq{Type: &kind, Opts: opts}
	}
	kept := func(kind rpc.CriuReqType, opts *rpc.CriuOpts) *rpc.CriuReq {
		r := req(kind, opts)
		r.KeepOpen = proto.Bool(true)
		return r
	}
	in := func(t *testing.T, also ...func(*rpc.CriuOpts)) *rpc.CriuOpts {
		o := &rpc.CriuOpts{ImagesDirFd: opened(t, images(t)), Pid: proto.Int32(nobody)}
		for _, f := range also {
			f(o)
		}
		return o
	}
	one := func(r *rpc.CriuReq) []*rpc.CriuReq { return []*rpc.CriuReq{r} }
	features := &rpc.CriuReq{Type: rpc.CriuReqType_FEATURE_CHECK.Enum(), Features: &rpc.CriuFeatures{MemTrack: proto.Bool(true)}}
	featuresKept := proto.CloneOf(features)
	featuresKept.KeepOpen = proto.Bool(true)
	strange := rpc.CriuReqType(99)
	for name, requests := range map[string]func(t *testing.T) []*rpc.CriuReq{
		"nothing": func(*testing.T) []*rpc.CriuReq { return nil },
		"version": func(*testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_VERSION, nil)) },
		"versions": func(*testing.T) []*rpc.CriuReq {
			return []*rpc.CriuReq{kept(rpc.CriuReqType_VERSION, nil), featuresKept, kept(rpc.CriuReqType_VERSION, nil)}
		},
		"features":  func(*testing.T) []*rpc.CriuReq { return one(features) },
		"unknown":   func(*testing.T) []*rpc.CriuReq { return one(req(strange, nil)) },
		"empty":     func(*testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_EMPTY, nil)) },
		"an answer": func(*testing.T) []*rpc.CriuReq { return one(agree("")) },
		"wait": func(*testing.T) []*rpc.CriuReq {
			return one(&rpc.CriuReq{Type: rpc.CriuReqType_WAIT_PID.Enum(), Pid: proto.Uint32(nobody)})
		},
		"dump, nobody":  func(t *testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_DUMP, in(t))) },
		"dump, no opts": func(*testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_DUMP, nil)) },
		"dump, no directory": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.ImagesDirFd = proto.Int32(-1) })))
		},
		"dump, a required field is missing": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.ImagesDirFd = nil })))
		},
		"dump, directory not open": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.ImagesDirFd = proto.Int32(9999) })))
		},
		"dump, work directory not open": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.WorkDirFd = proto.Int32(9999) })))
		},
		"dump, status fd not open": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.StatusFd = proto.Int32(9999) })))
		},
		"dump, log with a slash": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_DUMP, in(t, func(o *rpc.CriuOpts) { o.LogFile = proto.String("a/b") })))
		},
		"dump, kept open": func(t *testing.T) []*rpc.CriuReq { return one(kept(rpc.CriuReqType_DUMP, in(t))) },
		"version and dump": func(t *testing.T) []*rpc.CriuReq {
			return []*rpc.CriuReq{kept(rpc.CriuReqType_VERSION, nil), req(rpc.CriuReqType_DUMP, in(t))}
		},
		"version and strange": func(t *testing.T) []*rpc.CriuReq {
			return []*rpc.CriuReq{kept(rpc.CriuReqType_VERSION, nil), req(strange, nil)}
		},
		"pre-dump, nobody":        func(t *testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_PRE_DUMP, in(t))) },
		"single pre-dump, nobody": func(t *testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_SINGLE_PRE_DUMP, in(t))) },
		"restore, no images":      func(t *testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_RESTORE, in(t))) },
		"restore, no opts":        func(*testing.T) []*rpc.CriuReq { return one(req(rpc.CriuReqType_RESTORE, nil)) },
		"restore, not open": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_RESTORE, &rpc.CriuOpts{ImagesDirFd: proto.Int32(9999)}))
		},
		"restore, bad inherit_fd": func(t *testing.T) []*rpc.CriuReq {
			return one(req(rpc.CriuReqType_RESTORE, in(t, func(o *rpc.CriuOpts) {
				o.InheritFd = []*rpc.InheritFd{{Key: proto.String("x"), Fd: proto.Int32(77)}}
			})))
		},
		"cpuinfo": func(t *testing.T) []*rpc.CriuReq { return one(kept(rpc.CriuReqType_CPUINFO_CHECK, in(t))) },
	} {
		t.Run(name, func(t *testing.T) {
			said := func(w way) (lines []string) {
				c := clientOf(t, w)
				for _, r := range requests(t) {
					resp, stages := c.ask(r, agree)
					lines = append(lines, append(stages, alike(resp))...)
				}
				if requests(t) != nil && !requests(t)[0].GetKeepOpen() {
					lines = append(lines, alike(c.receive()))
				}
				return append(lines, c.end())
			}
			want, got := said(byStock), said(bySwrk)
			if !slices.Equal(got, want) {
				t.Errorf("ours:\n%s\nCRIU's own:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			nothingLeft(t)
			noCRIULeft(t)
		})
	}
	t.Run("garbage", func(t *testing.T) {
		for _, b := range [][]byte{{0xff}, []byte("GET / HTTP/1.1\r\n"), make([]byte, 100_000)} {
			said := func(w way) string {
				c := clientOf(t, w)
				c.sendBytes(b)
				return alike(c.receive()) + c.end()
			}
			if want, got := said(byStock), said(bySwrk); got != want {
				t.Errorf("%.20q: ours %s, CRIU's own %s", b, got, want)
			}
		}
		nothingLeft(t)
	})
}

// TestSwrkNotifications: they come exactly if they are asked for, and in the order
// in which the real CRIU sends them.
func TestSwrkNotifications(t *testing.T) {
	need(t)
	cycle := func(t *testing.T, w way, notify bool, connect bool) (stages []string) {
		a := startApp(t, root, nil)
		if connect {
			_, path := daemon(t, "unix", "reconnect")
			a.connect(t, "c", path)
			a.Request(t, "c")
		}
		dir := images(t)
		req := a.dumpRequest(t, dir)
		req.Opts.NotifyScripts = &notify
		resp, got := clientOf(t, w).ask(req, agree)
		succeeded(t, resp, logOf(dir, "dump.log"))
		a.Gone(t)
		req = restoreRequest(t, dir)
		req.Opts.NotifyScripts = &notify
		resp, more := clientOf(t, w).ask(req, agree)
		succeeded(t, resp, logOf(dir, "restore.log"))
		if int(resp.GetRestore().GetPid()) != a.PID {
			t.Errorf("process %d was restored, expected %d", resp.GetRestore().GetPid(), a.PID)
		}
		if connect {
			a.Request(t, "c")
		}
		a.Kill(t)
		return slices.Concat(got, []string{"-"}, more)
	}
	want := cycle(t, byStock, true, false)
	if len(want) < 8 {
		t.Fatalf("stock CRIU sends only %q", want)
	}
	for _, c := range []struct {
		notify, connect bool
		want            []string
	}{
		{true, false, want}, {true, true, want}, {false, true, []string{"-"}}, {false, false, []string{"-"}},
	} {
		t.Run(fmt.Sprintf("notify %v, connection %v", c.notify, c.connect), func(t *testing.T) {
			if got := cycle(t, bySwrk, c.notify, c.connect); !slices.Equal(got, c.want) {
				t.Errorf("the client was told of %q, expected %q", got, c.want)
			}
			nothingLeft(t)
		})
	}
}

// TestSwrkClientDecides: what the client answers counts beside what we say, and a
// no of either is one.
func TestSwrkClientDecides(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	before := a.Details(t, "c")
	for _, at := range []string{"pre-dump", "query-ext-files", "post-dump"} {
		dir := images(t)
		req := a.dumpRequest(t, dir)
		req.Opts.NotifyScripts = proto.Bool(true)
		resp, stages := clientOf(t, bySwrk).ask(req, func(stage string) *rpc.CriuReq {
			r := agree(stage)
			r.NotifySuccess = proto.Bool(stage != at)
			return r
		})
		if resp == nil || resp.GetSuccess() || !slices.Contains(stages, at) {
			t.Errorf("the client said no to %s, of %q: CRIU answered %v", at, stages, resp)
		}
		if _, err := os.Stat(filepath.Join(dir, "criuhook.img")); err == nil {
			t.Errorf("the client said no to %s, and there is a record", at)
		}
		a.untouched(t, srv, "c", before)
	}
	dir := images(t)
	req := a.dumpRequest(t, dir)
	req.Opts.NotifyScripts = proto.Bool(true)
	settled := false
	resp, _ := clientOf(t, bySwrk).ask(req, func(stage string) *rpc.CriuReq {
		r := agree(stage)
		switch stage {
		case "query-ext-files":
			r.Opts = &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), External: []string{"dev[1/2]:mine"}}
		case "post-dump":
			_, err := os.Stat(filepath.Join(dir, "criuhook.img"))
			settled = err == nil
		}
		return r
	})
	log := logOf(dir, "dump.log")
	succeeded(t, resp, log)
	for _, key := range []string{"dev[1/2]:mine", fmt.Sprintf("unix[%d]", before.Inode)} {
		if !strings.Contains(log, "Adding external object: "+key) {
			t.Errorf("CRIU was not told of %s", key)
		}
	}
	if !settled {
		t.Error("the client did not find the images finished at post-dump")
	}
	a.Dumped(t, dir)
	nothingLeft(t)
}

// TestSwrkSeveralRequests on one connection: CRIU asked about itself, pre-dumps
// into directories that were opened one after the other, with a pidfd store,
// and the dump.
func TestSwrkSeveralRequests(t *testing.T) {
	need(t)
	srv, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	parent := images(t)
	c := clientOf(t, bySwrk)
	version := &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum(), KeepOpen: proto.Bool(true)}
	if resp, _ := c.ask(version, agree); resp.GetVersion().GetMajorNumber() == 0 {
		t.Fatalf("the version is %v", resp)
	}
	store, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(store)
	var last string
	first := 1
	if exec.Command("criu", "check", "--feature", "mem_dirty_track").Run() != nil {
		t.Log("this kernel does not tell which memory was written to: no pre-dumps")
		first = 3
	}
	for i := first; i <= 3; i++ {
		dir := filepath.Join(parent, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		req := a.dumpRequest(t, dir)
		req.Opts.TrackMem, req.Opts.PidfdStoreSk = proto.Bool(first == 1), proto.Int32(int32(store))
		if last != "" {
			req.Opts.ParentImg = proto.String(filepath.Join("..", last))
		}
		if i < 3 {
			req.Type = rpc.CriuReqType_PRE_DUMP.Enum()
		}
		last = fmt.Sprint(i)
		resp, _ := c.ask(req, agree)
		succeeded(t, resp, logOf(dir, "dump.log"))
		if _, err := os.Lstat(filepath.Join(dir, "parent")); (err == nil) != (i > first) {
			t.Errorf("images %d: parent: %v", i, err)
		}
	}
	if how := c.end(); how != "exit status 0" {
		t.Errorf("CRIU ended with %s", how)
	}
	a.Gone(t)
	dir := filepath.Join(parent, last)
	wantRecorded(t, dir, 1)
	// And a restore after a question: the daemon sees the process itself.
	c = clientOf(t, bySwrk)
	c.ask(version, agree)
	req := restoreRequest(t, dir)
	resp, _ := c.ask(req, agree)
	succeeded(t, resp, logOf(dir, "restore.log"))
	a.Request(t, "c")
	clients := srv.Clients()
	if got := int(clients[len(clients)-1].PID); got != a.PID {
		t.Errorf("the daemon sees process %d, expected %d", got, a.PID)
	}
	c.end()
	nothingLeft(t)
}

// TestSwrkDescriptors: what a request names by number is found: a work directory,
// a status fd, inherit_fd and the socket of a page server; and a restored tree is
// the child of CRIU's caller.
func TestSwrkDescriptors(t *testing.T) {
	need(t)
	_, path := daemon(t, "unix", "reconnect")
	a := startApp(t, root, nil)
	a.connect(t, "c", path)
	a.Request(t, "c")
	dir, work, pages := images(t), images(t), images(t)

	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	here, there := os.NewFile(uintptr(pair[0]), "here"), os.NewFile(uintptr(pair[1]), "there")
	server := stock("page-server", "-D", pages, "--ps-socket", "3", "-v4", "-o", "server.log")
	cmd := server.as(t.Context(), root)
	cmd.ExtraFiles = append(cmd.ExtraFiles, there)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	there.Close()
	status, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	c := clientOf(t, bySwrk, here)
	here.Close()
	req := a.dumpRequest(t, dir)
	req.Opts.WorkDirFd, req.Opts.StatusFd = opened(t, work), proto.Int32(int32(status.Fd()))
	req.Opts.Ps = &rpc.CriuPageServerInfo{Fd: proto.Int32(4)}
	resp, _ := c.ask(req, agree)
	succeeded(t, resp, logOf(work, "dump.log")+logOf(pages, "server.log"))
	c.end()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the page server: %v\n%s", err, logOf(pages, "server.log"))
	}
	a.Gone(t)
	moved, err := filepath.Glob(filepath.Join(pages, "page*.img"))
	if err != nil || len(moved) == 0 {
		t.Fatalf("the page server has got no pages: %v", err)
	}
	for _, from := range moved {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(from)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Its stdin, /dev/null, is inherited under a number that a socket of ours would
	// get: 4 is free in CRIU, and is named.
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	c = clientOf(t, bySwrk, null)
	null.Close()
	req = restoreRequest(t, dir)
	req.Opts.WorkDirFd, req.Opts.RstSibling = opened(t, work), proto.Bool(true)
	req.Opts.InheritFd = []*rpc.InheritFd{{Key: proto.String("not/in/the/images"), Fd: proto.Int32(4)}}
	resp, _ = c.ask(req, agree)
	succeeded(t, resp, logOf(work, "restore.log"))
	c.end()
	a.Request(t, "c")
	if got := ppidOf(a.PID); got != os.Getpid() {
		t.Errorf("the parent of the restored process is %d, expected %d", got, os.Getpid())
	}
	_ = unix.Kill(a.PID, unix.SIGKILL)
	_, _ = unix.Wait4(a.PID, nil, 0, nil)
	nothingLeft(t)
}

func ppidOf(pid int) (ppid int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	_, _ = fmt.Sscan(f[1], &ppid)
	return ppid
}
