/* SPDX-License-Identifier: Apache-2.0
 *
 * client: a client of one of sssd's services, as test/lookup is one of its name
 * service, with the same options and the same report.
 *
 * Usage: client -o STATS [-s SERVICE]… [-l SERVICE]… [-t THREADS] [-i MS] [-p]
 *
 *   -s SERVICE  nss, pam, sudo, autofs, ssh or pac: the name of the pipe
 *   -l SERVICE  through the real library, of nss, pam and autofs: glibc with
 *               libnss_sss (SSS_NSS_USE_MEMCACHE=NO, else it asks its cache),
 *               libpam with pam_sss, and libsss_autofs
 *
 * Of several services, each thread takes the next. With -s it speaks the protocol as sssd's libraries did before they looked
 * for changes of pid and socket (src/sss_client/common.c): a connection for each
 * thread, begun with GET_VERSION, and kept; before a request it is looked whether
 * it was closed, and if so, or if sending meets EPIPE, another is made. What
 * fails while the answer is awaited fails the request.
 *
 * cc -O2 -Wall -pthread -I../lookup -DLIBDIR=\"$(cc -print-multiarch)\" -o client client.c
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <pwd.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "rounds.h"

enum { HEADER = 16, GET_VERSION = 1, MOST = 4096 };

/* A request of each service that changes nothing (sss_cli.h), and the status of
 * the answer. */
static const struct service {
	const char *name;
	uint32_t version, command, status;
} services[] = {
	{ "nss", 1, 0x11, 0 },        /* GETPWNAM */
	{ "pam", 3, 0xf3, 0 },        /* ACCT_MGMT */
	{ "sudo", 1, 0xc2, 0 },       /* GET_DEFAULTS */
	{ "autofs", 1, 0xd1, 0 },     /* SETAUTOMNTENT */
	{ "ssh", 0, 0xe1, 0 },        /* GET_USER_PUBKEYS */
	{ "pac", 1, 0x101, EBADMSG }, /* ADD_PAC_USER, of what is no PAC */
};

/* What the threads do, in turn. */
static struct {
	const struct service *service;
	round_of *round;
} chosen[16];
static int nchosen;

static const struct service *of_thread(long thread) { return chosen[thread % nchosen].service; }

struct packet {
	uint32_t length, command, status, reserved;
	unsigned char body[MOST];
};

static void put(struct packet *p, const void *data, size_t n)
{
	memcpy(p->body + p->length - HEADER, data, n);
	p->length += n;
}

static void put_u32(struct packet *p, uint32_t v) { put(p, &v, sizeof(v)); }

static void item(struct packet *p, uint32_t type, const char *text)
{
	put_u32(p, type);
	put_u32(p, strlen(text) + 1);
	put(p, text, strlen(text) + 1);
}

static struct packet request(const struct service *service)
{
	struct packet p = { .length = HEADER, .command = service->command };
	static const char name[] = "alice";

	switch (service->name[0] == 's' ? service->name[1] : service->name[0]) {
	case 'p': /* pam; pac gets the same and refuses it */
		put_u32(&p, 0x4d415049);
		item(&p, 1, name);   /* user */
		item(&p, 2, "test"); /* service */
		item(&p, 3, "");     /* tty */
		item(&p, 4, "");     /* ruser */
		item(&p, 5, "");     /* rhost */
		put_u32(&p, 0x4950414d);
		break;
	case 'u': /* sudo */
		put_u32(&p, 1000);
		put(&p, name, sizeof(name));
		break;
	case 's': /* ssh */
		put_u32(&p, 0);
		put_u32(&p, sizeof(name));
		put(&p, name, sizeof(name));
		break;
	default:
		put(&p, name, sizeof(name));
	}
	return p;
}

/* await waits for an event as the libraries do, but for a shorter time. */
static int await(int fd, short event)
{
	struct pollfd p = { fd, event, 0 };
	int n;

	do
		n = poll(&p, 1, 60 * 1000);
	while (n < 0 && errno == EINTR);
	if (n < 1)
		return n ? errno : ETIME;
	if (p.revents & (POLLERR | POLLHUP | POLLNVAL))
		return EPIPE;
	return 0;
}

static int transfer(int fd, void *data, size_t n, int sending)
{
	size_t done = 0;
	ssize_t now;
	int error;

	while (done < n) {
		error = await(fd, sending ? POLLOUT : POLLIN);
		if (error)
			return error;
		now = sending ? send(fd, (char *)data + done, n - done, MSG_NOSIGNAL) :
				read(fd, (char *)data + done, n - done);
		if (now == 0)
			return ECONNRESET;
		if (now < 0 && errno != EINTR && errno != EAGAIN)
			return errno;
		if (now > 0)
			done += now;
	}
	return 0;
}

/* ask sends a packet and reads the answer into it. */
static int ask(int fd, struct packet *p, int *unsent)
{
	uint32_t command = p->command;
	int error = transfer(fd, p, p->length, 1);

	*unsent = error == EPIPE;
	if (error)
		return error;
	error = transfer(fd, p, HEADER, 0);
	if (error)
		return error;
	if (p->length < HEADER || p->length > sizeof(*p) || p->command != command)
		return EPROTO;
	return transfer(fd, p->body, p->length - HEADER, 0);
}

