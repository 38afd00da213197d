// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// Job is what a dump and a restore have in common.
type Job struct {
	// CRIU is the path of the real CRIU, Arg0 the name it is called by
	// ("": the path).
	CRIU, Arg0 string
	// Options are those of CRIU's command line, as the user gave them.
	Options []string
	// Keep are descriptors of ours that the options name.
	Keep []int
	// ImagesDir is where the images are, WorkDir where CRIU writes its log
	// and the like; "": the same.
	ImagesDir, WorkDir string
	// LogFile is CRIU's log as its options name it, "": it is CRIU's stderr.
	// LogLevel is CRIU's verbosity.
	LogFile  string
	LogLevel int
	// Log gets our messages. CRIULog, if not nil, is a writer of that logger
	// which takes them to CRIU's log.
	Log     *logrus.Logger
	CRIULog *CRIULog
	Version string // ours, for the record
	// Stdout and Stderr are CRIU's, nil for ours. From a Stderr that is no file the
	// error of a CRIU takes its lines that has no log yet.
	Stdout, Stderr io.Writer
	// Apart keeps CRIU from signals of the terminal: the caller then ends the
	// context, and CRIU cleans up.
	Apart bool
}

// folders are the directories of a job, open, because CRIU is told their
// numbers.
type folders struct {
	images, work *os.File
}

func (j *Job) open() (folders, error) {
	images, err := os.OpenFile(j.ImagesDir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return folders{}, fmt.Errorf("open the images directory: %w", err)
	}
	f := folders{images, images}
	if j.WorkDir != "" {
		if f.work, err = os.OpenFile(j.WorkDir, os.O_RDONLY|syscall.O_DIRECTORY, 0); err != nil {
			images.Close()
			return folders{}, fmt.Errorf("open the work directory: %w", err)
		}
	}
	return f, nil
}

func (f folders) close() {
	f.images.Close()
	if f.work != f.images {
		f.work.Close()
	}
}

// imagesPath names the images directory whatever becomes of its name.
func (f folders) imagesPath() string { return fmt.Sprintf("/proc/self/fd/%d", f.images.Fd()) }

// request carries what differs between CRIU's command line and its RPC: the
// log level is always taken from the request, and without log_to_stderr a log
// gets a default name.
func (j *Job) request(kind rpc.CriuReqType, f folders) *rpc.CriuReq {
	opts := &rpc.CriuOpts{
		ImagesDirFd: proto.Int32(int32(f.images.Fd())),
		WorkDirFd:   proto.Int32(int32(f.work.Fd())),
		LogLevel:    proto.Int32(int32(j.LogLevel)),
	}
	if j.LogFile == "" {
		opts.LogToStderr = proto.Bool(true)
	}
	return &rpc.CriuReq{Type: kind.Enum(), Opts: opts}
}

// config is how CRIU is started, with our stdio.
func (j *Job) config(f folders, files []*os.File) criurpc.Config {
	c := criurpc.Config{
		Path: j.CRIU, Args: j.Options, Arg0: j.Arg0,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Files:       files,
		Keep:        j.Keep,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: j.Apart},
	}
	if j.Stdout != nil {
		c.Stdout = j.Stdout
	}
	if j.Stderr != nil {
		c.Stderr = j.Stderr
	}
	if j.LogFile != "" {
		c.LogFile = j.logPath(f)
	}
	return c
}

// logPath is CRIU's log: CRIU opens it in its work directory.
func (j *Job) logPath(f folders) string {
	if j.LogFile == "" || j.LogFile[0] == '/' {
		return j.LogFile
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", f.work.Fd(), j.LogFile)
}
