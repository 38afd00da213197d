// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// dirs are the directories of a request, as we see them.
type dirs struct {
	images, work *os.File // nil: not known
	err          error    // why images is not
}

// path names a directory whatever becomes of its name.
func path(dir *os.File) string {
	fd, err := number(dir)
	if err != nil {
		fd = noSuchFD
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd)
}

// translate replaces the numbers of the client's descriptors by those of ours. A
// number that the client does not have becomes one that nobody has, so that
// CRIU says what it says to that.
func (x *exchange) translate(opts *rpc.CriuOpts) {
	if fd := opts.GetImagesDirFd(); fd != -1 {
		x.dirs.images, x.dirs.err = x.take(opts.ImagesDirFd, x.Peer.Open)
	} else if name := opts.GetImagesDir(); name != "" {
		x.dirs.err = x.files(func() (err error) {
			x.dirs.images, err = openPath(name)
			return err
		})
		if x.dirs.images != nil {
			x.open = append(x.open, x.dirs.images)
		}
	} else {
		x.dirs.err = errors.New("the request names no images directory")
	}
	x.dirs.work = x.dirs.images
	if opts.WorkDirFd != nil {
		x.dirs.work, _ = x.take(opts.WorkDirFd, x.Peer.Open)
	}
	if opts.StatusFd != nil {
		_, _ = x.take(opts.StatusFd, x.Peer.Open)
	}
	if opts.PidfdStoreSk != nil {
		_, _ = x.take(opts.PidfdStoreSk, x.Peer.Duplicate)
	}
	if x.InheritDirs {
		x.handDirs(opts)
	}
}

func openPath(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// take replaces the number of a descriptor of the client's.
func (x *exchange) take(fd *int32, open func(int) (*os.File, error)) (*os.File, error) {
	x.changed = true
	theirs := *fd
	*fd = noSuchFD
	var f *os.File
	err := x.files(func() (err error) {
		f, err = open(int(theirs))
		return err
	})
	if err != nil {
		return nil, err
	}
	x.open = append(x.open, f)
	n, err := number(f)
	if err != nil {
		return nil, err
	}
	*fd = int32(n)
	return f, nil
}

// handDirs makes CRIU inherit the directories: it may not look into this process.
// 4.1.1 takes images_dir only if that is a symbolic link, which these are.
func (x *exchange) handDirs(opts *rpc.CriuOpts) {
	if x.dirs.images != nil {
		x.job.Files = append(x.job.Files, x.dirs.images)
		opts.ImagesDirFd = proto.Int32(-1)
	}
	if opts.WorkDirFd != nil && x.dirs.work != nil { // else CRIU is to say that there is none
		x.job.WorkDir = len(x.job.Files)
		x.job.Files = append(x.job.Files, x.dirs.work)
		opts.WorkDirFd = nil
	}
	opts.StatusFd, opts.PidfdStoreSk = nil, nil
	x.changed = true
}

// named tells a CRIU that has inherited the directories their names there.
func (x *exchange) named() {
	if x.InheritDirs && x.dirs.images != nil && x.req.GetOpts() != nil {
		x.req.Opts.ImagesDir = proto.String(fmt.Sprintf("/proc/self/fd/%d", x.worker.FD(0)))
	}
}

// files makes a call that reads or writes in the client's directories.
func (s *session) files(do func() error) error {
	if s.Files != nil {
		return s.Files(do)
	}
	return do()
}

// attachLog finds CRIU's log, where our messages go (setup_logging_from_req in
// criu/cr-service.c). A configuration file may take it elsewhere.
func (x *exchange) attachLog() {
	opts := x.req.GetOpts()
	if x.CRIULog == nil || opts == nil {
		return
	}
	criu := x.worker.PID()
	name := opts.GetLogFile()
	switch {
	case name == "" && opts.GetLogToStderr():
		name = fmt.Sprintf("/proc/%d/fd/2", criu)
	case name == "":
		name = cmp.Or(x.LogFile, "criu.log") // DEFAULT_LOG_FILENAME
	}
	if !filepath.IsAbs(name) {
		name = fmt.Sprintf("/proc/%d/cwd/%s", criu, name) // which is its work directory by now
	}
	x.CRIULog.Attach(criu, name, true)
}
