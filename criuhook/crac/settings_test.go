// SPDX-License-Identifier: Apache-2.0

package crac_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"criuhook/criuhook/crac"
)

const script = "/usr/local/bin/criuhook"

func inspect(t *testing.T, layout string) *crac.JDK {
	t.Helper()
	j, err := crac.Inspect(jdk(t, layouts[layout]))
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestSettings(t *testing.T) {
	byScript, byDropIn := crac.Way{Script: script}, crac.Way{DropIn: "/opt/crac/criu"}
	sockets := []string{"-XX:CRaCAllowedOpenFilePrefixes=socket:", "-XX:CRaCAllowedOpenFilePrefixes=/var/lib/sss/mc/"}
	oldSockets := []string{"-XX:CRAllowedOpenFilePrefixes=socket:", "-XX:CRAllowedOpenFilePrefixes=/var/lib/sss/mc/"}
	const (
		variable = "CRAC_CRIU_OPTS=--action-script=" + script
		option   = "-XX:CRaCEngineOptions=args=--action-script=" + script
		place    = "CRAC_CRIU_PATH=/opt/crac/criu"
		location = "-XX:CRaCEngineOptions=criu_location=/opt/crac/criu"
		own      = "CRIUHOOK_CRIU=HOME/lib/criu"
		engine   = "-XX:CRaCEngine=criuengine"
	)
	for _, tt := range []struct {
		layout string
		way    crac.Way
		both   []string // for checkpoint and restore
		more   []string // for the checkpoint
	}{
		{"program, prefixes", byScript, []string{variable}, oldSockets},
		{"program, prefixes", byDropIn, []string{place, own}, oldSockets},
		{"program by library", byScript, []string{variable}, sockets},
		{"program by library", byDropIn, []string{place, own}, sockets},
		{"library", byScript, []string{option}, sockets},
		{"library", byDropIn, []string{location, own}, sockets},
		{"library, with Warp", byScript, []string{option, engine}, sockets},
		{"library, without a CRIU", byDropIn, []string{location}, sockets},
		{"library by PATH", byScript, []string{option}, sockets},
		{"library by PATH", byDropIn, []string{location}, sockets},
		{"bundled", crac.Way{}, nil, sockets},
		{"bundled", byDropIn, nil, sockets},
	} {
		t.Run(tt.layout, func(t *testing.T) {
			j := inspect(t, tt.layout)
			for phase, want := range map[crac.Phase][]string{
				crac.Checkpoint: slices.Concat(tt.both, tt.more), crac.Restore: tt.both,
			} {
				list, err := j.Settings(phase, tt.way)
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, s := range list {
					got = append(got, strings.ReplaceAll(s.String(), j.Home, "HOME"))
					if s.Comment == "" || strings.Contains(s.Comment, "\n") {
						t.Errorf("%s: comment %q", s, s.Comment)
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("%v: got %q, expected %q", phase, got, want)
				}
			}
		})
	}
}

func TestSettingsRefuse(t *testing.T) {
	for _, tt := range []struct {
		layout string
		way    crac.Way
		want   string
	}{
		{"program", crac.Way{Script: script}, "knows neither -XX:CRaCAllowedOpenFilePrefixes nor"},
		{"library", crac.Way{Script: "criuhook"}, "not an absolute path"},
		{"library", crac.Way{Script: "/opt/my tools/criuhook"}, "link to it from a path without"},
		{"library", crac.Way{Script: "/opt/a,b/criuhook"}, "link to it from a path without"},
		{"library", crac.Way{Script: `/opt/a"b/criuhook`}, "link to it from a path without"},
		{"library", crac.Way{Script: "/opt/a'b/criuhook"}, "link to it from a path without"},
		{"library", crac.Way{Script: "/opt/$a/criuhook"}, "link to it from a path without"},
		{"library", crac.Way{Script: "/opt/a\tb/criuhook"}, "link to it from a path without"},
		{"program by library", crac.Way{Script: "/opt/a\u00a0b/criuhook"}, "link to it from a path without"},
		{"library", crac.Way{DropIn: "/opt/my tools/criu"}, "link to it from a path without"},
		{"library", crac.Way{DropIn: script}, "by the name criu"},
	} {
		j := inspect(t, tt.layout)
		list, err := j.Settings(crac.Checkpoint, tt.way)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, %+v: got %v, %v, expected %q", tt.layout, tt.way, list, err, tt.want)
		}
	}
}

// What is in the environment already stays, and doing it twice changes nothing.
func TestEnvironment(t *testing.T) {
	const (
		sockets = "-XX:CRaCAllowedOpenFilePrefixes=socket: -XX:CRaCAllowedOpenFilePrefixes=/var/lib/sss/mc/"
		args    = "-XX:CRaCEngineOptions=args=--action-script=" + script
	)
	for _, tt := range []struct {
		name, layout string
		phase        crac.Phase
		dropIn       string
		before       map[string]string
		want         map[string]string // nil: an error
		err          string
	}{
		{name: "nothing yet", layout: "program by library",
			want: map[string]string{"CRAC_CRIU_OPTS": "--action-script=" + script, "JDK_JAVA_OPTIONS": sockets}},
		{name: "nothing yet", layout: "program by library", phase: crac.Restore,
			want: map[string]string{"CRAC_CRIU_OPTS": "--action-script=" + script}},
		{name: "options of others", layout: "program by library",
			before: map[string]string{"CRAC_CRIU_OPTS": "--ghost-limit 64M", "JDK_JAVA_OPTIONS": "-Da='b  c' -Xmx1g"},
			want:   map[string]string{"CRAC_CRIU_OPTS": "--ghost-limit 64M --action-script=" + script, "JDK_JAVA_OPTIONS": "-Da='b  c' -Xmx1g " + sockets}},
		{name: "after the checkpoint", layout: "program by library", phase: crac.Restore,
			before: map[string]string{"JDK_JAVA_OPTIONS": "-Da='b  c' " + sockets},
			want:   map[string]string{"CRAC_CRIU_OPTS": "--action-script=" + script, "JDK_JAVA_OPTIONS": "-Da='b  c'"}},
		{name: "after the checkpoint, nothing of others", layout: "bundled", phase: crac.Restore,
			before: map[string]string{"JDK_JAVA_OPTIONS": sockets},
			want:   map[string]string{"JDK_JAVA_OPTIONS": ""}},
		{name: "by option", layout: "library", want: map[string]string{"JDK_JAVA_OPTIONS": args + " " + sockets}},
		{name: "by option", layout: "library", phase: crac.Restore, want: map[string]string{"JDK_JAVA_OPTIONS": args}},
		{name: "after the checkpoint, by option", layout: "library", phase: crac.Restore,
			before: map[string]string{"JDK_JAVA_OPTIONS": args + " " + sockets},
			want:   map[string]string{"JDK_JAVA_OPTIONS": args}},
		{name: "another key", layout: "library",
			before: map[string]string{"JDK_JAVA_OPTIONS": "-XX:CRaCEngineOptions=keep_running=true"},
			want:   map[string]string{"JDK_JAVA_OPTIONS": "-XX:CRaCEngineOptions=keep_running=true " + args + " " + sockets}},
		{name: "the same key", layout: "library",
			before: map[string]string{"JDK_JAVA_OPTIONS": "-XX:CRaCEngineOptions=keep_running=true,args=-v4"}, err: "make one of both by hand"},
		{name: "bundled", layout: "bundled", phase: crac.Restore, want: map[string]string{}},
		{name: "a CRIU of the user's", layout: "program by library", phase: crac.Restore, dropIn: "/opt/crac/criu",
			before: map[string]string{"CRAC_CRIU_PATH": "/opt/own/criu"},
			want:   map[string]string{"CRAC_CRIU_PATH": "/opt/crac/criu", "CRIUHOOK_CRIU": "/opt/own/criu"}},
		{name: "a CRIU of the user's, named to criuhook", layout: "program by library", phase: crac.Restore, dropIn: "/opt/crac/criu",
			before: map[string]string{"CRAC_CRIU_PATH": "/opt/other/criu", "CRIUHOOK_CRIU": "/opt/own/criu"},
			want:   map[string]string{"CRAC_CRIU_PATH": "/opt/crac/criu", "CRIUHOOK_CRIU": "/opt/own/criu"}},
		{name: "no room", layout: "program by library",
			before: map[string]string{"CRAC_CRIU_OPTS": strings.Repeat("-v ", 15)}, err: "has room for 15"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := inspect(t, tt.layout)
			env := map[string]string{}
			for name, value := range tt.before {
				env[name] = value
			}
			for try := range 2 {
				vars, err := j.Environment(tt.phase, crac.Way{Script: script, DropIn: tt.dropIn}, func(name string) string { return env[name] })
				if tt.err != "" {
					if err == nil || !strings.Contains(err.Error(), tt.err) {
						t.Errorf("got %v, expected %q", err, tt.err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				got := map[string]string{}
				for _, s := range vars {
					got[s.Variable] = s.Value
					env[s.Variable] = s.Value
				}
				for name, value := range tt.want {
					if env[name] != value {
						t.Errorf("run %d: %s is %q, expected %q", try, name, env[name], value)
					}
				}
				if try == 0 && len(got) != len(tt.want) {
					t.Errorf("got %q", got)
				}
			}
		})
	}
}

func TestWords(t *testing.T) {
	if p, l := inspect(t, "library by PATH").Words(), inspect(t, "library").Words(); p >= l || p < 1 || l > 31 {
		t.Errorf("%d and %d", p, l)
	}
	if home := inspect(t, "library").Home; !filepath.IsAbs(home) {
		t.Errorf("%s is not absolute", home)
	}
}
