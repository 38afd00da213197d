/* SPDX-License-Identifier: Apache-2.0
 *
 * The half of the stand-in for CRaC's engine that is in the virtual machine's own
 * process: of libcrexec.so (openjdk/crac, share/native/libcrexec/crexec.cpp and
 * unix/native/libcrexec/crexec_md.cpp) or libcriuengine.so (linux/native/
 * libcriuengine/criuengine.cpp). The engine's program is test/cracengine.
 *
 * gcc -shared -fPIC -I$JAVA_HOME/include -I$JAVA_HOME/include/linux -o libcheckpoint.so checkpoint.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <jni.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* src/hotspot/share/include/jvm.h: RESTORE_SIGNAL. Blocked in all threads, as the
 * virtual machine does (os/posix/signals_posix.cpp): the launcher saw to that. */
#define RESTORE_SIGNAL (SIGRTMIN + 2)

extern char **environ;

/* criuengine.cpp, checkpoint(): an upstream CRIU puts what the restore was started
 * with, --inherit-fd fd[0]:/memfd:crac_fake_stdin, in the place of these. */
static const char *const fakes[] = { "crac_fake_stdin", "crac_fake_stdout", "crac_fake_stderr" };

static int spawn_and_wait(char *const argv[])
{
	pid_t pid;
	int status, error = posix_spawn(&pid, argv[0], NULL, NULL, argv, environ);

	if (error)
		return error;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return errno;
	return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : ECHILD;
}

JNIEXPORT jint JNICALL Java_Checkpoint_run(JNIEnv *env, jclass class, jstring engine, jstring dir, jboolean upstream)
{
	const char *e = (*env)->GetStringUTFChars(env, engine, NULL);
	const char *d = (*env)->GetStringUTFChars(env, dir, NULL);
	char *const argv[] = { (char *)e, "checkpoint", (char *)d, NULL };
	int fake[3] = { -1, -1, -1 };
	siginfo_t info;
	sigset_t set;
	int error;

	(void)class;
	if (upstream) {
		for (int i = 0; i < 3; i++)
			fake[i] = memfd_create(fakes[i], MFD_CLOEXEC);
		if (getsid(0) != getpid())
			setpgid(0, setsid());
	}
	error = spawn_and_wait(argv);
	if (!error) {
		sigemptyset(&set);
		sigaddset(&set, RESTORE_SIGNAL);
		while (sigwaitinfo(&set, &info) < 0 && errno == EINTR)
			;
	}
	for (int i = 0; i < 3 && upstream; i++) {
		/* No longer one of memory: CRIU has put another in its place. (Files on a
		 * tmpfs have seals too, so they are taken for ours, there as here.) */
		if (fcntl(fake[i], F_GET_SEALS) < 0)
			dup2(fake[i], i);
		close(fake[i]);
	}
	(*env)->ReleaseStringUTFChars(env, engine, e);
	(*env)->ReleaseStringUTFChars(env, dir, d);
	if (error)
		return -error;
	return info.si_code == SI_QUEUE ? info.si_int : -1000;
}
