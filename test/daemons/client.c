/* SPDX-License-Identifier: Apache-2.0
 *
 * client: asks daemons by their usual client libraries, and writes down how
 * that goes. It knows nothing of checkpoints.
 *
 * Usage: client [-t] STATS WHAT…
 *
 *   user=NAME, group=NAME, host=NAME, service=NAME   name services, through glibc
 *   absent=NAME    a user that there must not be
 *   uid            a new uid of winbindd's range with libwbclient, which only
 *                  those get who may use the privileged pipe
 *   syslog         a line with syslog(3), over a connection kept open
 *   journal        the same with sd_journal_print(3)
 *   bus            a method call with libdbus; a bus that has hung up is connected
 *                  to anew
 *   bus-exits      the same with libdbus's own way: then the process ends
 *   bus-unique     does the bus know the unique name that we think we have?
 *   bus-own        … and the name that we asked for when we connected?
 *   bus-match      … and does it still send the signals that we asked for?
 *   sdbus          a method call with sd-bus, connected anew as with "bus"
 *
 * The bus is the session's if DBUS_SESSION_BUS_ADDRESS is set, else the system's.
 *
 * All of it is asked once at the start and then at each SIGUSR1, one after the
 * other; with -t each in a thread of its own, at the same time. STATS has one
 * line for each WHAT, of a fixed length (CRIU refuses to reopen a file whose size
 * has changed), rewritten after each question:
 *
 *   thread N lookups N failed N longest_us N errno N uid N round_us N
 *
 * as test/lookup has them. thread is the WHAT's number, longest_us how long one
 * has ever taken and round_us the last one, errno that of the last failure, uid
 * always 0. What is logged is "criuhook-test round N": N from 1.
 *
 * cc -O2 -Wall -o client client.c $(pkg-config --cflags --libs dbus-1 libsystemd) -pthread
 */
#define _GNU_SOURCE
#include <dbus/dbus.h>
#include <dlfcn.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <pthread.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <syslog.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-journal.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 128, BUFFER = 16384, CALL_MS = 25000 /* libdbus's own */ };

#define BUS "org.freedesktop.DBus"
#define OURS "org.criuhook.Test"
#define MATCH "type='signal',interface='org.criuhook.Test'"

/* The round that a thread is in. */
static _Thread_local unsigned long rounds;

static unsigned long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000UL + t.tv_nsec / 1000;
}

static int user(const char *name)
{
	char buf[BUFFER];
	struct passwd entry, *found;
	int error = getpwnam_r(name, &entry, buf, sizeof(buf), &found);

	if (error || !found)
		return error ? error : ENOENT;
	/* An answer that belongs to another question is the worst that could happen. */
	return strcmp(entry.pw_name, name) ? EBADMSG : 0;
}

static int absent(const char *name)
{
	int error = user(name);

	return error == ENOENT ? 0 : error ? error : EEXIST;
}

static int group(const char *name)
{
	char buf[BUFFER];
	struct group entry, *found;
	int error = getgrnam_r(name, &entry, buf, sizeof(buf), &found);

	if (error || !found)
		return error ? error : ENOENT;
	return strcmp(entry.gr_name, name) ? EBADMSG : 0;
}

static int host(const char *name)
{
	struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found;
	int error = getaddrinfo(name, NULL, &hints, &found);

	if (error)
		return error == EAI_SYSTEM && errno ? errno : ENOENT;
	freeaddrinfo(found);
	return 0;
}

static int service(const char *name)
{
	char buf[BUFFER];
	struct servent entry, *found;
	int error = getservbyname_r(name, "tcp", &entry, buf, sizeof(buf), &found);

	if (error || !found)
		return error ? error : ENOENT;
	return strcmp(entry.s_name, name) ? EBADMSG : 0;
}

/* Debian has no header for it but with all of samba. */
static int new_uid(const char *arg)
{
	static int (*allocate)(uid_t *uid); /* wbcAllocateUid */
	uid_t uid = 0;

	(void)arg;
	if (!allocate) {
		void *lib = dlopen("libwbclient.so.0", RTLD_NOW);

		allocate = lib ? (int (*)(uid_t *))dlsym(lib, "wbcAllocateUid") : NULL;
	}
	if (!allocate)
		return ELIBACC;
	return allocate(&uid) ? EIO : uid ? 0 : EBADMSG;
}

