// SPDX-License-Identifier: Apache-2.0

package swrk

import "time"

// SetLimit shortens what a step that writes may take while the tree is frozen.
func (s *Stages) SetLimit(write time.Duration) { s.write = write }
