// SPDX-License-Identifier: Apache-2.0

package dropin_test

import (
	"errors"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"

	"criuhook/criuhook/dropin"
)

// world is an Environment without a system.
type world struct {
	vars, files map[string]string
	err         error // of files that are not there
}

func (w world) environment() dropin.Environment {
	return dropin.Environment{
		LookupEnv: func(name string) (string, bool) { v, ok := w.vars[name]; return v, ok },
		ReadFile: func(name string) ([]byte, error) {
			if text, ok := w.files[name]; ok {
				return []byte(text), nil
			}
			if w.err != nil {
				return nil, w.err
			}
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		},
	}
}

func parse(line string) *dropin.Command {
	return dropin.Parse(strings.Fields(line), world{}.environment())
}

// fields are the exported fields that differ from those of a plain command.
func fields(c *dropin.Command) map[string]any {
	base := parse("x")
	got := map[string]any{}
	for i, f := range reflect.VisibleFields(reflect.TypeFor[dropin.Command]()) {
		if !f.IsExported() || f.Name == "PassOn" || f.Name == "Name" {
			continue
		}
		value := reflect.ValueOf(*c).Field(i).Interface()
		if !reflect.DeepEqual(value, reflect.ValueOf(*base).Field(i).Interface()) {
			got[f.Name] = value
		}
	}
	return got
}

type want = map[string]any

