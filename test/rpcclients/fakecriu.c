/* SPDX-License-Identifier: Apache-2.0
 *
 * A FAKE of "criu swrk FD": says yes to everything, and does nothing. To see what a
 * service makes of many requests, and of kinds that CRIU cannot do everywhere
 * (pre-dumps take a kernel that tracks memory). Each start appends a line to
 * /tmp/fakecriu.trace.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DUMP = 1, PRE_DUMP = 4, VERSION = 10 };

/* One answer: type and success; for VERSION 9.9, for DUMP restored = false. */
static int answer(int sk, int type)
{
	unsigned char version[] = { 0x08, VERSION, 0x10, 1, 0x52, 4, 0x08, 9, 0x10, 9 };
	unsigned char dump[] = { 0x08, DUMP, 0x10, 1, 0x1a, 2, 0x08, 0 };
	unsigned char other[] = { 0x08, (unsigned char)type, 0x10, 1 };

	if (type == VERSION)
		return send(sk, version, sizeof(version), MSG_NOSIGNAL) < 0;
	if (type == DUMP)
		return send(sk, dump, sizeof(dump), MSG_NOSIGNAL) < 0;
	return send(sk, other, sizeof(other), MSG_NOSIGNAL) < 0;
}

int main(int argc, char **argv)
{
	unsigned char b[4096];
	char line[64];
	int sk = -1, i, trace = open("/tmp/fakecriu.trace", O_WRONLY | O_APPEND);

	snprintf(line, sizeof(line), "started uid %d euid %d\n", (int)getuid(), (int)geteuid());
	if (trace >= 0 && write(trace, line, strlen(line)) < 0)
		return 1;
	for (i = 1; i + 1 < argc; i++)
		if (!strcmp(argv[i], "swrk"))
			sk = atoi(argv[i + 1]);
	for (;;) {
		ssize_t n = recv(sk, b, sizeof(b), 0);

		if (n < 2 || b[0] != 0x08 || answer(sk, b[1]))
			return 1;
		if (b[1] != PRE_DUMP)
			return 0;
	}
}
