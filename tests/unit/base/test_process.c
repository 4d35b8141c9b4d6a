/* SPDX-License-Identifier: Apache-2.0 */
#include "base/clock.h"
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

/* How long the answer took, in milliseconds. */
static int64_t ask_ended(const struct process_identity *id, int begins_ms, int timeout_ms, bool expected)
{
    int64_t began = clock_mono_ns();
    assert_int_equal(process_has_ended(id, begins_ms, timeout_ms), expected);
    return (clock_mono_ns() - began) / NSEC_PER_MSEC;
}

/* One that lives on is not waited for; one whose end has begun is. */
static void test_has_ended(void **state)
{
    enum { BEGINS_MS = 50, TIMEOUT_MS = 300, LONG_MS = 60000 };
    int pipe_fds[2];
    struct process_identity lives, ends;
    (void)state;
    assert_int_equal(pipe(pipe_fds), 0);
    pid_t living = fork();
    if (living == 0) {
        pause();
        _exit(0);
    }
    pid_t ending = fork_headless(pipe_fds);
    while (state_of(ending) != 'Z')
        usleep(1000);
    assert_int_equal(process_identify(living, &lives, NULL), 0);
    assert_int_equal(process_identify(ending, &ends, NULL), 0);
    int64_t took = ask_ended(&lives, BEGINS_MS, LONG_MS, false);
    assert_true(took >= BEGINS_MS && took < LONG_MS);
    assert_true(ask_ended(&ends, BEGINS_MS, TIMEOUT_MS, false) >= TIMEOUT_MS);
    assert_int_equal(write(pipe_fds[1], "", 1), 1);
    ask_ended(&ends, 0, LONG_MS, true);
    ask_ended(&ends, 0, 0, true);
    assert_int_equal(process_kill(&lives, 5000, NULL), 0);
    ask_ended(&lives, 0, 0, true);
    assert_int_equal(waitpid(living, NULL, 0), living);
    assert_int_equal(waitpid(ending, NULL, 0), ending);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
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
        cmocka_unit_test(test_has_ended),
        cmocka_unit_test(test_no_descriptor_is_no_death),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
