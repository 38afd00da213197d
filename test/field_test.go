// SPDX-License-Identifier: Apache-2.0

package test

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Observation is what became of a client's connections after one restore, or
// several, as the test saw it.
type Observation struct {
	Client string // the library or program, e.g. "libnss_sss"
	Daemon string // whom it talks to, e.g. "sssd, nss pipe"
	Policy string // what was done with the connection, e.g. "reconnect, prelude sssd"
	State  string // "idle", "busy", or what else was special
	// By is the way of dump and restore; observe takes the test's, unless it is
	// given.
	By way
	// Failed is how many lookups failed, in all, of those that the test made
	// after the restore, or that were under way.
	Failed  int
	Longest time.Duration // the longest wait for one lookup; 0: not measured
	// FDsLeaked is how many more fds the client has, once it looks up again.
	FDsLeaked int
	// Identity is whom the daemon saw on the new connection: seenAs tells. Empty:
	// there was none, or the daemon does not look.
	Identity string
}

// theApplications is the Identity of a connection made as it should be.
const theApplications = "the application's"

// seenAs is the Identity of a client that a daemon saw as uid.
func seenAs(uid uint32, u User) string {
	if uid == u.UID {
		return theApplications
	}
	return fmt.Sprintf("uid %d", uid)
}

var field struct {
	sync.Mutex
	seen []Observation
}

// observe notes an observation for the table in docs/compatibility.md, which is
// made of nothing else. It may be called by several tests for the same client,
// policy and state: then a cell shows all that was seen.
func observe(t testing.TB, o Observation) {
	t.Helper()
	if o.Client == "" || o.Policy == "" || o.State == "" {
		t.Errorf("an observation that says too little: %+v", o)
		return
	}
	if o.By == byScript {
		o.By = wayOf(t)
	}
	field.Lock()
	defer field.Unlock()
	field.seen = append(field.seen, o)
}

// classes bound the longest wait: a table of milliseconds would be another one
// after every run.
var classes = []struct {
	below time.Duration
	name  string
}{
	{50 * time.Millisecond, "< 50 ms"},
	{time.Second, "< 1 s"},
	{4 * time.Second, "< 4 s"},
	{10 * time.Second, "< 10 s"},
	{time.Minute, "< 1 min"},
	{time.Hour, "> 1 min"},
}

func classOf(d time.Duration) string {
	if d == 0 {
		return none
	}
	for _, c := range classes {
		if d < c.below {
			return c.name
		}
	}
	return "for ever"
}

// none is a cell in which there is nothing to say.
const none = "–"

const tableHead = `<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Made by the tests from what they observe: CRIUHOOK_UPDATE=1 ./scripts/test -->
# Compatibility

What the tests see when real clients (or, where it says so, one that behaves as the
real one) are dumped and restored while they hold connections, with Debian 13's
daemons. No cell is written by hand; every full run of the tests compares this table
with what it saw.

- **Idle**: nobody waits for an answer. **Busy**: a thread waits for one, which the
  daemon, stopped, has not given.
- **Failed**: lookups (or requests) that failed, of the one under way, if any, and of
  all that followed the restore. **Longest wait**: for any one of them.
- **fds left over**: more than the client had before the dump, once it has looked up again.
- **Identity**: whom the daemon sees (SO_PEERCRED) at the other end of the connection
  that criuhook made. – where it made none.
- All three ways of using criuhook (action script, verbs over RPC, drop-in) are
  tested; where a cell differs between them, it says so.

`

var columns = []string{"Client", "Policy", "State", "Failed", "Longest wait", "fds left over", "Identity seen by the daemon"}

// table renders observations, a row for each client, policy and state.
func table(seen []Observation) string {
	type key struct{ client, policy, state string }
	rows := map[key][]Observation{}
	for _, o := range seen {
		k := key{o.Client, o.Policy, o.State}
		if o.Daemon != "" {
			k.client += " → " + o.Daemon
		}
		rows[k] = append(rows[k], o)
	}
	keys := make([]key, 0, len(rows))
	for k := range rows {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		busy := func(k key) int { return strings.Count(k.state[:min(4, len(k.state))], "busy") }
		return cmp.Or(cmp.Compare(a.client, b.client), cmp.Compare(busy(a), busy(b)), cmp.Compare(a.state, b.state), cmp.Compare(a.policy, b.policy))
	})
	var b strings.Builder
	line := func(cells ...string) { b.WriteString("| " + strings.Join(cells, " | ") + " |\n") }
	line(columns...)
	line(slices.Repeat([]string{"---"}, len(columns))...)
	for _, k := range keys {
		row := rows[k]
		line(k.client, k.policy, k.state,
			cell(row, func(of []Observation) string { return span(of, func(o Observation) int { return o.Failed }) }),
			longestWait(row),
			cell(row, func(of []Observation) string { return span(of, func(o Observation) int { return o.FDsLeaked }) }),
			cell(row, identities))
	}
	return b.String()
}

