// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// Environment is what CRIU's options depend on besides the command line.
type Environment struct {
	LookupEnv func(name string) (string, bool)
	// ReadFile reads a configuration file of CRIU. An error that a file which
	// cannot be opened gives is no obstacle, CRIU passes over such a file too;
	// any other makes [Parse] leave everything to CRIU.
	ReadFile func(name string) ([]byte, error)
}

// System is the environment of this process.
func System() Environment {
	return Environment{LookupEnv: os.LookupEnv, ReadFile: readConfig}
}

var errNotPlain = errors.New("not a regular file, reading it would take it away from CRIU")

// readConfig reads a file only if CRIU can read it again: --config may name a
// pipe. A directory or /dev/null is empty to CRIU.
func readConfig(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		null, err := os.Stat(os.DevNull)
		if info.IsDir() || err == nil && os.SameFile(info, null) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "read", Path: name, Err: errNotPlain}
	}
	return os.ReadFile(name)
}

// unopened tells whether CRIU's fopen fails in the same way; it then goes on
// without the file and without a word.
func unopened(err error) bool {
	for _, target := range []error{
		fs.ErrNotExist, fs.ErrPermission, syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// configFiles are the names of CRIU's configuration files in the order in which
// they count, all before the command line (next_config and pre_parse in
// config.c). As in CRIU, --config is looked for in every argument, be it a value
// or behind "--", and only where it is not abbreviated; the last one counts.
func configFiles(args []string, env Environment) []string {
	var chosen string
	var isChosen, noDefault bool
	for i, arg := range args {
		switch {
		case arg == "--no-default-config":
			noDefault = true
		case arg == "--config":
			noDefault, isChosen = true, i+1 < len(args)
			if isChosen {
				chosen = args[i+1]
			}
		case strings.Contains(arg, "--config="):
			// CRIU takes the name from this offset wherever the text stands.
			noDefault, isChosen, chosen = true, true, arg[len("--config="):]
		}
	}
	var files []string
	if !noDefault {
		files = append(files, "/etc/criu/default.conf")
		if home, ok := env.LookupEnv("HOME"); ok {
			files = append(files, home+"/.criu/default.conf")
		}
	}
	if name, ok := env.LookupEnv("CRIU_CONFIG_FILE"); ok {
		files = append(files, name)
	}
	if isChosen {
		files = append(files, chosen)
	}
	return files
}

// configArgs makes command line arguments of a configuration file, as CRIU's
// parse_config does. An error is one at which CRIU gives up.
func configArgs(data []byte) ([]string, error) {
	var args []string
	for number := 1; len(data) > 0; number++ {
		line := data
		if end := bytes.IndexByte(data, '\n'); end >= 0 {
			line = data[:end+1]
		}
		data = data[len(line):]
		more, err := statement(text(line))
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		args = append(args, more...)
	}
	return args, nil
}

var errFormat = errors.New("CRIU does not support this format")

// statement makes zero, one or two arguments of a line, with its newline if
// there is one. What looks odd here is so in CRIU's parse_statement.
func statement(line string) ([]string, error) {
	if line == "" {
		return nil, nil
	}
	line = trimSpace(line)
	if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "\n") {
		return nil, nil
	}
	line = strings.TrimSuffix(line, "\n")
	split := strings.IndexByte(line, ' ')
	if split < 0 {
		split = strings.IndexByte(line, '\t')
	}
	if split < 0 {
		return []string{"--" + line}, nil
	}
	name, rest := "--"+line[:split], strings.TrimLeft(line[split+1:], blanks)
	switch {
	case strings.HasPrefix(rest, "#"):
		return []string{name}, nil
	case strings.HasPrefix(rest, `"`):
		value, err := quoted(rest[1:], len(line)-len(rest)+1)
		return []string{name, value}, err
	}
	value, err := unescaped([]byte(rest), max(strings.IndexByte(rest, ' '), 0))
	return []string{name, value}, err
}

// quoted takes the value that follows the opening quote; at is where it starts
// in the line.
func quoted(rest string, at int) (string, error) {
	if rest == "" {
		return "", errFormat
	}
	if rest[0] == '"' {
		return "", nil
	}
	for end := 1; end < len(rest); end++ {
		if rest[end] != '"' || rest[end-1] == '\\' {
			continue
		}
		if onlySpace(rest[end+1:], true) {
			// CRIU now looks for excess words from this offset, meant for the line,
			// in the value: so some values with blanks are refused, others cut.
			return unescaped([]byte(rest[:end]), at+1)
		}
		break
	}
	return "", errFormat
}

// unescaped takes the backslash off each escaped quote, cuts a comment off, and
// refuses more than one word from offset on. The bytes are changed.
func unescaped(value []byte, offset int) (string, error) {
	if bytes.Contains(value, []byte(`\"`)) {
		plain := bytes.ReplaceAll(value, []byte(`\"`), []byte(`"`))
		offset += len(value) - len(plain) + 1
		value[copy(value, plain)] = 0 // what lies behind is still looked at below
	}
	if i := strings.IndexByte(text(value), '#'); i >= 0 {
		value[i] = 0
	}
	if offset < len(value) {
		tail := text(value[offset:])
		if !onlySpace(tail, false) {
			return "", errFormat
		}
		if i := strings.IndexByte(tail, ' '); i >= 0 {
			value[offset+i] = 0
		}
	}
	return text(value), nil
}

// onlySpace tells whether CRIU takes s, which may be followed by a comment, for
// blank: it looks only if there is a space in it, and never at its last byte.
func onlySpace(s string, comment bool) bool {
	if !strings.Contains(s, " ") {
		return true
	}
	for i := range len(s) - 1 {
		if comment && s[i] == '#' {
			break
		}
		if !strings.Contains(blanks, s[i:i+1]) {
			return false
		}
	}
	return true
}

// blanks are what isspace(3) takes for white space, less the newline, which
// ends a line.
const blanks = " \t\v\f\r"

func trimSpace(s string) string { return strings.TrimLeft(s, blanks) }

// text is the C string that the bytes hold: up to a NUL, if there is one.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
