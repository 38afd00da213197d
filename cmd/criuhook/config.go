// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"criuhook/criuhook/rule"
)

// environment reads a variable of ours. Somebody who runs a setuid CRIU
// chooses its environment, but not whom we trust.
func environment(name string) string {
	if os.Geteuid() != os.Getuid() || os.Getegid() != os.Getgid() {
		return ""
	}
	return os.Getenv(name)
}

// configuration is where the rules come from.
type configuration struct {
	file string // --config; "": environment, then the default
}

func (c configuration) load() (*rule.Set, error) {
	switch env := environment("CRIUHOOK_CONFIG"); {
	case c.file != "":
		return rule.Load(c.file, true)
	case env != "":
		return rule.Load(env, true)
	}
	return rule.Load(rule.DefaultConfig, false)
}
