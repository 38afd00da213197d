// SPDX-License-Identifier: Apache-2.0

package image

import (
	"path"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
)

// Of a mapping's status in CRIU's images (criu/include/image.h).
const (
	vmaRegular     = 1 << 0
	vmaFilePrivate = 1 << 6
	vmaFileShared  = 1 << 7
	vmaAnonPrivate = 1 << 9
	vmaSocket      = 1 << 11
	vmaMemfd       = 1 << 14
)

// CachePath returns the path of a name-service daemon's database that a file
// in the images is, and whether the name alone says that it was unlinked. It
// takes names with and without the leading slash.
func CachePath(name string) (p string, unlinked, ok bool) {
	p = "/" + strings.TrimLeft(name, "/")
	for {
		rest, found := strings.CutSuffix(p, " (deleted)")
		if !found {
			// CRIU's name of an unlinked file that it restored while
			// another had the name (criu/files-reg.c, open_path).
			rest, found = strings.CutSuffix(p, ".cr_link")
		}
		if !found {
			break
		}
		p, unlinked = rest, true
	}
	dir, base := path.Split(p)
	switch dir {
	case "/var/lib/sss/mc/":
		switch base {
		case "passwd", "group", "initgroups", "sid":
			return p, unlinked, true
		}
	case "/var/cache/nscd/", "/var/db/nscd/":
		switch base {
		case "passwd", "group", "hosts", "services", "netgroup":
			return p, unlinked, true
		}
	case "/run/nscd/", "/var/run/nscd/":
		// Without "persistent", nscd unlinks its database at once.
		if len(base) == len("dbXXXXXX") && strings.HasPrefix(base, "db") {
			return p, true, true
		}
	}
	return "", false, false
}

// Cache is a database of a name-service daemon that the tree uses.
type Cache struct {
	Path     string   `json:"path"`
	Unlinked bool     `json:"unlinked"` // had lost its name before the dump
	Mappings int      `json:"mappings"`
	Holders  []Holder `json:"holders"`
}

// Caches are the caches that the images still refer to. Images made by
// criuhook refer to none but those that a process had open without being a
// client: one that maps it.
func (s *Set) Caches() []Cache {
	var out []Cache
	for _, c := range s.cacheFiles(nil) {
		i := -1
		for j := range out {
			if out[j].Path == c.path && out[j].Unlinked == c.unlinked {
				i = j
			}
		}
		if i < 0 {
			i, out = len(out), append(out, Cache{Path: c.path, Unlinked: c.unlinked})
		}
		for _, t := range s.tasks {
			for _, v := range t.mm.GetVmas() {
				if mapsFile(v) && v.GetShmid() == uint64(c.id) {
					out[i].Mappings++
				}
			}
		}
		out[i].Holders = append(out[i].Holders, s.users[c.id]...)
	}
	return out
}

// cacheFile is an entry of files.img that is a cache. One cache may have
// several: CRIU numbers open files and mapped ones apart.
type cacheFile struct {
	*file
	id       uint32
	path     string
	unlinked bool
}

func (s *Set) cacheFiles(external []ExternalFile) []*cacheFile {
	remapped := map[uint32]bool{}
	for _, r := range s.remap {
		remapped[r.entry.GetOrigId()] = true
	}
	var out []*cacheFile
	for _, r := range s.files {
		g := r.reg()
		if g == nil {
			continue
		}
		p, unlinked, ok := CachePath(g.GetName())
		if g.GetExt() {
			ok = false
			for _, x := range external {
				if x.Key == g.GetName() {
					p, unlinked, ok = x.Path, true, true
				}
			}
		}
		if ok {
			out = append(out, &cacheFile{r, g.GetId(), p, unlinked || remapped[g.GetId()]})
		}
	}
	return out
}

// mapsFile reports whether a mapping's shmid is the id of a regular file.
func mapsFile(v *vma.VmaEntry) bool {
	return v.GetStatus()&(vmaFilePrivate|vmaFileShared) != 0 && v.GetStatus()&(vmaMemfd|vmaSocket) == 0
}