// cell is what all ways have in common, or what each of them has.
func cell(row []Observation, of func([]Observation) string) string {
	var values []string
	by := map[string][]string{}
	for w := byScript; w <= byStock; w++ {
		var mine []Observation
		for _, o := range row {
			if o.By == w {
				mine = append(mine, o)
			}
		}
		if len(mine) == 0 {
			continue
		}
		v := of(mine)
		if by[v] == nil {
			values = append(values, v)
		}
		by[v] = append(by[v], w.String())
	}
	if len(values) == 1 {
		return values[0]
	}
	for i, v := range values {
		values[i] = strings.Join(by[v], ", ") + ": " + v
	}
	return strings.Join(values, "; ")
}

// longestWait is that of all ways, unless they are more than a class apart.
func longestWait(row []Observation) string {
	longest := func(of []Observation) time.Duration {
		return slices.MaxFunc(of, func(a, b Observation) int { return cmp.Compare(a.Longest, b.Longest) }).Longest
	}
	all := classOf(longest(row))
	return cell(row, func(of []Observation) string {
		if c := classOf(longest(of)); !near(c, all) {
			return c
		}
		return all
	})
}

// near reports whether two waits are at most a class apart, or both below 4 s: the
// machine may have been busy with something else. What a first answer may take, the
// tests check of the median of several.
func near(a, b string) bool {
	at := func(s string) int {
		for i, c := range classes {
			if c.name == s {
				return i
			}
		}
		return -10 // near nothing but itself
	}
	least, most := min(at(a), at(b)), max(at(a), at(b))
	return a == b || least >= 0 && (most-least <= 1 || classes[most].below <= 4*time.Second)
}

func span(of []Observation, count func(Observation) int) string {
	least, most := count(of[0]), count(of[0])
	for _, o := range of {
		least, most = min(least, count(o)), max(most, count(o))
	}
	if least == most {
		return fmt.Sprint(most)
	}
	return fmt.Sprintf("%d to %d", least, most)
}

func identities(of []Observation) string {
	var all []string
	for _, o := range of {
		if o.Identity != "" && !slices.Contains(all, o.Identity) {
			all = append(all, o.Identity)
		}
	}
	if len(all) == 0 {
		return none
	}
	slices.Sort(all)
	return strings.Join(all, " or ")
}

// differences are the lines that differ between two tables, as "-" and "+". A
// wait that is near the other is none: the machine may be busy.
func differences(committed, now string) (out []string) {
	lines := func(text string) map[string][]string {
		m := map[string][]string{}
		for line := range strings.Lines(text) {
			if cells := strings.Split(strings.TrimSpace(line), " | "); len(cells) == len(columns) {
				m[strings.Join(cells[:3], " | ")] = cells
			}
		}
		return m
	}
	old, new := lines(committed), lines(now)
	for k, cells := range old {
		if new[k] == nil {
			out = append(out, "-"+strings.Join(cells, " | "))
		}
	}
	for k, cells := range new {
		was := old[k]
		if was == nil {
			out = append(out, "+"+strings.Join(cells, " | "))
			continue
		}
		for i := range cells {
			if cells[i] != was[i] && !(i == 4 && near(cells[i], was[i])) {
				out = append(out, "-"+strings.Join(was, " | ")+"\n+"+strings.Join(cells, " | "))
				break
			}
		}
	}
	slices.SortFunc(out, func(a, b string) int { return cmp.Compare(a[1:], b[1:]) })
	return out
}

// fullRun reports whether the flags of go test leave nothing out.
func fullRun() bool {
	for name, all := range map[string]string{"test.run": "", "test.skip": "", "test.list": "", "test.short": "false", "test.count": "1"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != all {
			return false
		}
	}
	return whyNot == ""
}

