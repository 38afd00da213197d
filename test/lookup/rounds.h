/* SPDX-License-Identifier: Apache-2.0
 *
 * What lookup and sssd's clients share: threads that make rounds of requests, on
 * a timer or when they are told to, and a file with a line for each thread. See
 * lookup.c for the options and the file.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, LINE = 128 };

struct stats {
	unsigned long lookups, failed, longest_us, round_us;
	int error;
	unsigned uid;
};

typedef void round_of(long thread, struct stats *s);

static round_of *make_round;
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

static void count(struct stats *s, int error, unsigned long start_us)
{
	unsigned long us = now_us() - start_us;

	s->lookups++;
	if (us > s->longest_us)
		s->longest_us = us;
	if (us > s->round_us)
		s->round_us = us;
	if (error) {
		s->failed++;
		s->error = error;
	}
}

static void report(long thread, const struct stats *s)
{
	char line[LINE + 1];
	int n = snprintf(line, sizeof(line),
			 "thread %3ld lookups %10lu failed %10lu longest_us %10lu errno %4d uid %10u round_us %10lu",
			 thread, s->lookups, s->failed, s->longest_us, s->error, s->uid, s->round_us);

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

static void *work(void *arg)
{
	long thread = (long)arg;
	unsigned long done = 0;
	struct stats s = { 0 };

	for (;;) {
		s.round_us = 0;
		make_round(thread, &s);
		report(thread, &s);
		wait_for_round(++done);
	}
	return NULL;
}

#define ROUNDS_OPTIONS "o:t:i:p"

static void rounds_option(int opt)
{
	int ms;

	switch (opt) {
	case 'o':
		out = open(optarg, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
		if (out < 0)
			err(1, "cannot make the stats file %s", optarg);
		/* A number that is 0, 1 or 2 would mean that stdio is not there. */
		if (out < 3)
			errx(1, "start me with stdin, stdout and stderr, on /dev/null if need be");
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
		exit(2); /* getopt has said why */
	}
}

static int rounds_ready(void)
{
	return out >= 0 && threads >= 1 && threads <= MAX_THREADS;
}

/* make_rounds has each thread make its rounds, for ever. */
static void make_rounds(round_of *of)
{
	sigset_t wanted;
	pthread_t id;
	int signal;

	make_round = of;
	for (long i = 0; i < threads; i++) /* the file has its full size from the start */
		report(i, &(struct stats){ 0 });

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &wanted, NULL);
	for (long i = 0; i < threads; i++) {
		errno = pthread_create(&id, NULL, work, (void *)i);
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
