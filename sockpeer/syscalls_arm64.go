// SPDX-License-Identifier: Apache-2.0

package sockpeer

// hidesCalls: a stopped thread does not show the system call it is in.
const hidesCalls = true
