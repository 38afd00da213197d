// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"sync"
)

// slots are the places for requests under way. Users other than root can take
// half of them together, rounded up, so that root's requests always come to
// their turn.
type slots struct {
	all, others chan struct{}
	closed      chan struct{}
	once        *sync.Once
}

func newSlots(n int) slots {
	return slots{make(chan struct{}, n), make(chan struct{}, (n+1)/2), make(chan struct{}), &sync.Once{}}
}

// take waits for a place. gone is closed when nobody waits for the answer any more.
func (s slots) take(ctx context.Context, root bool, gone <-chan struct{}) (release func(), err error) {
	var held []chan struct{}
	release = func() {
		for _, c := range held {
			<-c
		}
		held = nil
	}
	want := []chan struct{}{s.all}
	if !root {
		want = []chan struct{}{s.others, s.all}
	}
	for _, c := range want {
		select {
		case <-s.closed: // also if there is a place
			release()
			return nil, errEnding
		default:
		}
		select {
		case c <- struct{}{}:
			held = append(held, c)
		case <-s.closed:
			release()
			return nil, errEnding
		case <-ctx.Done():
			release()
			return nil, context.Cause(ctx)
		case <-gone:
			release()
			return nil, errGone
		}
	}
	return release, nil
}

func (s slots) close() { s.once.Do(func() { close(s.closed) }) }
