// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// MaxFileSize bounds a configuration file, in bytes.
const MaxFileSize = 1 << 20

// File is what one configuration file says.
type File struct {
	Name  string
	Rules []Rule
	// Unknown and Inbound are nil where the file does not say.
	Unknown, Inbound *Action
	// CRIU is the path of the real CRIU; "": the file names none.
	CRIU string
	// Service is what the file says of the service, over the defaults; nil: nothing.
	Service *Service

	service yaml.Node   // the same, to be read over what other files say
	names   []yaml.Node // where each rule is named
}

var fileKeys = []string{"rules", "unknown", "inbound", "criu", "service"}

// Parse reads one configuration file; name is what errors call it. The error
// joins one *Error for each mistake. Whether names clash with the built-in
// rules is for File.Clashes to say.
func Parse(name string, r io.Reader) (*File, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	p := &problems{file: name}
	doc := document(data, p)
	if len(p.list) > 0 {
		return nil, p.err()
	}
	f := &File{Name: name}
	if doc != nil {
		f.decode(doc, p)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return f, nil
}

// document returns the file's only YAML document, nil for an empty file.
func document(data []byte, p *problems) *yaml.Node {
	if len(data) > MaxFileSize {
		p.add(1, 1, fmt.Sprintf("the file is larger than %d bytes, too large for rules", MaxFileSize))
		return nil
	}
	if !checkText(data, p) {
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, next yaml.Node
	if err := dec.Decode(&doc); err != nil {
		if !errors.Is(err, io.EOF) {
			syntaxError(err, p)
		}
		return nil
	}
	switch err := dec.Decode(&next); {
	case err == nil:
		p.at(&next, "a second YAML document: put everything into one")
		return nil
	case !errors.Is(err, io.EOF):
		syntaxError(err, p)
		return nil
	}
	if len(doc.Content) != 1 {
		return nil
	}
	checkPlain(doc.Content[0], p)
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.ShortTag() == "!!null" {
		return nil
	}
	return root
}

// checkText refuses what the YAML reader would refuse without saying where.
func checkText(data []byte, p *problems) bool {
	line, start := 1, 0
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		bad := ""
		switch {
		case r == utf8.RuneError && n == 1:
			bad = "not UTF-8"
		case r < 0x20 && r != '\n' && r != '\r' && r != '\t', r == 0x7f:
			bad = fmt.Sprintf("control character %#U: write it as an escape in double quotes", r)
		}
		if bad != "" {
			p.add(line, i-start+1, bad)
			return false
		}
		i += n
		if r == '\n' {
			line, start = line+1, i
		}
	}
	return true
}

var yamlLine = regexp.MustCompile(`^yaml: line (\d+): `)

// syntaxError files an error of the YAML parser, which knows no columns.
func syntaxError(err error, p *problems) {
	msg, line := err.Error(), 1
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		line, _ = strconv.Atoi(m[1])
		msg = msg[len(m[0]):]
	}
	p.add(line, 1, "not YAML: "+strings.TrimPrefix(msg, "yaml: "))
}

// checkPlain refuses the parts of YAML by which a file can say something else
// than it seems to.
func checkPlain(n *yaml.Node, p *problems) {
	switch {
	case n.Kind == yaml.AliasNode:
		p.at(n, "an alias (*%s) is not allowed here: write the value out, or put it in quotes", n.Value)
		return
	case n.Anchor != "":
		p.at(n, "an anchor (&%s) is not allowed here: write the value out, or put it in quotes", n.Anchor)
	case n.Style&yaml.TaggedStyle != 0:
		p.at(n, "a tag (%s) is not allowed here", n.Tag)
	}
	for _, c := range n.Content {
		checkPlain(c, p)
	}
}

// kind names what a node is, for people.
func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		switch n.ShortTag() {
		case "!!null":
			return "nothing"
		case "!!int", "!!float":
			return "a number"
		case "!!bool":
			return "a truth value"
		case "!!timestamp":
			return "a date"
		}
		return "a string"
	}
	return "something else"
}

// pairs walks a mapping and reports unknown and duplicate keys; what names the
// mapping. It returns the values by key.
func pairs(n *yaml.Node, what string, known []string, p *problems) map[string]*yaml.Node {
	values := make(map[string]*yaml.Node)
	if n.Kind != yaml.MappingNode {
		p.at(n, "%s must be a mapping (key: value), not %s", what, kind(n))
		return nil
	}
	first := make(map[string]*yaml.Node)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			p.at(key, "a key of %s must be a word, not %s", what, kind(key))
			continue
		}
		if key.ShortTag() == "!!merge" {
			p.at(key, "a merge key (<<) is not allowed here: write the keys out")
			continue
		}
		if old := first[key.Value]; old != nil {
			p.at(key, "key %q is there twice, first in line %d", key.Value, old.Line)
			continue
		}
		first[key.Value] = key
		if !slices.Contains(known, key.Value) {
			if near := nearest(key.Value, known); near != "" {
				p.at(key, "unknown key %q in %s: did you mean %q?", key.Value, what, near)
			} else {
				p.at(key, "unknown key %q in %s: known are %s", key.Value, what, strings.Join(known, ", "))
			}
			continue
		}
		values[key.Value] = value
	}
	return values
}

func (f *File) decode(root *yaml.Node, p *problems) {
	values := pairs(root, "the file", fileKeys, p)
	for _, d := range []struct {
		key string
		to  **Action
	}{{"unknown", &f.Unknown}, {"inbound", &f.Inbound}} {
		if n := values[d.key]; n != nil {
			a := oneOf(n, d.key, defaultActions, p)
			*d.to = &a
		}
	}
	if n := values["criu"]; n != nil {
		f.CRIU, _ = text(n, "criu", p)
		if f.CRIU != "" && (!path.IsAbs(f.CRIU) || strings.ContainsRune(f.CRIU, 0)) {
			p.at(n, "criu must be an absolute path, not %q", f.CRIU)
		}
	}
	if n := values["service"]; n != nil {
		s := decodeService(n, DefaultService, p)
		f.Service, f.service = &s, *n
	}
	list := values["rules"]
	switch {
	case list == nil, list.Kind == yaml.ScalarNode && list.ShortTag() == "!!null":
		return // nothing, or a list of which every rule is commented out
	case list.Kind != yaml.SequenceNode:
		p.at(list, "rules must be a list (- name: …), not %s", kind(list))
		return
	}
	seen := make(map[string]int)
	for _, n := range list.Content {
		r, name := decodeRule(n, p)
		if name == nil {
			continue
		}
		if line, ok := seen[r.Name]; ok {
			p.at(name, "a second rule named %q, the first is in line %d", r.Name, line)
			continue
		}
		seen[r.Name] = name.Line
		f.Rules = append(f.Rules, r)
		f.names = append(f.names, yaml.Node{Line: name.Line, Column: name.Column})
	}
}

// Clashes reports the rules of the file that bear a built-in rule's name.
func (f *File) Clashes() error {
	builtIn := make(map[string]bool)
	for _, r := range BuiltIn() {
		builtIn[r.Name] = true
	}
	p := &problems{file: f.Name}
	for i, r := range f.Rules {
		if builtIn[r.Name] {
			p.at(&f.names[i], "%q is the name of a built-in rule: choose another; this rule comes before the built-in one whatever its name", r.Name)
		}
	}
	return p.err()
}
