// SPDX-License-Identifier: Apache-2.0

package rule

// For tests of what needs another user than the one who runs them.
var (
	CheckOwner = checkOwner
	EscapeGlob = escapeGlob
	Nearest    = nearest
)
