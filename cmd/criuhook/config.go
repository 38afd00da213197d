// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"criuhook/criuhook/rule"
	"criuhook/sockpeer"
)

// environment reads a variable of ours. Somebody who runs a setuid CRIU
// chooses its environment, but not whom we trust.
func environment(name string) string {
	if sockpeer.Elevated() {
		return ""
	}
	return os.Getenv(name)
}

// environmentPath reads a variable of ours that names a file. CRIU starts
// scripts, and those start processes, in directories of their own choice.
func environmentPath(name string) (string, error) {
	path := environment(name)
	if path != "" && !filepath.IsAbs(path) {
		return "", fmt.Errorf("%s=%s: must be an absolute path", name, path)
	}
	return path, nil
}

// configuration is where the rules come from.
type configuration struct {
	file string // --config; "": environment, then the default
}

func (c configuration) load() (*rule.Set, error) {
	switch {
	case c.file != "" && sockpeer.Elevated():
		return nil, errors.New("--config is not accepted from a set-user-id program: put the rules into " + rule.DefaultConfig)
	case c.file != "":
		return rule.Load(c.file, true)
	}
	file, err := environmentPath("CRIUHOOK_CONFIG")
	if err != nil {
		return nil, err
	}
	if file != "" {
		return rule.Load(file, true)
	}
	return rule.Load(rule.DefaultConfig, false)
}