static int greeted(const struct service *service)
{
	struct sockaddr_un name = { AF_UNIX, "" };
	struct packet p = { .length = HEADER, .command = GET_VERSION };
	int unsent, fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	snprintf(name.sun_path, sizeof(name.sun_path), "/var/lib/sss/pipes/%s", service->name);
	put_u32(&p, service->version);
	if (fd < 0 || connect(fd, (struct sockaddr *)&name, sizeof(name)) ||
	    ask(fd, &p, &unsent) || p.status || p.length != HEADER + 4 || memcmp(p.body, &service->version, 4)) {
		close(fd);
		return -1;
	}
	return fd;
}

static __thread int kept = -1;

static void by_protocol(long thread, struct stats *s)
{
	unsigned long start = now_us();
	int error = ENOTCONN, unsent = 1;

	for (int try = 0; try < 2 && unsent; try++) {
		struct packet p = request(of_thread(thread));
		struct pollfd look = { kept, POLLOUT, 0 };

		if (kept >= 0 && poll(&look, 1, 0) >= 0 && look.revents & (POLLERR | POLLHUP | POLLNVAL)) {
			close(kept);
			kept = -1;
		}
		if (kept < 0)
			kept = greeted(of_thread(thread));
		if (kept < 0) {
			error = ENOTCONN;
			break;
		}
		error = ask(kept, &p, &unsent);
		if (!error && p.status != of_thread(thread)->status)
			error = EBADE;
		if (error) {
			close(kept);
			kept = -1;
		}
	}
	count(s, error, start);
}

static void *symbol(const char *library, const char *name)
{
	void *lib = dlopen(library, RTLD_NOW), *f = lib ? dlsym(lib, name) : NULL;

	if (!f)
		errx(1, "%s", dlerror());
	return f;
}

/* Who is alice? */
static void by_nss(long thread, struct stats *s)
{
	char buf[4096];
	struct passwd entry, *found;
	unsigned long start = now_us();
	int error = getpwnam_r("alice", &entry, buf, sizeof(buf), &found);

	(void)thread;
	if (!error)
		error = !found ? ENOENT : strcmp(entry.pw_name, "alice") ? EBADMSG : 0;
	count(s, error, start);
}

/* libpam's conversation: pam_sss has nothing to ask. */
struct conv {
	int (*conv)(int, const void **, void **, void *);
	void *data;
};
static int silent(int n, const void **msg, void **resp, void *data)
{
	(void)n, (void)msg, (void)resp, (void)data;
	return 19; /* PAM_CONV_ERR */
}

/* May alice log in? By /etc/pam.d/test. */
static void by_pam(long thread, struct stats *s)
{
	static __thread void *pam;
	static const char lib[] = "libpam.so.0";
	int (*begin)(const char *, const char *, const struct conv *, void **) = symbol(lib, "pam_start");
	int (*may)(void *, int) = symbol(lib, "pam_acct_mgmt");
	static const struct conv conv = { silent, NULL };
	unsigned long start = now_us();

	(void)thread;
	if (!pam && begin("test", "alice", &conv, &pam))
		errx(1, "pam_start");
	count(s, may(pam, 0), start);
}

/* Is there a map? There is not: an answer like any other. */
static void by_autofs(long thread, struct stats *s)
{
	static const char lib[] = "/usr/lib/" LIBDIR "/sssd/modules/libsss_autofs.so";
	int (*begin)(const char *, void **) = symbol(lib, "_sss_setautomntent");
	void *map = NULL;
	unsigned long start = now_us();
	int error;

	(void)thread;
	error = begin("auto.none", &map);
	count(s, error == ENOENT ? 0 : error, start);
}

static void choose(const char *name, int library)
{
	round_of *round = by_protocol;

	if (library)
		round = !strcmp(name, "nss") ? by_nss : !strcmp(name, "pam") ? by_pam : !strcmp(name, "autofs") ? by_autofs : NULL;
	for (size_t i = 0; i < sizeof(services) / sizeof(*services); i++) {
		if (strcmp(services[i].name, name) || !round || nchosen == sizeof(chosen) / sizeof(*chosen))
			continue;
		chosen[nchosen].service = &services[i];
		chosen[nchosen++].round = round;
		return;
	}
	errx(2, "%s: no such service, no library is used for it, or too many of them", name);
}

static void by_choice(long thread, struct stats *s) { chosen[thread % nchosen].round(thread, s); }

int main(int argc, char **argv)
{
	int opt;

	while ((opt = getopt(argc, argv, "s:l:" ROUNDS_OPTIONS)) != -1) {
		switch (opt) {
		case 's':
		case 'l':
			choose(optarg, opt == 'l');
			break;
		default:
			rounds_option(opt);
		}
	}
	if (!rounds_ready() || !nchosen || optind < argc)
		errx(2, "usage: client -o STATS [-s SERVICE]... [-l SERVICE]... [-t THREADS] [-i MS] [-p]");
	make_rounds(by_choice);
}
