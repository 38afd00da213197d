// SPDX-License-Identifier: Apache-2.0

package dropin

import (
	"math"
	"strings"
)

// integer reads a decimal number as strtol(3) does on a 64-bit machine: blanks
// and a sign may precede it, anything may follow, and it saturates.
func integer(s string) (value int64, rest string, ok bool) {
	digits := strings.TrimLeft(s, blanks+"\n")
	negative := strings.HasPrefix(digits, "-")
	if negative || strings.HasPrefix(digits, "+") {
		digits = digits[1:]
	}
	sign := int64(1)
	limit := uint64(math.MaxInt64)
	if negative {
		sign, limit = -1, limit+1
	}
	var magnitude uint64
	i := 0
	for ; i < len(digits) && '0' <= digits[i] && digits[i] <= '9'; i++ {
		if digit := uint64(digits[i] - '0'); magnitude <= (limit-digit)/10 {
			magnitude = magnitude*10 + digit
		} else {
			magnitude = limit
		}
	}
	if i == 0 {
		return 0, s, false
	}
	return sign * int64(magnitude), digits[i:], true // -2^63 stays what it is
}

// atoi is atoi(3) of glibc: the number cut to 32 bits, 0 if there is none.
func atoi(s string) int {
	value, _, _ := integer(s)
	return int(int32(value)) // cut as in CRIU
}

// size is parse_size of criu/config.c, in bytes.
func size(s string) uint64 {
	value, _, _ := integer(s)
	for shift, letter := range []string{"K", "M", "G"} {
		if strings.Contains(s, letter) {
			value <<= 10 * (shift + 1)
			break
		}
	}
	return uint64(value) // wraps as in CRIU
}
