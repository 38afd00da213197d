// SPDX-License-Identifier: Apache-2.0

package rule

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Service is what the configuration says about "criuhook serve".
type Service struct {
	// UIDs and GIDs may have their own processes dumped, besides root. A group
	// counts if it is among the client's supplementary ones too.
	UIDs, GIDs []uint32
	// Requests is how many clients are worked for at the same time, Clients how
	// many may be connected.
	Requests, Clients int
	// Message is the size in bytes of the largest message taken from a client.
	Message int
	// Idle is how long a client may say nothing when it is its turn; Drain how
	// long work under way may go on after the service was told to end.
	Idle, Drain time.Duration
}

// DefaultService is what holds where the configuration says nothing.
var DefaultService = Service{
	Requests: 16,
	Clients:  256,
	Message:  1 << 20,
	Idle:     5 * time.Minute,
	Drain:    5 * time.Minute,
}

// Bounds of the configuration of the service.
const (
	maxRequests = 1024
	maxClients  = 16384
	minMessage  = 4 << 10
	maxMessage  = 64 << 20
	maxLong     = 24 * time.Hour
)

var serviceKeys = []string{"uids", "gids", "requests", "clients", "message", "idle", "drain"}

// decodeService reads the section over what held before it.
func decodeService(n *yaml.Node, s Service, p *problems) Service {
	v := pairs(n, "service", serviceKeys, p)
	for _, d := range []struct {
		key string
		to  *[]uint32
	}{{"uids", &s.UIDs}, {"gids", &s.GIDs}} {
		if n := v[d.key]; n != nil {
			*d.to = ids(n, d.key, p)
		}
	}
	for _, d := range []struct {
		key      string
		to       *int
		min, max int
	}{
		{"requests", &s.Requests, 1, maxRequests},
		{"clients", &s.Clients, 1, maxClients},
		{"message", &s.Message, minMessage, maxMessage},
	} {
		if n := v[d.key]; n != nil {
			*d.to = count(n, d.key, d.min, d.max, p)
		}
	}
	for _, d := range []struct {
		key string
		to  *time.Duration
	}{{"idle", &s.Idle}, {"drain", &s.Drain}} {
		if n := v[d.key]; n != nil {
			*d.to = durationUpTo(n, d.key, maxLong, p)
		}
	}
	return s
}

// yaml writes what differs from the defaults.
func (s Service) yaml(b *strings.Builder) {
	begun := false
	key := func(differs bool, key, value string) {
		if !differs {
			return
		}
		if !begun {
			begun = true
			b.WriteString("service:\n")
		}
		fmt.Fprintf(b, "  %s: %s\n", key, value)
	}
	d := DefaultService
	list := func(ids []uint32) string { return strings.Join(strings.Fields(fmt.Sprint(ids)), ", ") }
	key(len(s.UIDs) > 0, "uids", list(s.UIDs))
	key(len(s.GIDs) > 0, "gids", list(s.GIDs))
	for _, n := range []struct {
		key       string
		is, usual int
	}{{"requests", s.Requests, d.Requests}, {"clients", s.Clients, d.Clients}, {"message", s.Message, d.Message}} {
		key(n.is != n.usual && n.is != 0, n.key, strconv.Itoa(n.is)) // 0: of a Set that was not read
	}
	key(s.Idle != d.Idle && s.Idle != 0, "idle", s.Idle.String())
	key(s.Drain != d.Drain && s.Drain != 0, "drain", s.Drain.String())
}

// ids is a list of numbers of users or groups.
func ids(n *yaml.Node, key string, p *problems) []uint32 {
	if n.Kind != yaml.SequenceNode {
		p.at(n, "%s must be a list of numbers ([1000, 1001]), not %s", key, kind(n))
		return nil
	}
	out := []uint32{} // none is another word than nothing said
	for _, e := range n.Content {
		id, err := strconv.ParseUint(e.Value, 10, 32)
		switch {
		case e.Kind != yaml.ScalarNode || e.ShortTag() != "!!int":
			p.at(e, "%s are numbers, not %s", key, kind(e))
		case err != nil || id == 1<<32-1 || e.Value != strconv.FormatUint(id, 10):
			p.at(e, "%s are decimal numbers from 0 to 4294967294, not %s", key, e.Value)
		case slices.Contains(out, uint32(id)):
			p.at(e, "%s is there twice in %s", e.Value, key)
		default:
			out = append(out, uint32(id))
		}
	}
	return out
}

func count(n *yaml.Node, key string, lowest, highest int, p *problems) int {
	i, err := strconv.ParseInt(n.Value, 10, 64)
	switch {
	case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int":
		p.at(n, "%s must be a number, not %s", key, kind(n))
	case err != nil || n.Value != strconv.FormatInt(i, 10) || i < int64(lowest) || i > int64(highest):
		p.at(n, "%s must be a decimal number from %d to %d, not %s", key, lowest, highest, n.Value)
	default:
		return int(i)
	}
	return lowest
}
