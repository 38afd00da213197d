// SPDX-License-Identifier: Apache-2.0

package rule_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"criuhook/criuhook/rule"
)

func TestService(t *testing.T) {
	const text = `
service:
  uids: [1000, 1001]
  gids:
    - 2000
  requests: 2
  clients: 10
  message: 65536
  idle: 30s
  drain: 10m
`
	want := rule.Service{UIDs: []uint32{1000, 1001}, GIDs: []uint32{2000}, Requests: 2, Clients: 10, Message: 65536, Idle: 30 * time.Second, Drain: 10 * time.Minute}
	f, err := rule.Parse("x", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if f.Service == nil || !reflect.DeepEqual(*f.Service, want) {
		t.Errorf("%+v", f.Service)
	}
	again, err := (&rule.Set{Service: want}).YAML()
	if err != nil {
		t.Fatal(err)
	}
	if f, err = rule.Parse("x", strings.NewReader(string(again))); err != nil || f.Service == nil || !reflect.DeepEqual(*f.Service, want) {
		t.Errorf("%v\n%s", err, again)
	}
	again, err = (&rule.Set{Service: rule.DefaultService}).YAML()
	if err != nil || strings.Contains(string(again), "service") {
		t.Errorf("%v\n%s", err, again)
	}
}

func TestServiceErrors(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"service: 1", `x:1:10: service must be a mapping`},
		{"service: {uid: [1]}", `x:1:11: unknown key "uid" in service: did you mean "uids"?`},
		{"service: {uids: 1000}", `x:1:17: uids must be a list of numbers`},
		{"service: {uids: [alice]}", `x:1:18: uids are numbers, not a string`},
		{"service: {uids: [-1]}", `x:1:18: uids are decimal numbers`},
		{"service: {uids: [0x10]}", `x:1:18: uids are decimal numbers`},
		{"service: {gids: [4294967295]}", `x:1:18: gids are decimal numbers from 0 to 4294967294`},
		{"service: {gids: [1, 1]}", `x:1:21: 1 is there twice in gids`},
		{"service: {requests: 0}", `x:1:21: requests must be a decimal number from 1 to 1024`},
		{"service: {clients: many}", `x:1:20: clients must be a number, not a string`},
		{"service: {message: 100}", `x:1:20: message must be a decimal number from 4096`},
		{"service: {idle: 30}", `x:1:17: idle must be a duration with a unit`},
		{"service: {drain: 25h}", `x:1:18: drain must be more than 0 and at most 24h`},
	} {
		_, err := rule.Parse("x", strings.NewReader(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.text, err)
		}
	}
}

// TestLoadService: each key of its own from the last file that has it.
func TestLoadService(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	for name, text := range map[string]string{
		"config.yaml":    "service: {uids: [1], requests: 3}",
		"rules.d/a.yaml": "service: {uids: [2], idle: 1s}",
		"rules.d/b.yaml": "unknown: refuse",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	set, err := rule.Load(config, true)
	if err != nil {
		t.Fatal(err)
	}
	want := rule.DefaultService
	want.UIDs, want.Requests, want.Idle = []uint32{2}, 3, time.Second
	if !reflect.DeepEqual(set.Service, want) {
		t.Errorf("%+v, expected %+v", set.Service, want)
	}
	if set, err = rule.Load(filepath.Join(t.TempDir(), "none"), false); err != nil || !reflect.DeepEqual(set.Service, rule.DefaultService) {
		t.Errorf("%+v, %v", set, err)
	}
}
