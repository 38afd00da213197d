// SPDX-License-Identifier: Apache-2.0

package action

import "time"

// SetLimit shortens what post-dump may take.
func (s *Script) SetLimit(limit time.Duration) { s.limit = limit }
