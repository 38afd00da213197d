// SPDX-License-Identifier: Apache-2.0

package action

import "time"

// SetLimit shortens what a stage may take while the tree is frozen.
func (s *Script) SetLimit(limit time.Duration) { s.limit = limit }
