// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// DefaultConfig is the configuration file when none is named.
const DefaultConfig = "/etc/criuhook/config.yaml"

// Dir is the directory of rule files that belongs to a configuration file.
func Dir(configFile string) string { return filepath.Join(filepath.Dir(configFile), "rules.d") }

// Load reads the configuration file and then the *.yaml files of rules.d
// beside it in name order. Their rules come first, in that order, then the
// built-in ones; of unknown, inbound, criu and each key of service the
// last file that sets it wins. With mustExist the configuration file has to be there, rules.d never.
// The configuration file /dev/null means the built-in rules alone.
//
// With an effective uid of 0 a file that others could have written is
// refused, since it decides to whom root connects and what root runs.
func Load(configFile string, mustExist bool) (*Set, error) {
	set := &Set{Service: DefaultService}
	if configFile == os.DevNull {
		set.Rules = BuiltIn()
		return set, nil
	}
	names := []string{configFile}
	more, err := ruleFiles(Dir(configFile))
	if err != nil {
		return nil, err
	}
	names = append(names, more...)

	var errs []error
	owners := make(map[string]string) // source of each rule, by name
	for i, name := range names {
		f, err := readFile(name)
		if i == 0 && !mustExist && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = f.Clashes()
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := set.merge(f, owners); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	set.Rules = append(set.Rules, BuiltIn()...)
	return set, nil
}

func (s *Set) merge(f *File, owners map[string]string) error {
	p := &problems{file: f.Name}
	for i, r := range f.Rules {
		if source, ok := owners[r.Name]; ok {
			p.at(&f.names[i], "a second rule named %q, the first is %s", r.Name, source)
			continue
		}
		owners[r.Name] = r.Source
	}
	s.Rules = append(s.Rules, f.Rules...)
	if f.Unknown != nil {
		s.Unknown = *f.Unknown
	}
	if f.Inbound != nil {
		s.Inbound = *f.Inbound
	}
	if f.CRIU != "" {
		s.CRIU = f.CRIU
	}
	if f.Service != nil {
		s.Service = decodeService(&f.service, s.Service, p)
	}
	return p.err()
}

// ruleFiles lists the rule files of a directory, none if it is not there.
func ruleFiles(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the rules directory: %w", err)
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the rules directory: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("read the rules directory: %s is not a directory", dir)
	}
	if err := checkOwner(dir, info, os.Geteuid()); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("read the rules directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		// An editor's lock files and the like are hidden.
		if strings.HasSuffix(e.Name(), ".yaml") && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, filepath.Join(dir, e.Name()))
		}
	}
	return names, nil
}

// ReadFile reads one configuration file as Load does, and like Load refuses
// names of built-in rules.
func ReadFile(name string) (*File, error) {
	f, err := readFile(name)
	if err != nil {
		return nil, err
	}
	if err := f.Clashes(); err != nil {
		return nil, err
	}
	return f, nil
}

func readFile(name string) (*File, error) {
	// Without O_NONBLOCK a FIFO would hold us for ever.
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read the configuration: %s is not a regular file", name)
	}
	if err := checkOwner(name, info, os.Geteuid()); err != nil {
		return nil, err
	}
	return Parse(name, file)
}

// checkOwner refuses what somebody less trusted than the effective user euid
// could have written. info is of the opened file, so a symlink leads nowhere
// unchecked. It asks nothing of users other than root: they harm but
// themselves.
func checkOwner(name string, info fs.FileInfo, euid int) error {
	if euid != 0 {
		return nil
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: cannot tell who owns it", name)
	}
	if st.Uid != 0 {
		return fmt.Errorf("%s belongs to uid %d and decides what root does: chown it to root, or remove it", name, st.Uid)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%s has mode %#o, others can write it, and it decides what root does: chmod go-w it", name, perm)
	}
	return nil
}
