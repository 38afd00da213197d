// SPDX-License-Identifier: Apache-2.0

package swrk

import "time"

// SetLimit shortens what each step may take while the tree is frozen.
func (s *Stages) SetLimit(limit time.Duration) { s.look, s.write = limit, limit }
