/* SPDX-License-Identifier: Apache-2.0 */
/* What is believed of an agent within a guest that answers late, wrongly, or nobody at all. */
#include "base/clock.h"
#include "base/io.h"
#include "snapshot/guest_agent.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define SOON_NS (50 * NSEC_PER_MSEC)
#define LONG_NS (60 * NSEC_PER_SEC)

/* An agent at a socket. It answers what it is told to when it is told to. */
struct inside {
    char folder[32], path[64];
    int listener, fd;
    pthread_t thread;
};

static void say(int fd, const char *text)
{
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
}

/* The next command; to synchronise is answered by itself. */
static void hear(int fd, const char *name)
{
    for (;;) {
        char line[512];
        size_t n = 0;
        while (n < sizeof(line) - 1 && read(fd, &line[n], 1) == 1 && line[n] != '\n')
            n++;
        line[n] = 0;
        long long id;
        const char *at = strstr(line, "\"id\":");
        if (!at) {
            assert_non_null(strstr(line, name));
            return;
        }
        assert_int_equal(sscanf(at, "\"id\":%lld", &id), 1);
        snprintf(line, sizeof(line), "\xff{\"return\":%lld}\n", id);
        say(fd, line);
        if (!strcmp(name, "sync"))
            return;
    }
}

static void *accept_and_synchronise(void *arg)
{
    struct inside *in = arg;
    in->fd = accept(in->listener, NULL, NULL);
    hear(in->fd, "sync");
    return NULL;
}

static int set_up(void **state)
{
    struct inside *in = calloc(1, sizeof(*in));
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(in->folder, "/tmp/vmmig-agent-XXXXXX");
    assert_non_null(mkdtemp(in->folder));
    snprintf(in->path, sizeof(in->path), "%s/qga", in->folder);
    strcpy(a.sun_path, in->path);
    in->fd = -1;
    in->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(in->listener, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(in->listener, 0), 0);
    *state = in;
    return 0;
}

static int tear_down(void **state)
{
    struct inside *in = *state;
    close(in->fd);
    close(in->listener);
    unlink(in->path);
    rmdir(in->folder);
    free(in);
    return 0;
}

static struct guest_agent *connect_to(struct inside *in)
{
    assert_int_equal(pthread_create(&in->thread, NULL, accept_and_synchronise, in), 0);
    struct guest_agent *ga = guest_agent_open(in->path, NULL, clock_mono_ns() + LONG_NS, NULL);
    assert_non_null(ga);
    pthread_join(in->thread, NULL);
    return ga;
}

static void *freeze_late_and_thaw(void *arg)
{
    struct inside *in = arg;
    hear(in->fd, "guest-fsfreeze-freeze");
    say(in->fd, "{\"return\":2}\n");
    hear(in->fd, "guest-fsfreeze-thaw");
    say(in->fd, "{\"error\":{\"desc\":\"later\"}}\n");
    return NULL;
}

static void an_answer_that_is_late_is_not_taken_for_the_next_one(void **state)
{
    struct inside *in = *state;
    unsigned n = 77;
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(guest_agent) struct guest_agent *ga = connect_to(in);
    assert_int_equal(guest_agent_freeze(ga, clock_mono_ns() + SOON_NS, &n, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_true(guest_agent_is_frozen(ga)); /* who knows */
    error_clear(&err);
    assert_int_equal(pthread_create(&in->thread, NULL, freeze_late_and_thaw, in), 0);
    assert_int_equal(guest_agent_thaw(ga, clock_mono_ns() + LONG_NS, &err), -1);
    assert_non_null(strstr(error_message(err), "later"));
    assert_true(guest_agent_is_frozen(ga));
    assert_int_equal(n, 77);
    pthread_join(in->thread, NULL);
}

static void *answer(void *arg)
{
    struct inside *in = ((void **)arg)[0];
    hear(in->fd, "guest-fsfreeze-freeze");
    say(in->fd, ((void **)arg)[1]);
    return NULL;
}

static void what_is_frozen_and_what_is_not(void **state)
{
    struct inside *in = *state;
    CLEANUP(guest_agent) struct guest_agent *ga = connect_to(in);
    static const struct {
        const char *says;
        int result;
        bool frozen;
    } cases[] = {{"{\"error\":{\"desc\":\"no\"}}\n", -1, false},
                 {"{\"return\":0}\n", 0, false},
                 {"{\"return\":3}\n", 0, true},
                 {"nonsense\n", -1, true}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        unsigned n = 0;
        void *arg[] = {in, (void *)(uintptr_t)cases[i].says};
        assert_int_equal(pthread_create(&in->thread, NULL, answer, arg), 0);
        assert_int_equal(guest_agent_freeze(ga, clock_mono_ns() + LONG_NS, &n, NULL), cases[i].result);
        pthread_join(in->thread, NULL);
        assert_int_equal(guest_agent_is_frozen(ga), cases[i].frozen);
    }
}

/* Those who have connected and are not heard are a queue, behind which a connect would wait for ever. */
static void others_who_have_the_socket(void **state)
{
    struct inside *in = *state;
    int others[16], n = 0;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    cleanup_error struct vm_error *err = NULL;
    strcpy(a.sun_path, in->path);
    do
        others[n] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    while (connect(others[n++], (struct sockaddr *)&a, sizeof(a)) == 0 && n < 16);
    assert_true(n < 16);
    assert_null(guest_agent_open(in->path, NULL, clock_mono_ns() + SOON_NS, &err));
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_non_null(strstr(error_message(err), "others"));
    while (n)
        close(others[--n]);
}

static void *accept_one(void *arg)
{
    struct inside *in = arg;
    in->fd = accept(in->listener, NULL, NULL);
    return NULL;
}

/* A VMM of another user, whose command line names the socket of ours. */
static void a_socket_that_is_not_the_vm_s_own(void **state)
{
    struct inside *in = *state;
    struct process_identity vmm;
    cleanup_error struct vm_error *err = NULL;
    pid_t pid = fork();
    if (pid == 0) {
        if (setresuid(65534, 65534, 65534) == 0)
            pause();
        _exit(1);
    }
    uid_t user = 0;
    while (user != 65534)
        assert_int_equal(process_user(pid, &user, NULL), 0);
    assert_int_equal(process_identify(pid, &vmm, NULL), 0);
    assert_int_equal(pthread_create(&in->thread, NULL, accept_one, in), 0);
    assert_null(guest_agent_open(in->path, &vmm, clock_mono_ns() + LONG_NS, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_non_null(strstr(error_message(err), in->path));
    pthread_join(in->thread, NULL);
    char byte;
    assert_int_equal(read(in->fd, &byte, 1), 0); /* nothing was said */
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static void a_socket_of_the_vm_s_own(void **state)
{
    struct inside *in = *state;
    struct process_identity vmm;
    assert_int_equal(process_identify(getpid(), &vmm, NULL), 0);
    assert_int_equal(pthread_create(&in->thread, NULL, accept_and_synchronise, in), 0);
    CLEANUP(guest_agent)
    struct guest_agent *ga = guest_agent_open(in->path, &vmm, clock_mono_ns() + LONG_NS, NULL);
    assert_non_null(ga);
    pthread_join(in->thread, NULL);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_answer_that_is_late_is_not_taken_for_the_next_one),
        TEST(what_is_frozen_and_what_is_not),
        TEST(others_who_have_the_socket),
        TEST(a_socket_that_is_not_the_vm_s_own),
        TEST(a_socket_of_the_vm_s_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
