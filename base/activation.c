/* SPDX-License-Identifier: Apache-2.0 */
#include "base/activation.h"

#include "base/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

/*
 * A program takes the socket if the environment says that it is for this very process, whose number nobody knows before
 * it is there: so a shell, which becomes the program, says it.
 */
static const char *const shell[] = {"sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"};

enum { SHELL_WORDS = sizeof(shell) / sizeof(*shell) };

/* NULL without memory; the words are not copied. */
static char **with_shell(const char *const *argv)
{
    size_t n = 0;
    while (argv[n])
        n++;
    char **words = calloc(SHELL_WORDS + n + 1, sizeof(*words));
    if (!words)
        return NULL;
    memcpy(words, shell, sizeof(shell));
    memcpy(words + SHELL_WORDS, argv, n * sizeof(*argv));
    return words;
}

static int run(char *const *words, const int *high, unsigned n, bool detached, pid_t *ret_pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    pid_t pid;
    sigemptyset(&none);
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setflags(&attributes, (short)(POSIX_SPAWN_SETSIGMASK | (detached ? POSIX_SPAWN_SETSID : 0)));
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
    for (int i = 1; detached && i <= 2; i++)
        posix_spawn_file_actions_adddup2(&actions, 0, i);
    for (unsigned i = 0; i < n; i++)
        posix_spawn_file_actions_adddup2(&actions, high[i], ACTIVATION_LISTENER + (int)i);
    int rc = posix_spawnp(&pid, words[0], &actions, &attributes, words, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    if (!rc)
        *ret_pid = pid;
    return rc;
}

int activation_spawn(const char *const *argv, const int *fds, unsigned n, bool detached, pid_t *ret_pid,
                     struct vm_error **err)
{
    int high[ACTIVATION_FDS_MAX] = {-1, -1}, failed = 0;
    cleanup_free char **words = with_shell(argv);
    if (!words)
        return error_nomem(err);
    /* Above the program's, so that dup2 makes another one of each, which exec does not close. */
    for (unsigned i = 0; i < n && !failed; i++) {
        high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, ACTIVATION_LISTENER + ACTIVATION_FDS_MAX);
        failed = high[i] < 0 ? errno : 0;
    }
    if (!failed)
        failed = run(words, high, n, detached, ret_pid);
    for (unsigned i = 0; i < n; i++)
        close_fd(&high[i]);
    return failed ? error_errno(err, failed, "cannot run %s", argv[0]) : 0;
}
