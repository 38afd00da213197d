// SPDX-License-Identifier: Apache-2.0

package test

import (
	"context"
	"strings"
	"testing"
)

// TestCommandLines: what the scenarios are run by. It needs neither root nor CRIU.
func TestCommandLines(t *testing.T) {
	defer func(old string) { criuhook = old }(criuhook)
	criuhook = "/bin/criuhook"
	for _, c := range []struct {
		command
		want string
	}{
		{byScript.dump(7, "/d", "--shell-job"), "criu: criu dump --action-script=/bin/criuhook -t 7 -D /d --shell-job"},
		{byStock.dump(7, "/d", "--shell-job"), "criu: criu dump -t 7 -D /d --shell-job"},
		{byRPC.dump(7, "/d"), "/bin/criuhook: criuhook dump --tree 7 --images-dir /d --"},
		{byRPC.dump(7, "/d", "--shell-job", "--leave-running", "-v4"), "/bin/criuhook: criuhook dump --tree 7 --images-dir /d --leave-running -- --shell-job -v4"},
		{byRPC.dump(7, "/d", "-R"), "/bin/criuhook: criuhook dump --tree 7 --images-dir /d -- -R"},
		{byDropin.dump(7, "/d", "--leave-running", "-v4"), "/bin/criuhook: criu dump -t 7 -D /d --leave-running -v4"},
		{byScript.restore("/d", true, "-v4"), "criu: criu restore --action-script=/bin/criuhook -D /d -d -v4"},
		{byStock.restore("/d", false, "--pidfile", "/p"), "criu: criu restore -D /d --pidfile /p"},
		{byRPC.restore("/d", true, "--pidfile", "/p"), "/bin/criuhook: criuhook restore --images-dir /d --detach -- --pidfile /p"},
		{byRPC.restore("/d", false), "/bin/criuhook: criuhook restore --images-dir /d --"},
		{byDropin.restore("/d", true, "-S"), "/bin/criuhook: criuhook criu restore -D /d -d -S"},
		{byDropin.restore("/d", false, "--exec-cmd", "--", "true"), "/bin/criuhook: criuhook criu restore -D /d --exec-cmd -- true"},
	} {
		if got := c.file + ": " + strings.Join(c.args, " "); got != c.want {
			t.Errorf("by %v: %q, expected %q", c.by, got, c.want)
		}
		for _, u := range []User{root, alice} {
			args := strings.Join(c.as(context.Background(), u).Args, " ")
			if !strings.HasSuffix(args, strings.Join(c.args, " ")) {
				t.Errorf("by %v, as uid %d: %q", c.by, u.UID, args)
			}
		}
	}
}

// TestWayOf: a way is where its name is, and nowhere else.
func TestWayOf(t *testing.T) {
	for _, c := range []struct {
		name string
		want way
	}{{"script", byScript}, {"rpc", byRPC}, {"dropin", byDropin}, {"another", byScript}, {"by rpc", byScript}} {
		t.Run(c.name, func(t *testing.T) {
			t.Run("inner", func(t *testing.T) {
				if got := wayOf(t); got != c.want {
					t.Errorf("%s: %v, expected %v", t.Name(), got, c.want)
				}
			})
		})
	}
}