func TestParseFields(t *testing.T) {
	for _, test := range []struct {
		line, name string
		want       want
	}{
		{"dump -t 5", "dump", want{"Tree": 5}},
		{"-t5 dump", "dump", want{"Tree": 5}},
		{"dump --tree=5", "dump", want{"Tree": 5}},
		{"dump --tree 5 --tree 6", "dump", want{"Tree": 6}},
		{"dump --tre 5", "dump", want{"Tree": 5}},
		{"-D /i dump -t 5 -W /w", "dump", want{"Tree": 5, "ImagesDir": "/i", "WorkDir": "/w"}},
		{"dump --images-dir=a=b -t 5", "dump", want{"Tree": 5, "ImagesDir": "a=b"}},
		{"dump --im /i -t 5", "dump", want{"Tree": 5, "ImagesDir": "/i"}},
		{"dump -t 5 -o a.log -o b.log", "dump", want{"Tree": 5, "LogFile": "b.log"}},
		{"dump -t 5 -o -", "dump", want{"Tree": 5, "LogFile": "-"}},
		{"dump -t 5 -o -- -D x", "dump", want{"Tree": 5, "LogFile": "--", "ImagesDir": "x"}},
		{"dump -Rt 5", "dump", want{"Tree": 5, "LeaveRunning": true}},
		{"dump -jlRt5", "dump", want{"Tree": 5, "LeaveRunning": true, "ShellJob": true}},
		{"dump -t 5 -R -s", "dump", want{"Tree": 5, "LeaveStopped": true}},
		{"dump -t 5 -s --leave-r", "dump", want{"Tree": 5, "LeaveRunning": true}},

		// The level starts at 2.
		{"dump -t 5 -v", "dump", want{"Tree": 5, "LogLevel": int32(3)}},
		{"dump -t 5 -v -v", "dump", want{"Tree": 5, "LogLevel": int32(4)}},
		{"dump -t 5 -vv", "dump", want{"Tree": 5, "LogLevel": int32(4)}},
		{"dump -t 5 -vvvv", "dump", want{"Tree": 5, "LogLevel": int32(6)}},
		{"dump -t 5 -v4", "dump", want{"Tree": 5, "LogLevel": int32(4)}},
		{"dump -t 5 -v0", "dump", want{"Tree": 5, "LogLevel": int32(0)}},
		{"dump -t 5 -v4 -v", "dump", want{"Tree": 5, "LogLevel": int32(5)}},
		{"dump -t 5 -v -v1", "dump", want{"Tree": 5, "LogLevel": int32(1)}},
		{"dump -t 5 -v-3x", "dump", want{"Tree": 5, "LogLevel": int32(-3)}},
		{"dump -t 5 -vR", "dump", want{"Tree": 5, "LogLevel": int32(0)}},
		{"dump -t 5 -vvR", "dump", want{"Tree": 5, "LogLevel": int32(5)}},
		{"dump -t 5 -Rv", "dump", want{"Tree": 5, "LogLevel": int32(3), "LeaveRunning": true}},
		{"dump -t 5 --verbosity", "dump", want{"Tree": 5, "LogLevel": int32(3)}},
		{"dump -t 5 --verb=4", "dump", want{"Tree": 5, "LogLevel": int32(4)}},
		{"dump -t 5 --verbosity=", "dump", want{"Tree": 5, "LogLevel": int32(0)}},
		{"dump -t 5 --verbosity=vv", "dump", want{"Tree": 5, "LogLevel": int32(5)}},

		{"dump -t 5 -x", "dump", want{"Tree": 5, "ExtUnixSk": true}},
		{"dump -t 5 -x1,2", "dump", want{"Tree": 5, "ExtUnixSk": true, "ExtUnixSkInodes": []uint32{1, 2}}},
		{"dump -t 5 --ext-unix-sk=7,", "dump", want{"Tree": 5, "ExtUnixSk": true, "ExtUnixSkInodes": []uint32{7}}},
		{"dump -t 5 --external unix[3] --external dev[1/2]:x", "dump", want{"Tree": 5, "External": []string{"unix[3]", "dev[1/2]:x"}}},
		{"dump -t 5 --ghost-limit 3M --pidfile p -r /c", "dump", want{"Tree": 5, "GhostLimit": uint64(3 << 20), "Pidfile": "p", "Root": "/c"}},
		{"dump -t 5 --page-server --lazy-pages --status-fd 7 --ps-socket 8 --close 9", "dump",
			want{"Tree": 5, "PageServer": true, "LazyPages": true, "FDs": []int{7, 8, 9}}},
		{"dump -t 5 --page-server --no-page-server", "dump", want{"Tree": 5}},
		{"dump -t 5 --stream --no-stream", "dump", want{"Tree": 5}},
		{"dump -t 5 --inherit-fd debug[7]:hello", "dump", want{"Tree": 5, "FDs": []int{7}}},
		{"dump -t 5 --cpu-cap --manage-cgroups=full --network-lock skip --no-ghost-fiemap", "dump", want{"Tree": 5}},
		{"dump -t 5 --mmap-page-image", "dump", want{"Tree": 5}},
		{"dump -t 5 --config /nowhere", "dump", want{"Tree": 5}},

		{"restore", "restore", want{}},
		{"-- restore", "restore", want{}},
		{"restore -dS", "restore", want{"Detach": true, "Sibling": true}},
		{"restore -d --no-restore-detached", "restore", want{}},
		{"restore --daemon", "restore", want{"Detach": true}},
		{"restore --restore-d --no-da", "restore", want{}},
		{"restore --exec-cmd -- a -b", "restore", want{"ExecCmd": []string{"a", "-b"}}},
		{"-D i --exec-cmd a restore b", "a", nil},
		{"restore --exec-cmd a -d -- b -c --no-d", "restore", nil},
		{"restore --exec a -v", "restore", want{"ExecCmd": []string{"a"}, "LogLevel": int32(3)}},
		{"restore -J net:/x --join-ns user:1,2,3", "restore", want{"JoinNS": []string{"net:/x", "user:1,2,3"}}},
		{"restore --inherit-fd fd[3]:socket:[5] --log-pid --stream", "restore",
			want{"InheritFD": []string{"fd[3]:socket:[5]"}, "FDs": []int{3}, "LogPid": true, "Stream": true}},
		{"restore --action-script a --action-script=b", "restore", want{"ActionScripts": []string{"a", "b"}}},
		{"restore -W . --shell-job --action-script /jdk/criuhelper -D cr --cpu-cap=none -v1 --exec-cmd -- /jdk/criuhelper restorewait", "restore",
			want{"WorkDir": ".", "ShellJob": true, "ActionScripts": []string{"/jdk/criuhelper"}, "ImagesDir": "cr",
				"LogLevel": int32(1), "ExecCmd": []string{"/jdk/criuhelper", "restorewait"}}},

		{"swrk 7", "swrk", want{"SwrkFD": 7}},
		{"swrk 7 -v4", "swrk", want{"SwrkFD": 7, "LogLevel": int32(4)}},
	} {
		t.Run(test.line, func(t *testing.T) {
			c := parse(test.line)
			if test.want == nil {
				if c.PassOn == "" {
					t.Error("not passed on")
				}
				return
			}
			if c.PassOn != "" || c.Name != test.name {
				t.Fatalf("command %q, passed on because %q", c.Name, c.PassOn)
			}
			if got := fields(c); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestParsePassesOn(t *testing.T) {
	for line, want := range map[string]string{
		"":                               "no command",
		"-v4":                            "no command",
		"--":                             "no command",
		"-h":                             "help",
		"dump -t 5 -- --help":            "help",
		"dump -t 5 -o -h":                "help",
		"dump -t 5 --hel":                "help",
		"-V":                             "version",
		"dump --vers -t 5":               "version",
		"dump --ver -t 5":                "ambiguous",
		"dump -t 5 --tcp":                "ambiguous",
		"dump --tr 5":                    "ambiguous",
		"dump -vRt 5":                    "no options",
		"dump -t 5 --al":                 "ambiguous",
		"dump -t 5 --no-de":              "ambiguous",
		"dump -t 5 --=x":                 "ambiguous",
		"dump -t 5 --quick":              "unknown option --quick",
		"dump -t 5 ---v":                 "unknown option",
		"dump -t 5 --no-leave-running":   "unknown option",
		"dump -t 5 -vRq -Z":              "unknown option -Z",
		"dump -t 5 -R=1":                 "unknown option -=",
		"dump -t 5 --leave-running=1":    "does not take an argument",
		"dump -t":                        "requires an argument",
		"dump -t 5 --config":             "requires an argument",
		"dump":                           "no pid",
		"dump -t x":                      "not a pid",
		"dump -t -- 5":                   "not a pid",
		"dump -t 4294967296":             "not a pid",
		"dump 5":                         "no options",
		"dump -t 5 -v 4":                 "no options",
		"dump -t 5 -x 1":                 "no options",
		"dump -t 5 -":                    "no options",
		"dump -t 5 --exec-cmd":           "needs a command",
		"dump -t 5 --exec-cmd -- ls":     "restore only",
		"restore -d --exec-cmd -- ls":    "exclude",
		"restore --exec-cmd":             "needs a command",
		"dump -t 5 --stream":             "--stream",
		"dump -t 5 --inherit-fd fd[3]:a": "restore only",
		"restore --inherit-fd 3:a":       "not fd[N]",
		"restore --inherit-fd fd[3]:":    "not fd[N]",
		"restore --inherit-fd fd[-3]:a":  "not fd[N]",
		"restore -S":                     "--restore-detached",
		"dump -t 5 -x1,z":                "list of inodes",
		"dump -t 5 -D=1 --images-dir=":   "empty",
		"dump -t 5 --log-file=":          "empty",
		"dump -t 5 --work-dir=":          "empty",
		"dump -t 5 --mntns-compat-mode":  "restore only",
		"restore --ps-socket 1 -d":       "standard descriptors",
		"restore --status-fd x":          "not a number",
		"dump -t 5 --ms":                 "--ms",
		"dump -t 5 --feature list":       "criu check",
		"check":                          "check",
		"pre-dump -t 5":                  "pre-dump",
		"cpuinfo dump":                   "cpuinfo",
		"service --address x":            "service",
		"freeze -t 5":                    "unknown command",
		"swrk":                           "one argument",
		"swrk 3 4":                       "one argument",
	} {
		if got := parse(line).PassOn; !strings.Contains(got, want) {
			t.Errorf("criu %s: passed on because %q, want %q", line, got, want)
		}
	}
	if c := parse("--help"); !c.Help || c.Version {
		t.Errorf("--help: %+v", c)
	}
	if c := parse("check -V"); c.Help || !c.Version {
		t.Errorf("-V: %+v", c)
	}
}

func TestOptionsAndInsert(t *testing.T) {
	for _, test := range []struct{ line, options, inserted string }{
		{"dump -t 5 -D i", "-t 5 -D i", "dump + -t 5 -D i"},
		{"-v4 -D dump dump -t 5 -o restore", "-v4 -D dump -t 5 -o restore", "-v4 -D dump dump + -t 5 -o restore"},
		{"restore --exec-cmd -d -- a -b", "--exec-cmd -d", "restore + --exec-cmd -d -- a -b"},
		{"-d -- restore", "-d", "-d + -- restore"},
		{"-d restore --", "-d", "-d restore + --"},
		{"dump -Rt 5 -o --", "-Rt 5 -o --", "dump + -Rt 5 -o --"},
	} {
		c := parse(test.line)
		if got := strings.Join(c.Options(), " "); got != test.options {
			t.Errorf("options of %q: %q, want %q", test.line, got, test.options)
		}
		if got := strings.Join(c.Insert("+"), " "); got != test.inserted {
			t.Errorf("insert into %q: %q, want %q", test.line, got, test.inserted)
		}
	}
	posix := world{vars: map[string]string{"POSIXLY_CORRECT": ""}}.environment()
	c := dropin.Parse([]string{"-d", "restore"}, posix)
	if got := strings.Join(c.Insert("+"), " "); got != "-d + restore" || c.PassOn != "" {
		t.Errorf("with POSIXLY_CORRECT: %q, passed on because %q", got, c.PassOn)
	}
	if c := dropin.Parse([]string{"dump", "-t", "5"}, posix); c.PassOn == "" {
		t.Error("with POSIXLY_CORRECT, options behind the command were taken for options")
	}
}

func TestParseLeavesArgumentsAlone(t *testing.T) {
	args := []string{"dump", "-t", "5"}
	c := dropin.Parse(args, world{}.environment())
	c.Insert("-d")[0] = "x"
	c.Options()[0] = "x"
	if !slices.Equal(args, []string{"dump", "-t", "5"}) || c.Insert()[0] != "dump" {
		t.Errorf("changed to %q", args)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("dump\n-t\n5\n-vRx\n--log-file=x", "verbosity 4\nroot \"/a b\" # c")
	f.Add("restore\n--exec-cmd\n--\na\n--config=b", "images-dir\t/x\n\n --\ntree")
	f.Add("-Rt5\n--verb=vv\ndump\n--ghost-l\n9999999999999999999G", "action-script \"a\\\"b\"\r\n#\n \"")
	f.Fuzz(func(t *testing.T, line, config string) {
		env := world{
			vars:  map[string]string{"CRIU_CONFIG_FILE": "/c", "HOME": "/h"},
			files: map[string]string{"/c": config},
			err:   errors.ErrUnsupported,
		}
		env.files["/h/.criu/default.conf"], env.files["/etc/criu/default.conf"] = "", ""
		args := strings.Split(line, "\n")
		c := dropin.Parse(args, env.environment())
		if len(c.Insert("a", "b")) < len(args) || len(c.Options()) > len(args) {
			t.Fatalf("%q: arguments lost: %q", args, c.Insert())
		}
		if c.PassOn != "" || c.Name != "dump" {
			return
		}
		again := dropin.Parse(append(c.Options(), "swrk", "0"), env.environment())
		if again.PassOn != "" || !reflect.DeepEqual(fields(again), fields(c)) {
			t.Errorf("%q: %v, but %q: %v (passed on because %q)",
				args, fields(c), c.Options(), fields(again), again.PassOn)
		}
	})
}
