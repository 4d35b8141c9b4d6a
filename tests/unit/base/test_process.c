/* SPDX-License-Identifier: Apache-2.0 */
#include "base/process.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static void *wait_for_byte(void *arg)
{
    char byte;
    if (read(*(int *)arg, &byte, 1) < 0)
        _exit(2);
    _exit(0);
}

/* A child whose first thread is gone while another one still waits on the pipe. */
static pid_t fork_headless(int *pipe_fds)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    pthread_t thread;
    close(pipe_fds[1]);
    pthread_create(&thread, NULL, wait_for_byte, &pipe_fds[0]);
    pthread_exit(NULL);
}

static char state_of(pid_t pid)
{
    char path[32], state = '?';
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    if (!f || fscanf(f, "%*d %*s %c", &state) != 1)
        state = '?';
    if (f)
        fclose(f);
    return state;
}

static void test_zombie_leader_runs(void **state)
{
    int pipe_fds[2];
    struct process_identity id;
    struct vm_error *err = NULL;
    assert_int_equal(pipe(pipe_fds), 0);
    pid_t pid = fork_headless(pipe_fds);
    assert_int_equal(process_identify(pid, &id, &err), 0);
    while (state_of(pid) != 'Z')
        usleep(1000);
    assert_true(process_alive(&id));
    close(pipe_fds[1]); /* now the other thread ends, too */
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
    assert_false(process_alive(&id));
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_false(process_alive(&id));
    close(pipe_fds[0]);
}

static void test_kill(void **state)
{
    struct process_identity id, stranger;
    struct vm_error *err = NULL;
    pid_t pid = fork();
    if (pid == 0) {
        pause();
        _exit(0);
    }
    assert_int_equal(process_identify(pid, &id, &err), 0);
    stranger = id;
    stranger.start++; /* the pid of another process, long ago */
    assert_false(process_alive(&stranger));
    assert_int_equal(process_kill(&stranger, 1000, &err), 0);
    assert_true(process_alive(&id));
    assert_int_equal(process_kill(&id, 5000, &err), 0);
    assert_false(process_alive(&id));
    assert_int_equal(process_kill(&id, 1000, &err), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

/* A process that cannot be looked at is not taken for dead. */
static void test_no_descriptor_is_no_death(void **state)
{
    struct process_identity id, again;
    struct vm_error *err = NULL;
    struct rlimit before, none;
    (void)state;
    pid_t pid = fork();
    if (pid == 0) {
        pause();
        _exit(0);
    }
    assert_int_equal(process_identify(pid, &id, &err), 0);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    int lowest = open("/dev/null", O_RDONLY | O_CLOEXEC);
    close(lowest);
    none = (struct rlimit){(rlim_t)lowest, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    bool alive = process_alive(&id);
    int identified = process_identify(pid, &again, &err);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_true(alive);
    assert_int_equal(identified, -1);
    assert_int_equal(err->kind, VM_ERROR_SYSTEM);
    error_free(err);
    assert_int_equal(process_kill(&id, 5000, NULL), 0);
    assert_false(process_alive(&id));
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_zombie_leader_runs),
        cmocka_unit_test(test_kill),
        cmocka_unit_test(test_no_descriptor_is_no_death),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
