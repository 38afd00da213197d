// SPDX-License-Identifier: Apache-2.0

package service

import (
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"criuhook/criuhook/relay"
)

// TestStarter: no child of the service has a client's uid before it executes a
// program: the client could stop it, and the service with it.
func TestStarter(t *testing.T) {
	w := &Relay{CRIU: "/usr/sbin/criu"}
	groups := make([]uint32, maxGroups)
	for i := range groups {
		groups[i] = 1<<32 - 2
	}
	for _, c := range []*Client{{}, {UID: 1000, GID: 1000}, {UID: 1000, GID: 1000, Groups: groups}} {
		child, ok := w.starter(c, logrus.NewEntry(logrus.New())).(*relay.Child)
		if !ok || child.SysProcAttr.Credential != nil || len(child.SysProcAttr.AmbientCaps) > 0 {
			t.Fatalf("uid %d: %+v", c.UID, child)
		}
		if became := slices.Contains(child.Options, BecomeVerb); became != (c.UID != 0) {
			t.Errorf("uid %d: started with %.100q", c.UID, child.Options)
		}
		size := 0
		for _, a := range child.Options {
			size = max(size, len(a))
		}
		if size >= 128<<10 { // MAX_ARG_STRLEN of the kernel's include/uapi/linux/binfmts.h
			t.Errorf("an argument has %d bytes", size)
		}
		if n := strings.Count(strings.Join(child.Options, ","), "4294967294"); n != len(c.Groups) {
			t.Errorf("%d groups are told of, expected %d", n, len(c.Groups))
		}
	}
}