static int log_line(const char *arg)
{
	static int opened;

	(void)arg;
	if (!opened++)
		openlog("client", LOG_NDELAY | LOG_PID, LOG_USER);
	syslog(LOG_INFO, "criuhook-test round %lu", rounds);
	return 0;
}

static int journal(const char *arg)
{
	int n = sd_journal_print(LOG_INFO, "criuhook-test round %lu", rounds);

	(void)arg;
	return n < 0 ? -n : 0;
}

static DBusConnection *bus;

/* call: a method of the bus itself; wanted: a boolean or unsigned answer. */
static int call(const char *method, const char *arg, unsigned *answer)
{
	DBusMessage *m = dbus_message_new_method_call(BUS, "/org/freedesktop/DBus", BUS, method), *r;
	DBusError e = DBUS_ERROR_INIT;
	int error = 0;

	if (arg)
		dbus_message_append_args(m, DBUS_TYPE_STRING, &arg, DBUS_TYPE_INVALID);
	r = dbus_connection_send_with_reply_and_block(bus, m, CALL_MS, &e);
	dbus_message_unref(m);
	if (!r) {
		error = dbus_error_has_name(&e, DBUS_ERROR_NO_REPLY)	 ? ETIMEDOUT :
			dbus_error_has_name(&e, DBUS_ERROR_DISCONNECTED) ? ENOTCONN :
									   EPROTO;
		dbus_error_free(&e);
		return error;
	}
	if (answer) {
		DBusMessageIter it;
		union {
			dbus_bool_t b;
			dbus_uint32_t u;
		} v = { 0 };

		dbus_message_iter_init(r, &it);
		dbus_message_iter_get_basic(&it, &v);
		*answer = v.u;
	}
	dbus_message_unref(r);
	return 0;
}

static int of_session(void) { return getenv("DBUS_SESSION_BUS_ADDRESS") != NULL; }

static int connected(int exits)
{
	DBusError e = DBUS_ERROR_INIT;

	if (bus && !dbus_connection_get_is_connected(bus) && !exits) {
		dbus_connection_unref(bus);
		bus = NULL;
	}
	if (bus)
		return 0;
	bus = dbus_bus_get_private(of_session() ? DBUS_BUS_SESSION : DBUS_BUS_SYSTEM, &e);
	if (!bus)
		return ECONNREFUSED;
	dbus_connection_set_exit_on_disconnect(bus, exits);
	if (dbus_bus_request_name(bus, OURS, 0, NULL) != DBUS_REQUEST_NAME_REPLY_PRIMARY_OWNER)
		return EACCES;
	dbus_bus_add_match(bus, MATCH, &e);
	return dbus_error_is_set(&e) ? EACCES : 0;
}

static int bus_call(const char *arg)
{
	int error = connected(0);

	(void)arg;
	return error ? error : call("GetId", NULL, NULL);
}

static int bus_exits(const char *arg)
{
	int error = connected(1);

	(void)arg;
	if (!error)
		error = call("GetId", NULL, NULL);
	/* What every program with a main loop does. */
	while (dbus_connection_read_write_dispatch(bus, 0) &&
	       dbus_connection_get_dispatch_status(bus) == DBUS_DISPATCH_DATA_REMAINS)
		;
	return error;
}

static int bus_unique(const char *arg)
{
	unsigned has = 0;
	int error = connected(0);

	(void)arg;
	if (!error)
		error = call("NameHasOwner", dbus_bus_get_unique_name(bus), &has);
	return error ? error : has ? 0 : ENOENT;
}

static int bus_own(const char *arg)
{
	unsigned has = 0;
	int error = connected(0);

	(void)arg;
	if (!error)
		error = call("NameHasOwner", OURS, &has);
	return error ? error : has ? 0 : ENOENT;
}

