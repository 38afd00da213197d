// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// tempPrefix starts the name of every file that is not yet in its place.
const tempPrefix = ".criuhook-tmp-"

// maxImage bounds what is read of one image file, in bytes. The images read
// here describe things; what can be large (pages, ghosts, queued bytes) is
// never read into memory.
const maxImage = 64 << 20

// folder is an images directory that stays the same one whatever becomes of
// its name, and that no name leads out of.
type folder struct {
	root *os.Root
	at   string          // what it was opened by
	dir  string          // for messages
	ctx  context.Context // once it has ended nothing changes any more
}

func openFolder(dir string) (*folder, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the images directory: %w", err)
	}
	return &folder{root: root, at: dir, dir: shown(dir), ctx: context.Background()}, nil
}

// shown is how people know a directory that is given by a descriptor, as long as it
// has a name.
func shown(dir string) string {
	if magic, err := filepath.Match("/proc/*/fd/*", dir); err != nil || !magic {
		return dir
	}
	name, err := os.Readlink(dir)
	if err != nil || !filepath.IsAbs(name) || strings.HasSuffix(name, " (deleted)") {
		return dir
	}
	return name
}

// changeFolder opens one to change it, until ctx ends: whatever is in the
// directory later may be another dump's.
func changeFolder(ctx context.Context, dir string) (*folder, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("change %s: %w", shown(dir), context.Cause(ctx))
	}
	f, err := openFolder(dir)
	if err == nil {
		f.ctx = ctx
	}
	return f, err
}

// late is the error of a change that comes when the context has ended.
func (f *folder) late() error { return context.Cause(f.ctx) }

func (f *folder) close() { _ = f.root.Close() }

func (f *folder) path(name string) string { return strings.TrimSuffix(f.dir, "/") + "/" + name }

// open opens a regular file, and nothing else: no link, fifo or device.
func (f *folder) open(name string) (*os.File, fs.FileInfo, error) {
	before, err := f.root.Lstat(name)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	if !before.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("read %s: it is not a regular file (%s); put the image itself there", f.path(name), before.Mode())
	}
	// O_NONBLOCK: should it have become a fifo since, open must not wait.
	file, err := f.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	now, err := file.Stat()
	if err == nil && !os.SameFile(before, now) {
		err = errors.New("it was replaced while it was opened; try again")
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	return file, now, nil
}

// read returns a whole file of at most limit bytes. A missing one gives an
// error that is fs.ErrNotExist.
func (f *folder) read(name string, limit int64) ([]byte, error) {
	file, info, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if info.Size() > limit {
		return nil, fmt.Errorf("read %s: it has %d bytes, more than the %d that are ever needed", f.path(name), info.Size(), limit)
	}
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.path(name), err)
	}
	if int64(len(data)) != info.Size() {
		return nil, fmt.Errorf("read %s: it changed while it was read (%d bytes, then %d)", f.path(name), info.Size(), len(data))
	}
	return data, nil
}

// write is a new content for a file.
type write struct {
	name string
	data []byte
}

// replace puts all writes in place, in their order, or, if one cannot be
// written, none. Existing files keep mode and owner; new ones are 0600.
func (f *folder) replace(writes []write) (err error) {
	temps := make([]string, 0, len(writes))
	placed := 0
	defer func() {
		for _, t := range temps[placed:] {
			_ = f.root.Remove(t)
		}
	}()
	for _, w := range writes {
		temp, err := f.stage(w)
		if temp != "" {
			temps = append(temps, temp)
		}
		if err != nil {
			return err
		}
	}
	for i, w := range writes {
		err := f.late()
		if err == nil {
			err = f.root.Rename(temps[i], w.name)
		}
		if err != nil {
			return fmt.Errorf("put %s in place (%d of %d files are): %w", f.path(w.name), i, len(writes), err)
		}
		placed = i + 1
	}
	if placed == 0 {
		return nil
	}
	return f.sync()
}

// stage writes the content under a temporary name, on the disk when it
// returns. The name is returned, with an error too, if there is such a file.
func (f *folder) stage(w write) (string, error) {
	mode, uid, gid := fs.FileMode(0o600), -1, -1
	old, err := f.root.Lstat(w.name)
	switch {
	case err == nil && !old.Mode().IsRegular():
		return "", fmt.Errorf("replace %s: it is not a regular file (%s)", f.path(w.name), old.Mode())
	case err == nil:
		mode = old.Mode().Perm()
		if st, ok := old.Sys().(*syscall.Stat_t); ok {
			uid, gid = int(st.Uid), int(st.Gid)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("replace %s: %w", f.path(w.name), err)
	}

	temp := tempPrefix + rand.Text()
	file, err := f.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fmt.Errorf("write %s: %w", f.path(w.name), err)
	}
	err = func() error {
		if _, err := file.Write(w.data); err != nil {
			return err
		}
		if err := keepOwner(file, uid, gid); err != nil {
			return err
		}
		if err := file.Chmod(mode); err != nil {
			return err
		}
		return file.Sync()
	}()
	if cerr := file.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return temp, fmt.Errorf("write %s: %w", f.path(w.name), err)
	}
	return temp, nil
}

func keepOwner(file *os.File, uid, gid int) error {
	if uid < 0 {
		return nil
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	return file.Chown(uid, gid)
}

// remove deletes a file; that it is missing is fine.
func (f *folder) remove(name string) error {
	err := f.late()
	if err == nil {
		err = f.root.Remove(name)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", f.path(name), err)
	}
	return nil
}

// names lists the directory.
func (f *folder) names() ([]string, error) {
	d, err := f.root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", f.dir, err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", f.dir, err)
	}
	return names, nil
}

// sync makes renames and removals last.
func (f *folder) sync() error {
	d, err := f.root.Open(".")
	if err != nil {
		return fmt.Errorf("sync %s: %w", f.dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", f.dir, err)
	}
	return nil
}
