// SPDX-License-Identifier: Apache-2.0

package criurpc

// Decode is the decoder of messages, for the fuzzer.
var Decode = decode
