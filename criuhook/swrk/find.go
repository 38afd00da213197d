// SPDX-License-Identifier: Apache-2.0

package swrk

import (
	"bytes"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"criuhook/sockpeer"
)

// realName is what the real CRIU is called where we have taken its name.
const realName = "criu.real"

// systemDirs are where CRIU is searched after PATH, which often lacks the sbin
// directories.
var systemDirs = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// Finder says where [Find] may look for the real CRIU. The first three are used
// in this order and must be absolute paths; "" means not given.
type Finder struct {
	Option      string // of the command line
	Environment string // CRIUHOOK_CRIU
	Config      string // rule.Set.CRIU

	// Self is our executable, and Link, if not "", a link to it by which we were
	// called: criu.real is looked for beside both. Image is what is compared to
	// know ourselves; "": Self.
	Self, Link, Image string

	Path string   // PATH
	Dirs []string // searched after Path

	// Elevated: we run set-user-id or set-group-id. Then Environment, Path and
	// Link, which the caller chose, are ignored, Option is refused, and what
	// Config or criu.real name must be root's alone to change.
	Elevated bool
}

// NewFinder makes the Finder of this process.
func NewFinder(option, config string) (Finder, error) {
	self, err := os.Executable()
	if err != nil {
		return Finder{}, fmt.Errorf("find our own executable, to tell the real CRIU from it: %w; is /proc mounted?", err)
	}
	f := Finder{
		Option:      option,
		Environment: os.Getenv("CRIUHOOK_CRIU"),
		Config:      config,
		Self:        self,
		Image:       "/proc/self/exe",
		Path:        os.Getenv("PATH"),
		Dirs:        systemDirs,
		Elevated:    sockpeer.Elevated(),
	}
	if !f.Elevated && len(os.Args) > 0 {
		f.Link = calledAs(os.Args[0], f.Path)
	}
	return f, nil
}

// calledAs returns the absolute path that a shell made of argv[0], or "".
func calledAs(name, path string) string {
	if strings.Contains(name, "/") {
		if abs, err := filepath.Abs(name); err == nil {
			return abs
		}
		return ""
	}
	for _, dir := range filepath.SplitList(path) {
		if file := filepath.Join(dir, name); filepath.IsAbs(dir) && executable(file) == nil {
			return file
		}
	}
	return ""
}

// errSelf: the candidate is, or leads to, this program.
var errSelf = errors.New("that is criuhook itself, not CRIU")

// Find returns the path of the real CRIU. What was named must be usable: only
// where nothing was named does the search go on.
func Find(f Finder) (string, error) {
	if f.Elevated && f.Option != "" {
		return "", fmt.Errorf("--criu %s is not accepted from a set-user-id program: name CRIU in the configuration", f.Option)
	}
	named := []struct{ by, path string }{
		{"--criu", f.Option}, {"CRIUHOOK_CRIU", f.Environment}, {"\"criu:\" in the configuration", f.Config},
	}
	if f.Elevated {
		named[1].path = ""
	}
	for _, n := range named {
		if n.path == "" {
			continue
		}
		if err := f.usable(n.path); err != nil {
			return "", fmt.Errorf("%s names %s as the real CRIU: %w; correct it, or leave it out to have CRIU searched", n.by, n.path, err)
		}
		return n.path, nil
	}
	var tried []string
	for _, file := range f.beside() {
		switch err := f.usable(file); {
		case err == nil:
			return file, nil
		case !errors.Is(err, fs.ErrNotExist):
			return "", fmt.Errorf("%s should be the real CRIU: %w; correct or remove it", file, err)
		}
		tried = append(tried, file)
	}
	for _, file := range f.search() {
		err := executable(file)
		if err == nil {
			err = f.notSelf(file)
		}
		if err == nil {
			return file, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			tried = append(tried, file)
		} else {
			tried = append(tried, fmt.Sprintf("%s (%v)", file, err))
		}
	}
	return "", fmt.Errorf("the real CRIU was not found, tried %s: install CRIU, or name it with --criu, with CRIUHOOK_CRIU or with \"criu:\" in the configuration",
		strings.Join(tried, ", "))
}

