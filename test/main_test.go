// SPDX-License-Identifier: Apache-2.0

// Package test checks criuhook end to end: real CRIU, real daemons, processes
// that are really dumped. Run it with scripts/test, which provides them all.
package test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"criuhook/test/app"
	"criuhook/test/lwmsg"
	"criuhook/test/rpcclients/gocriu"
)

// rules are in force in all tests: a socket's name says what becomes of it.
// They are in the default place, because a setuid CRIU's script ignores the
// environment, and that is how unprivileged targets are dumped here.
const rules = `
rules:
  - {name: t-reconnect, path: /tmp/*/*/reconnect*, idle: reconnect, busy: hangup, timeout: 2s}
  - {name: t-brief, path: /tmp/*/*/brief*, idle: reconnect, timeout: 500ms}
  - {name: t-reconnect-abstract, path: "@criuhook-test-*", idle: reconnect}
  - {name: t-fail, path: /tmp/*/*/fail*, idle: reconnect, absent: fail, timeout: 500ms}
  - {name: t-hangup, path: /tmp/*/*/hangup*, idle: hangup}
  - {name: t-refuse, path: /tmp/*/*/refuse*, idle: refuse}
  - {name: t-busy-refuse, path: /tmp/*/*/busyrefuse*, idle: reconnect, busy: refuse}
  - {name: t-wait, path: /tmp/*/*/wait*, idle: reconnect, busy: wait, patience: 3s}
  - {name: t-slow, path: /tmp/*/*/slow*, idle: reconnect, timeout: 4s}
  - {name: t-inside, path: /run/inside/*, idle: reconnect}
  - {name: t-moved, path: /tmp/*/*/moved*, idle: reconnect, to: /tmp/criuhook-test-moved}
`

// whyNot is why the tests cannot run here.
var whyNot string

// criuhook is the binary under test.
var criuhook = os.Getenv("CRIUHOOK_BIN")

func TestMain(m *testing.M) {
	app.Main()
	lwmsg.Main()
	gocriu.Main()
	switch {
	case os.Getenv("CRIUHOOK_SANDBOX") != "1" || os.Getuid() != 0:
		whyNot = "needs root and real CRIU in a sandbox: run ./scripts/test"
	case criuhook == "":
		whyNot = "CRIUHOOK_BIN does not name the binary under test: run ./scripts/test"
	default:
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the sandbox for the tests:", err)
			os.Exit(1)
		}
	}
	flag.Parse()
	full := fullRun()
	if err := takePart(os.Getenv("CRIUHOOK_PART")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(compareTable(full, m.Run()))
}

// ofDaemons are the tests on the daemons of the field, of whom the table is made.
const ofDaemons = "^Test(StockFailsOn|ScanShows)?(SSSD|NSCD|Unscd|Lwmsg|NameServices|LogDaemons|Journal|Bus[RH]|BusBusy|SessionBus|Winbind|Field|TwentyCycles|Cache)"

// takePart leaves out what another part of a full run does: most tests wait for
// daemons and deadlines, so that two sandboxes beside each other take half the
// time of one.
func takePart(part string) error {
	switch part {
	case "":
		return nil
	case "daemons":
		return flag.Set("test.run", ofDaemons)
	case "rest":
		return flag.Set("test.skip", ofDaemons)
	}
	return fmt.Errorf("CRIUHOOK_PART is daemons or rest, not %q", part)
}

func prepare() error {
	if err := os.MkdirAll("/etc/criuhook", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/etc/criuhook/config.yaml", []byte(rules), 0o644); err != nil {
		return err
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	// Makes /run/criu.kdat, which CRIU can make only as plain root.
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		return fmt.Errorf("criu check: %w\n%s", err, out)
	}
	return nil
}

// need skips a test that cannot run here, and says why.
func need(t *testing.T) {
	t.Helper()
	if whyNot != "" {
		t.Skip(whyNot)
	}
}