// compareTable ends a full run, or that part of it which observes: the table of what was observed is left in the
// cache's tmp, where scripts/test takes it from, and must be the committed one
// unless CRIUHOOK_UPDATE asks for another. Otherwise it shows what a part of
// the tests observed.
func compareTable(full bool, code int) int {
	now := table(field.seen)
	part := os.Getenv("CRIUHOOK_PART")
	if part == "rest" && len(field.seen) > 0 {
		fmt.Println("a test that observes is not among those of daemons, see ofDaemons:\n", now)
		return 1
	}
	if len(field.seen) == 0 {
		return code
	}
	if !full {
		if testing.Verbose() {
			fmt.Print("observed:\n", now)
		}
		return code
	}
	file := filepath.Join(os.Getenv("CRIUHOOK_CACHE"), "tmp", "compatibility.md")
	if err := os.WriteFile(file, []byte(tableHead+now), 0o644); err != nil {
		fmt.Println("keep the compatibility table that was observed:", err)
		return 1
	}
	fmt.Println("what was observed is in", file)
	if code != 0 || os.Getenv("CRIUHOOK_UPDATE") != "" {
		return code
	}
	committed, err := os.ReadFile("../docs/compatibility.md")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Println("compare the compatibility table:", err)
		return 1
	}
	diff := differences(string(committed), now)
	if !strings.HasPrefix(string(committed), tableHead) {
		diff = append(diff, "(the text above the table)")
	}
	if len(diff) == 0 {
		return code
	}
	fmt.Printf("docs/compatibility.md (-) is not what was observed (+); if that is right, run CRIUHOOK_UPDATE=1 ./scripts/test:\n%s\n", strings.Join(diff, "\n"))
	return 1
}

func TestTable(t *testing.T) {
	base := Observation{Client: "c", Daemon: "d", Policy: "p", State: "idle", Longest: time.Millisecond, Identity: theApplications}
	with := func(edit func(*Observation)) Observation { o := base; edit(&o); return o }
	rpc := with(func(o *Observation) { o.By = byRPC })
	for _, c := range []struct {
		name string
		seen []Observation
		want string
	}{
		{"one way", []Observation{base}, "| c → d | p | idle | 0 | < 50 ms | 0 | the application's |"},
		{"ways agree", []Observation{base, rpc}, "| c → d | p | idle | 0 | < 50 ms | 0 | the application's |"},
		{"ways differ", []Observation{with(func(o *Observation) { o.Failed = 1; o.Identity = "uid 0" }), rpc},
			"| c → d | p | idle | script: 1; rpc: 0 | < 50 ms | 0 | script: uid 0; rpc: the application's |"},
		{"a way a class slower", []Observation{base, with(func(o *Observation) { o.By = byRPC; o.Longest = 60 * time.Millisecond })},
			"| c → d | p | idle | 0 | < 1 s | 0 | the application's |"},
		{"a way much slower", []Observation{base, with(func(o *Observation) { o.By = byRPC; o.Longest = 5 * time.Second })},
			"| c → d | p | idle | 0 | script: < 50 ms; rpc: < 10 s | 0 | the application's |"},
		{"several of one way", []Observation{base, with(func(o *Observation) { o.FDsLeaked = 2; o.Longest = 5 * time.Second; o.Identity = "" })},
			"| c → d | p | idle | 0 | < 10 s | 0 to 2 | the application's |"},
	} {
		rows := strings.Split(strings.TrimSpace(table(c.seen)), "\n")
		if got := rows[len(rows)-1]; len(rows) != 3 || got != c.want {
			t.Errorf("%s: %q, expected %q", c.name, got, c.want)
		}
	}
	slower := with(func(o *Observation) { o.Longest = 100 * time.Millisecond })
	stuck := with(func(o *Observation) { o.Longest = 5 * time.Second })
	fails := with(func(o *Observation) { o.Failed = 1 })
	more := with(func(o *Observation) { o.State = "busy" })
	for _, c := range []struct {
		name string
		now  []Observation
		diff int
	}{
		{"the same", []Observation{rpc}, 0},
		{"a class slower", []Observation{slower}, 0},
		{"on a busy machine", []Observation{with(func(o *Observation) { o.Longest = 3 * time.Second })}, 0},
		{"much slower", []Observation{stuck}, 1},
		{"never", []Observation{with(func(o *Observation) { o.Longest = time.Hour })}, 1},
		{"a failure", []Observation{fails}, 1},
		{"a row more", []Observation{base, more}, 1},
		{"a row less", nil, 1},
	} {
		if diff := differences(tableHead+table([]Observation{base}), table(c.now)); len(diff) != c.diff {
			t.Errorf("%s: %q, expected %d differences", c.name, diff, c.diff)
		}
	}
}
