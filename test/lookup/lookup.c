/* SPDX-License-Identifier: Apache-2.0
 *
 * lookup: looks users and groups up for ever, through glibc's name service,
 * and writes down how that goes. The application of the demo and of the tests:
 * it holds the connections and mapped caches that libnss_sss and nscd's client
 * make, and knows nothing of checkpoints.
 *
 * Usage: lookup -o STATS [-u USER]… [-g GROUP]… [-n NAME]… [-t THREADS] [-i MS] [-p]
 *
 *   -o STATS    file to report in; must lie where the process can write
 *   -u, -g      what to look up; a round is every name once
 *   -n NAME     a user that must be absent: no mapped cache can tell, so that
 *               each of these lookups goes over the connection
 *   -t THREADS  threads that look up, each on its own (default 1)
 *   -i MS       pause between two rounds of a thread (default 100)
 *   -p          pause until SIGUSR1 instead; the first round is made at once
 *
 * STATS has one line per thread, of a fixed length: CRIU refuses to reopen a
 * file whose size has changed since the dump. Each line:
 *
 *   thread N lookups N failed N longest_us N errno N uid N round_us N
 *
 * errno is that of the last failed lookup (ENOENT: no such name), uid the last
 * one found, round_us the longest wait in the last round. A line is rewritten
 * after every round.
 *
 * cc -O2 -Wall -pthread -o lookup lookup.c
 */
#define _GNU_SOURCE
#include <grp.h>
#include <pwd.h>
#include <string.h>

#include "rounds.h"

enum { MAX_NAMES = 64, BUFFER = 16384 };

static const char *users[MAX_NAMES], *groups[MAX_NAMES], *absent[MAX_NAMES];
static int nusers, ngroups, nabsent;

/* A name service says "no such name" with 0 and no entry. */
static int look_up_user(const char *name, unsigned *uid)
{
	char buf[BUFFER];
	struct passwd entry, *found;
	int error = getpwnam_r(name, &entry, buf, sizeof(buf), &found);

	if (error || !found)
		return error ? error : ENOENT;
	*uid = entry.pw_uid;
	error = getpwuid_r(*uid, &entry, buf, sizeof(buf), &found);
	if (error || !found)
		return error ? error : ENOENT;
	/* An answer that belongs to another question is the worst that could happen. */
	return strcmp(entry.pw_name, name) ? EBADMSG : 0;
}

static int look_up_group(const char *name)
{
	char buf[BUFFER];
	struct group entry, *found;
	int error = getgrnam_r(name, &entry, buf, sizeof(buf), &found);

	if (error || !found)
		return error ? error : ENOENT;
	return strcmp(entry.gr_name, name) ? EBADMSG : 0;
}

static int look_up_absent(const char *name)
{
	char buf[BUFFER];
	struct passwd entry, *found;
	int error = getpwnam_r(name, &entry, buf, sizeof(buf), &found);

	if (error)
		return error;
	return found ? EEXIST : 0;
}

static void look_up(long thread, struct stats *s)
{
	unsigned long start;

	(void)thread;
	for (int i = 0; i < nusers; i++) {
		start = now_us();
		count(s, look_up_user(users[i], &s->uid), start);
	}
	for (int i = 0; i < ngroups; i++) {
		start = now_us();
		count(s, look_up_group(groups[i]), start);
	}
	for (int i = 0; i < nabsent; i++) {
		start = now_us();
		count(s, look_up_absent(absent[i]), start);
	}
}

static void add(const char **names, int *n)
{
	if (*n == MAX_NAMES)
		errx(2, "more than %d names", MAX_NAMES);
	names[(*n)++] = optarg;
}

int main(int argc, char **argv)
{
	int opt;

	while ((opt = getopt(argc, argv, "u:g:n:" ROUNDS_OPTIONS)) != -1) {
		switch (opt) {
		case 'u':
			add(users, &nusers);
			break;
		case 'g':
			add(groups, &ngroups);
			break;
		case 'n':
			add(absent, &nabsent);
			break;
		default:
			rounds_option(opt);
		}
	}
	if (!rounds_ready() || nusers + ngroups + nabsent == 0 || optind < argc)
		errx(2, "usage: lookup -o STATS [-u USER]... [-g GROUP]... [-n NAME]... "
			"[-t THREADS] [-i MS] [-p]");
	make_rounds(look_up);
}
