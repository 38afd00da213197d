/* SPDX-License-Identifier: Apache-2.0
 *
 * A client of CRIU's RPC on libcriu. Says what it is told and what comes back, so
 * that two services can be compared.
 *
 *   libcriu unix:SOCKET|bin:CRIU version
 *   libcriu WHERE dump DIR PID [OPTION...]
 *   libcriu WHERE iters DIR PID [OPTION...]      two pre-dumps, into DIR/1 and DIR/2
 *   libcriu WHERE predump DIR PID [OPTION...]
 *   libcriu WHERE restore DIR [OPTION...]
 *   libcriu WHERE child DIR [OPTION...]          restores a child of its own
 *   libcriu WHERE self DIR OUT DAEMON            dumps itself, see self()
 *
 * Options: leave, notify, fail=STAGE, port=N (of a page server), log=FILE.
 */
#include <criu/criu.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *fail_at;

static int on_notify(char *action, criu_notify_arg_t na)
{
	printf("notify %s%s\n", action, criu_notify_pid(na) > 0 ? " with a pid" : "");
	if (fail_at && !strcmp(fail_at, action))
		return 1;
	return 0;
}

static int result(int ret)
{
	int e = errno;

	if (ret > 1)
		printf("a pid came back\n");
	else
		printf("result %d%s%s\n", ret, ret < 0 ? " errno " : "", ret < 0 ? strerror(e) : "");
	return ret < 0;
}

static int open_dir(const char *path)
{
	int fd = open(path, O_DIRECTORY | O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		perror(path);
		exit(2);
	}
	return fd;
}

static const char *base;
static int rounds;

/* Called after each pre-dump: more than 0 asks for another, 0 for the dump. */
static int more(criu_predump_info pi)
{
	char dir[4096], parent[64];

	(void)pi;
	rounds++;
	snprintf(dir, sizeof(dir), "%s/%d", base, rounds + 1);
	mkdir(dir, 0700);
	snprintf(parent, sizeof(parent), "../%d", rounds);
	criu_set_images_dir_fd(open_dir(dir));
	criu_set_parent_images(parent);
	printf("pre-dump %d is done\n", rounds);
	return rounds < 2;
}

/* A line to the daemon, and one back: 0 if it comes. */
static int ask(int sk)
{
	char c;

	if (write(sk, "again\n", 6) != 6)
		return -1;
	do {
		if (read(sk, &c, 1) != 1)
			return -1;
	} while (c != '\n');
	return 0;
}

/* Holds a connection to a daemon and dumps itself. What is written to OUT tells
 * what criu_dump returned, in the process that goes on, and in the restored one. */
static int self(const char *out, const char *daemon)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int sk = socket(AF_UNIX, SOCK_STREAM, 0), ret, i;
	char line[128];

	strncpy(sa.sun_path, daemon, sizeof(sa.sun_path) - 1);
	if (connect(sk, (struct sockaddr *)&sa, sizeof(sa)) || ask(sk)) {
		perror("daemon");
		return 2;
	}
	for (i = 0; i < 3; i++)
		close(i);
	open("/dev/null", O_RDWR);
	dup(0);
	dup(0);
	setsid();
	ret = criu_dump();
	int e = errno;
	int fd = open(out, O_WRONLY | O_CREAT | O_APPEND, 0644);
	snprintf(line, sizeof(line), "%d %s, the daemon %s\n", ret, ret < 0 ? strerror(e) : "ok", ask(sk) ? "does not answer" : "answers");
	if (write(fd, line, strlen(line)) < 0)
		return 1;
	close(fd);
	if (ret != 1)
		return ret < 0;
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	char *verb;
	int i = 4, ret = -1;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc < 3 || criu_init_opts())
		return 2;
	if (!strncmp(argv[1], "unix:", 5))
		criu_set_service_address(argv[1] + 5);
	else if (!strncmp(argv[1], "bin:", 4))
		criu_set_service_binary(argv[1] + 4);
	else
		return 2;
	verb = argv[2];
	if (!strcmp(verb, "version")) {
		printf("version %d\n", criu_get_version());
		return 0;
	}
	if (argc < 4)
		return 2;
	base = argv[3];
	criu_set_log_level(4);
	criu_set_work_dir_fd(open_dir(base));
	criu_set_log_file("criu.log");
	if (!strcmp(verb, "self")) {
		criu_set_images_dir_fd(open_dir(base));
		if (argc > 6)
			criu_set_leave_running(true);
		return argc < 6 ? 2 : self(argv[4], argv[5]);
	}
	if (!strcmp(verb, "dump") || !strcmp(verb, "predump") || !strcmp(verb, "iters"))
		criu_set_pid(atoi(argv[i++]));
	for (; i < argc; i++) {
		if (!strcmp(argv[i], "leave"))
			criu_set_leave_running(true);
		else if (!strcmp(argv[i], "notify"))
			criu_set_notify_cb(on_notify);
		else if (!strncmp(argv[i], "fail=", 5))
			fail_at = argv[i] + 5;
		else if (!strncmp(argv[i], "port=", 5))
			criu_set_page_server_address_port("127.0.0.1", atoi(argv[i] + 5));
		else if (!strncmp(argv[i], "log=", 4))
			criu_set_log_file(argv[i] + 4);
		else
			return 2;
	}
	if (!strcmp(verb, "iters")) {
		char dir[4096];

		snprintf(dir, sizeof(dir), "%s/1", base);
		mkdir(dir, 0700);
		criu_set_images_dir_fd(open_dir(dir));
		criu_set_track_mem(true);
		ret = criu_dump_iters(more);
	} else {
		criu_set_images_dir_fd(open_dir(base));
		if (!strcmp(verb, "dump"))
			ret = criu_dump();
		else if (!strcmp(verb, "predump"))
			ret = criu_pre_dump();
		else if (!strcmp(verb, "restore"))
			ret = criu_restore();
		else if (!strcmp(verb, "child")) {
			int pid = criu_restore_child(), status;

			ret = pid;
			if (pid > 0) {
				/* It is our child, or wait would say so. */
				printf("wait %s\n", waitpid(pid, &status, WNOHANG) == 0 ? "knows it" : "does not know it");
			}
		} else
			return 2;
	}
	return result(ret);
}
