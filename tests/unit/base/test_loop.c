/* SPDX-License-Identifier: Apache-2.0 */
#include "base/loop.h"

#include "base/acceptor.h"
#include "base/clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

struct seen {
    struct loop *loop;
    struct loop_watch *watch;
    int n;
    int order[8];
};

static void on_readable(int fd, int ready, void *arg)
{
    struct seen *s = arg;
    char byte;
    assert_int_equal(ready, LOOP_READ);
    assert_int_equal(read(fd, &byte, 1), 1);
    if (++s->n == 3) {
        loop_watch_destroy(s->watch); /* its own */
        loop_stop(s->loop);
    }
}

static void a_descriptor_is_watched_until_the_watch_goes(void **state)
{
    (void)state;
    int fds[2];
    struct seen s = {.loop = loop_create(NULL)};
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    assert_int_equal(write(fds[1], "abcd", 4), 4);
    s.watch = loop_watch_fd(s.loop, fds[0], LOOP_READ, on_readable, &s, NULL);
    assert_non_null(s.watch);
    assert_int_equal(loop_run(s.loop, NULL), 0);
    assert_int_equal(s.n, 3);
    loop_destroy(s.loop);
    close(fds[0]);
    close(fds[1]);
}

static void stop_it(void *arg)
{
    struct seen *s = arg;
    s->n++;
    loop_stop(s->loop);
}

static void timers_and_signals_call(void **state)
{
    (void)state;
    struct seen s = {.loop = loop_create(NULL)};
    struct loop_watch *w = loop_watch_timer(s.loop, NSEC_PER_MSEC, stop_it, &s, NULL);
    assert_int_equal(loop_run(s.loop, NULL), 0);
    loop_watch_destroy(w);
    assert_int_equal(s.n, 1);
    loop_destroy(s.loop);
    s = (struct seen){.loop = loop_create(NULL)};
    w = loop_watch_signal(s.loop, SIGUSR1, stop_it, &s, NULL);
    raise(SIGUSR1);
    assert_int_equal(loop_run(s.loop, NULL), 0);
    loop_watch_destroy(w);
    assert_int_equal(s.n, 1);
    loop_destroy(s.loop);
}

struct post {
    struct seen *seen;
    int number;
};

static void note(void *arg)
{
    struct post *p = arg;
    p->seen->order[p->seen->n++] = p->number;
}

static void *post_three(void *arg)
{
    static struct post posts[3];
    struct seen *s = arg;
    for (int i = 0; i < 3; i++) {
        posts[i] = (struct post){s, i + 1};
        loop_post(s->loop, note, &posts[i], NULL);
    }
    loop_stop(s->loop);
    return NULL;
}

static void posts_of_another_thread_run_in_their_order(void **state)
{
    (void)state;
    pthread_t thread;
    struct seen s = {.loop = loop_create(NULL)};
    pthread_create(&thread, NULL, post_three, &s);
    assert_int_equal(loop_run(s.loop, NULL), 0);
    pthread_join(thread, NULL);
    assert_int_equal(s.n, 3);
    for (int i = 0; i < 3; i++)
        assert_int_equal(s.order[i], i + 1);
    loop_destroy(s.loop);
}

static void what_was_posted_and_never_ran_is_freed(void **state)
{
    (void)state;
    struct seen s = {.loop = loop_create(NULL)};
    assert_int_equal(loop_post(s.loop, stop_it, &s, NULL), 0);
    loop_destroy(s.loop);
    assert_int_equal(s.n, 0);
}

static void watching_can_be_switched_off_and_on(void **state)
{
    (void)state;
    int fds[2];
    struct seen s = {.loop = loop_create(NULL), .n = 2};
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    assert_int_equal(write(fds[1], "a", 1), 1);
    s.watch = loop_watch_fd(s.loop, fds[0], LOOP_READ, on_readable, &s, NULL);
    assert_int_equal(loop_watch_set_events(s.watch, 0, NULL), 0);
    struct seen t = {.loop = s.loop};
    struct loop_watch *timer = loop_watch_timer(s.loop, NSEC_PER_MSEC, stop_it, &t, NULL);
    assert_int_equal(loop_run(s.loop, NULL), 0);
    assert_int_equal(s.n, 2); /* readable, and nobody was told */
    loop_watch_destroy(timer);
    loop_watch_destroy(s.watch);
    loop_destroy(s.loop);
    close(fds[0]);
    close(fds[1]);
}

struct guests {
    struct loop *loop;
    struct rlimit limit;
    int n, listener;
};

static void take_guest(int fd, void *arg)
{
    struct guests *g = arg;
    g->n++;
    close(fd);
    loop_stop(g->loop);
}

static void allow_descriptors(void *arg)
{
    struct guests *g = arg;
    setrlimit(RLIMIT_NOFILE, &g->limit);
}

/* A connection that cannot be taken waits, and costs no time; it is taken once there are descriptors again. */
static void an_acceptor_out_of_descriptors_rests(void **state)
{
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct guests g = {.loop = loop_create(NULL)};
    snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "vmmig-test-loop-%d", getpid());
    g.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(g.listener, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(g.listener, 8), 0);
    assert_int_equal(connect(client, (struct sockaddr *)&address, sizeof(address)), 0);
    struct acceptor *a = acceptor_create(g.loop, g.listener, take_guest, &g, NULL);
    struct loop_watch *later = loop_watch_timer(g.loop, NSEC_PER_SEC, allow_descriptors, &g, NULL);
    assert_true(a && later);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &g.limit), 0);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){3, g.limit.rlim_max}), 0);
    int64_t before = clock_thread_cpu_ns();
    assert_int_equal(loop_run(g.loop, NULL), 0);
    assert_true(clock_thread_cpu_ns() - before < 200 * NSEC_PER_MSEC);
    assert_int_equal(g.n, 1);
    loop_watch_destroy(later);
    acceptor_destroy(a);
    loop_destroy(g.loop);
    close(client);
    close(g.listener);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_descriptor_is_watched_until_the_watch_goes),
        cmocka_unit_test(an_acceptor_out_of_descriptors_rests),
        cmocka_unit_test(timers_and_signals_call),
        cmocka_unit_test(posts_of_another_thread_run_in_their_order),
        cmocka_unit_test(what_was_posted_and_never_ran_is_freed),
        cmocka_unit_test(watching_can_be_switched_off_and_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
