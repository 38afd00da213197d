// SPDX-License-Identifier: Apache-2.0

package test

import (
	"strconv"
	"testing"

	"criuhook/test/app"
)

// Many connections whose daemon is away, by a rule with a long timeout, must
// not keep another from being made in its short one.
func TestRestorePatientRuleStarvesNobody(t *testing.T) {
	ways(t, func(t *testing.T) {
		away, slow := daemon(t, "unix", "slow")
		_, path := daemon(t, "unix", "reconnect")
		a := startApp(t, alice, nil)
		const many = 100
		for i := range many {
			a.connect(t, "slow"+strconv.Itoa(i), slow)
		}
		a.connect(t, "c", path)
		a.Request(t, "c")
		dir := a.Dump(t)
		away.Close()
		r := a.Restore(t, dir)
		a.Request(t, "c")
		for i := range many {
			if _, err := a.Try(app.Command{Op: "read", Conn: "slow" + strconv.Itoa(i)}); err != nil {
				t.Errorf("connection %d: %v, expected EOF\n%s", i, err, r.tail())
			}
		}
		nothingLeft(t)
	})
}