// beside lists where criu.real may be.
func (f Finder) beside() []string {
	files := []string{filepath.Join(filepath.Dir(f.Self), realName)}
	if f.Link != "" && !f.Elevated && f.same(f.Link) {
		if file := filepath.Join(filepath.Dir(f.Link), realName); file != files[0] {
			files = append(files, file)
		}
	}
	return files
}

// search lists the criu of every directory. Relative ones in PATH depend on
// where we happen to be and are left out.
func (f Finder) search() []string {
	var dirs []string
	if !f.Elevated {
		dirs = filepath.SplitList(f.Path)
	}
	var files []string
	for _, dir := range slices.Concat(dirs, f.Dirs) {
		if file := filepath.Join(dir, "criu"); filepath.IsAbs(dir) && !slices.Contains(files, file) {
			files = append(files, file)
		}
	}
	return files
}

// usable checks a path that was named by somebody.
func (f Finder) usable(file string) error {
	if !filepath.IsAbs(file) {
		return errors.New("not an absolute path")
	}
	if err := executable(file); err != nil {
		return err
	}
	if f.Elevated {
		if err := rootsAlone(file); err != nil {
			return err
		}
	}
	return f.notSelf(file)
}

// executable tells whether we can execute a file.
func executable(file string) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if err := unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("not executable: %w", err)
	}
	return nil
}

// rootsAlone checks that nobody but root can put something else in a file's
// place: not in its directory, nor in any other on the way to it, by way of
// symbolic links too.
func rootsAlone(file string) error {
	const mostLinks = 40 // as the kernel follows (path_resolution(7))
	left := strings.Split(file, "/")
	for at, links := "/", 0; ; {
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: at, Err: err}
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFLNK: // in a directory of root's: nobody else can change it
			to, err := os.Readlink(at)
			if err != nil {
				return err
			}
			if links++; links > mostLinks {
				return &fs.PathError{Op: "follow links of", Path: file, Err: unix.ELOOP}
			}
			left = append(strings.Split(to, "/"), left...)
			if at = filepath.Dir(at); filepath.IsAbs(to) {
				at = "/"
			}
			continue
		case st.Uid != 0 || st.Mode&0o022 != 0:
			return fmt.Errorf("%s can be changed by others than root, which a set-user-id program does not accept", at)
		}
		if len(left) == 0 {
			return nil
		}
		at, left = filepath.Join(at, left[0]), left[1:] // at has no links in it, so ".." is its parent
	}
}

// notSelf refuses what would end in an endless loop: us under any name, another
// build of us, and a script that calls us.
func (f Finder) notSelf(file string) error {
	if f.same(file) {
		return errSelf
	}
	script, err := scriptText(file)
	if err != nil {
		return err
	}
	if script != nil {
		for _, name := range []string{"criuhook", f.Self, f.Link} {
			if name != "" && bytes.Contains(script, []byte(name)) {
				return fmt.Errorf("a script that mentions %s: %w", name, errSelf)
			}
		}
		return nil
	}
	if theirs, err := buildinfo.ReadFile(file); err == nil {
		if ours, err := buildinfo.ReadFile(f.image()); err == nil && theirs.Path == ours.Path {
			return fmt.Errorf("another copy of our program: %w", errSelf)
		}
	}
	return nil
}

func (f Finder) image() string {
	if f.Image != "" {
		return f.Image
	}
	return f.Self
}

func (f Finder) same(file string) bool {
	ours, err := os.Stat(f.image())
	if err != nil {
		return false
	}
	theirs, err := os.Stat(file)
	return err == nil && os.SameFile(ours, theirs)
}

// maxScript bounds how much of a script is looked at, in bytes.
const maxScript = 64 << 10

// scriptText returns the beginning of a script; nil: the file is none, or, as
// with a program that may be executed but not read, it cannot be told.
func scriptText(file string) ([]byte, error) {
	in, err := os.Open(file)
	if errors.Is(err, fs.ErrPermission) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer in.Close()
	start := make([]byte, 2)
	if _, err := io.ReadFull(in, start); err != nil || string(start) != "#!" {
		return nil, nil
	}
	text, err := io.ReadAll(io.LimitReader(in, maxScript))
	if err != nil {
		return nil, fmt.Errorf("read the script %s: %w", file, err)
	}
	return text, nil
}
