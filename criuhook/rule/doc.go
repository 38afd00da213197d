// SPDX-License-Identifier: Apache-2.0

// Package rule holds the rules which say what becomes of a connection that
// leaves the process tree: the built-in ones, the configuration's, and which
// of them a connection falls under.
package rule
