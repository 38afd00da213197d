// SPDX-License-Identifier: Apache-2.0

package crac_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"criuhook/criuhook/crac"
)

// What the files of a JDK have in them that tells its generation.
const (
	prefixes    = "CRaCAllowedOpenFilePrefixes\x00"
	oldPrefixes = "CRAllowedOpenFilePrefixes\x00"
	library     = "\x7fELF…criu_location\x00path to the CRIU executable.\x00"
	libraryPath = library + "Cannot find CRIU executable on the PATH\x00"
	zulu        = "IMPLEMENTOR=\"Azul Systems, Inc.\"\nIMPLEMENTOR_VERSION=\"Zulu21.32+17-CRaC-CA\"\nJAVA_VERSION=\"21.0.2\"\nMODULES=\"java.base\"\n"
)

// jdk makes a tree of files and their contents; the name of a file can have a
// mode behind it.
func jdk(t *testing.T, files map[string]string) string {
	t.Helper()
	home := t.TempDir()
	for name, text := range files {
		mode := os.FileMode(0o644)
		if n, ok := strings.CutSuffix(name, " setuid"); ok {
			name, mode = n, 0o755|os.ModeSetuid
		}
		file := filepath.Join(home, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	return home
}

const criuhookProgram = "\x7fELF…path\tcriuhook/cmd/criuhook\nmod\tcriuhook\t(devel)\n"

// The layouts that there have been, oldest first.
var layouts = map[string]map[string]string{
	"program": {
		"bin/java": "", "lib/criuengine": "", "lib/criu": "\x7fELF", "lib/server/libjvm.so": "CREngine\x00CRaCEngine", "release": "JAVA_VERSION=\"17.0.7\"\n",
	},
	"program, prefixes": {
		"bin/java": "", "lib/criuengine": "", "lib/criu setuid": "\x7fELF", "lib/server/libjvm.so": "CREngine\x00" + oldPrefixes, "release": zulu,
	},
	"program by library": {
		"bin/java": "", "lib/criuengine": "", "lib/libcrexec.so": "", "lib/criu": "\x7fELF", "lib/server/libjvm.so": "CRaCEngine\x00" + prefixes,
	},
	"library": {
		"bin/java": "", "lib/criuhelper": "", "lib/libcriuengine.so": library, "lib/criu": "\x7fELF", "lib/server/libjvm.so": "CRaCEngine\x00" + prefixes,
	},
	"library, with Warp": {
		"bin/java": "", "lib/criuhelper": "", "lib/libcriuengine.so": library, "lib/libwarp.so": "", "lib/criu": "\x7fELF",
		"lib/server/libjvm.so": "CRaCEngine\x00" + prefixes,
	},
	"library, without a CRIU": {
		"bin/java": "", "lib/criuhelper": "", "lib/libcriuengine.so": library, "lib/server/libjvm.so": "CRaCEngine\x00" + prefixes,
	},
	"library by PATH": {
		"bin/java": "", "lib/criuhelper": "", "lib/libcriuengine.so": libraryPath, "lib/criu": "\x7fELF", "lib/client/libjvm.so": "CRaCEngine\x00" + prefixes,
	},
	"bundled": {
		"bin/java": "", "lib/criuengine": "", "lib/criu setuid": criuhookProgram, "lib/criu.real": "\x7fELF", "lib/server/libjvm.so": prefixes, "release": zulu,
	},
}

func TestInspect(t *testing.T) {
	for _, tt := range []struct {
		name                  string
		engine                crac.Engine
		criu                  string
		setUID, bundled, warp bool
		version, vendor       string
	}{
		{name: "program", engine: crac.Program, criu: "lib/criu", version: "17.0.7"},
		{name: "program, prefixes", engine: crac.Program, criu: "lib/criu", setUID: true, version: "21.0.2", vendor: "Azul Systems, Inc. Zulu21.32+17-CRaC-CA"},
		{name: "program by library", engine: crac.ProgramByLibrary, criu: "lib/criu"},
		{name: "library", engine: crac.Library, criu: "lib/criu"},
		{name: "library, with Warp", engine: crac.Library, criu: "lib/criu", warp: true},
		{name: "library, without a CRIU", engine: crac.Library},
		{name: "library by PATH", engine: crac.LibraryByPath},
		{name: "bundled", engine: crac.Program, criu: "lib/criu", setUID: true, bundled: true, version: "21.0.2", vendor: "Azul Systems, Inc. Zulu21.32+17-CRaC-CA"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			home := jdk(t, layouts[tt.name])
			j, err := crac.Inspect(home)
			if err != nil {
				t.Fatal(err)
			}
			if tt.criu != "" {
				tt.criu = filepath.Join(home, tt.criu)
			}
			if j.Home != home || j.Engine != tt.engine || j.CRIU != tt.criu || j.SetUID != tt.setUID || j.Bundled != tt.bundled ||
				j.Warp != tt.warp || j.Version != tt.version || j.Vendor != tt.vendor {
				t.Errorf("got %+v", j)
			}
			if j.CRIU != "" && j.Owner != uint32(os.Getuid()) {
				t.Errorf("owner %d", j.Owner)
			}
		})
	}
}

func TestInspectRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string
		is    error
	}{
		{name: "nothing", files: nil, want: "no JDK is there"},
		{name: "an ordinary JDK", files: map[string]string{"bin/java": "", "lib/server/libjvm.so": ""}, want: "neither lib/criuengine nor", is: crac.ErrNoCRaC},
		{name: "without a JVM", files: map[string]string{"bin/java": "", "lib/criuengine": ""}, want: "no libjvm.so"},
		{name: "a later engine", files: map[string]string{"bin/java": "", "lib/libcriuengine.so": "\x7fELF", "lib/server/libjvm.so": prefixes}, want: "a newer generation"},
		{name: "half a bundle", files: map[string]string{"bin/java": "", "lib/criuengine": "", "lib/criu": criuhookProgram, "lib/server/libjvm.so": prefixes},
			want: "reinstall the JDK's lib/criu"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			home := jdk(t, tt.files)
			_, err := crac.Inspect(home)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), home) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, err := crac.Inspect("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// A text across the border of two blocks is found, in a file of any size.
func TestInspectLongFiles(t *testing.T) {
	files := map[string]string{"bin/java": "", "lib/criuengine": "", "lib/criu": "\x7fELF"}
	for _, before := range []int{1<<20 - 5, 1<<20 + 1<<19, 3<<20 - len(prefixes) - 2, 2<<20 - 1} {
		files["lib/server/libjvm.so"] = strings.Repeat("x", before) + prefixes + strings.Repeat("y", 1000)
		j, err := crac.Inspect(jdk(t, files))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := j.Settings(crac.Checkpoint, crac.Way{Script: "/bin/criuhook"}); err != nil {
			t.Errorf("after %d bytes: %v", before, err)
		}
	}
}
