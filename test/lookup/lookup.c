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
 *   thread N lookups N failed N longest_us N errno N uid N
 *
 * errno is that of the last failed lookup (ENOENT: no such name), uid the last
 * one found. A line is rewritten after every round.
 *
 * cc -O2 -Wall -pthread -o lookup lookup.c
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_NAMES = 64, MAX_THREADS = 256, LINE = 112, BUFFER = 16384 };

struct stats {
	unsigned long lookups, failed, longest_us;
	int error;
	unsigned uid;
};

static const char *users[MAX_NAMES], *groups[MAX_NAMES], *absent[MAX_NAMES];
static int nusers, ngroups, nabsent;
static int out = -1, threads = 1, paused;
static struct timespec interval = { 0, 100 * 1000 * 1000 };

/* Rounds asked for by SIGUSR1, the first one included. */
static unsigned long rounds = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER;

static unsigned long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000UL + t.tv_nsec / 1000;
}

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

static void count(struct stats *s, int error, unsigned long start_us)
{
	unsigned long us = now_us() - start_us;

	s->lookups++;
	if (us > s->longest_us)
		s->longest_us = us;
	if (error) {
		s->failed++;
		s->error = error;
	}
}

static void report(long thread, const struct stats *s)
{
	char line[LINE + 1];
	int n = snprintf(line, sizeof(line),
			 "thread %3ld lookups %10lu failed %10lu longest_us %10lu errno %4d uid %10u",
			 thread, s->lookups, s->failed, s->longest_us, s->error, s->uid);

	memset(line + n, ' ', LINE - n);
	line[LINE - 1] = '\n';
	if (pwrite(out, line, LINE, thread * LINE) != LINE)
		err(1, "cannot write the stats of thread %ld", thread);
}

static void wait_for_round(unsigned long done)
{
	if (!paused) {
		/* A restore may cut the pause short; no harm. */
		nanosleep(&interval, NULL);
		return;
	}
	pthread_mutex_lock(&lock);
	while (rounds <= done)
		pthread_cond_wait(&asked, &lock);
	pthread_mutex_unlock(&lock);
}

static void *look_up(void *arg)
{
	long thread = (long)arg;
	unsigned long done = 0, start;
	struct stats s = { 0 };

	for (;;) {
		for (int i = 0; i < nusers; i++) {
			start = now_us();
			count(&s, look_up_user(users[i], &s.uid), start);
		}
		for (int i = 0; i < ngroups; i++) {
			start = now_us();
			count(&s, look_up_group(groups[i]), start);
		}
		for (int i = 0; i < nabsent; i++) {
			start = now_us();
			count(&s, look_up_absent(absent[i]), start);
		}
		report(thread, &s);
		wait_for_round(++done);
	}
	return NULL;
}

static void add(const char **names, int *n)
{
	if (*n == MAX_NAMES)
		errx(2, "more than %d names", MAX_NAMES);
	names[(*n)++] = optarg;
}

int main(int argc, char **argv)
{
	sigset_t wanted;
	pthread_t id;
	int opt, signal, ms;

	while ((opt = getopt(argc, argv, "o:u:g:n:t:i:p")) != -1) {
		switch (opt) {
		case 'o':
			/* A number that is 0, 1 or 2 would mean that stdio is not there. */
			out = open(optarg, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
			if (out < 0)
				err(1, "cannot make the stats file %s", optarg);
			if (out < 3)
				errx(1, "start me with stdin, stdout and stderr, on /dev/null if need be");
			break;
		case 'u':
			add(users, &nusers);
			break;
		case 'g':
			add(groups, &ngroups);
			break;
		case 'n':
			add(absent, &nabsent);
			break;
		case 't':
			threads = atoi(optarg);
			break;
		case 'i':
			ms = atoi(optarg);
			interval.tv_sec = ms / 1000;
			interval.tv_nsec = ms % 1000 * 1000000L;
			break;
		case 'p':
			paused = 1;
			break;
		default:
			return 2;
		}
	}
	if (out < 0 || nusers + ngroups + nabsent == 0 || threads < 1 ||
	    threads > MAX_THREADS || optind < argc)
		errx(2, "usage: lookup -o STATS [-u USER]... [-g GROUP]... [-n NAME]... "
			"[-t THREADS] [-i MS] [-p]");

	for (long i = 0; i < threads; i++) /* the file has its full size from the start */
		report(i, &(struct stats){ 0 });

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &wanted, NULL);
	for (long i = 0; i < threads; i++) {
		errno = pthread_create(&id, NULL, look_up, (void *)i);
		if (errno)
			err(1, "cannot start thread %ld", i);
	}
	for (;;) {
		sigwait(&wanted, &signal);
		pthread_mutex_lock(&lock);
		rounds++;
		pthread_cond_broadcast(&asked);
		pthread_mutex_unlock(&lock);
	}
}