/* A rule that the bus has it can remove; one that it has not, not. */
static int bus_match(const char *arg)
{
	DBusError e = DBUS_ERROR_INIT;
	int error = connected(0), there;

	(void)arg;
	if (error)
		return error;
	dbus_bus_remove_match(bus, MATCH, &e);
	there = !dbus_error_is_set(&e);
	dbus_error_free(&e);
	if (there)
		dbus_bus_add_match(bus, MATCH, &e);
	return there ? 0 : ENOENT;
}

static int sdbus(const char *arg)
{
	static sd_bus *b;
	int r;

	(void)arg;
	if (b && sd_bus_is_open(b) <= 0)
		b = sd_bus_close_unref(b);
	if (!b && (r = of_session() ? sd_bus_open_user(&b) : sd_bus_open_system(&b)) < 0)
		return -r;
	r = sd_bus_call_method(b, BUS, "/org/freedesktop/DBus", BUS, "GetId", NULL, NULL, NULL);
	return r < 0 ? -r : 0;
}

static const struct {
	const char *name;
	int (*ask)(const char *arg);
} kinds[] = {
	{ "user", user },	    { "absent", absent },      { "group", group },
	{ "host", host },	    { "service", service },    { "uid", new_uid },
	{ "syslog", log_line },	    { "journal", journal },
	{ "bus", bus_call },	    { "bus-exits", bus_exits }, { "bus-unique", bus_unique },
	{ "bus-own", bus_own },	    { "bus-match", bus_match }, { "sdbus", sdbus },
};

struct stats {
	unsigned long n, failed, longest, us;
	int error;
};

static char **whats;
static int out, n;

static void report(int i, const struct stats *s)
{
	char line[LINE + 1];
	int len = snprintf(line, sizeof(line),
			   "thread %3d lookups %10lu failed %10lu longest_us %10lu errno %4d uid %10u round_us %10lu",
			   i, s->n, s->failed, s->longest, s->error, 0, s->us);

	memset(line + len, ' ', LINE - len);
	line[LINE - 1] = '\n';
	if (pwrite(out, line, LINE, (off_t)i * LINE) != LINE)
		err(1, "cannot write the stats");
}

static void ask(int i, struct stats *s)
{
	const char *what = whats[i], *arg = strchrnul(what, '=');
	size_t len = arg - what;
	unsigned long start = now_us();

	for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
		if (strlen(kinds[k].name) != len || strncmp(kinds[k].name, what, len))
			continue;
		int error = kinds[k].ask(*arg ? arg + 1 : arg);
		s->n++;
		s->us = now_us() - start;
		if (s->us > s->longest)
			s->longest = s->us;
		if (error) {
			s->failed++;
			s->error = error;
		}
		report(i, s);
		return;
	}
	errx(2, "%s is nothing I can ask", what);
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER;
static unsigned long wanted = 1; /* rounds */

static void *ask_alone(void *arg)
{
	struct stats s = { 0 };

	for (;;) {
		pthread_mutex_lock(&lock);
		while (wanted <= rounds)
			pthread_cond_wait(&asked, &lock);
		pthread_mutex_unlock(&lock);
		rounds++;
		ask((int)(long)arg, &s);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct stats stats[16] = { 0 };
	int sig, threads = argc > 1 && !strcmp(argv[1], "-t");
	sigset_t usr1;
	pthread_t id;

	argc -= threads;
	argv += threads;
	n = argc - 2;
	if (n < 1 || n > 16)
		errx(2, "usage: client [-t] STATS WHAT...");
	whats = argv + 2;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, NULL);
	out = open(argv[1], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (out < 0)
		err(1, "cannot make the stats file %s", argv[1]);
	for (int i = 0; i < n; i++)
		report(i, &stats[i]);
	for (int i = 0; threads && i < n; i++) {
		errno = pthread_create(&id, NULL, ask_alone, (void *)(long)i);
		if (errno)
			err(1, "cannot start thread %d", i);
	}
	for (;;) {
		if (!threads) {
			rounds++;
			for (int i = 0; i < n; i++)
				ask(i, &stats[i]);
		}
		sigwait(&usr1, &sig);
		if (threads) {
			pthread_mutex_lock(&lock);
			wanted++;
			pthread_cond_broadcast(&asked);
			pthread_mutex_unlock(&lock);
		}
	}
}
