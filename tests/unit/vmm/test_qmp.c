/* SPDX-License-Identifier: Apache-2.0 */
/* The QMP client against a peer that the test plays. */
#include "vmm/qmp.h"

#include "base/clock.h"
#include "base/io.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cmocka.h>

#define GREETING                                                                                   \
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, "             \
    "\"package\": "                                                                                \
    "\"Debian\"}, \"capabilities\": [\"oob\"]}}\r\n"

/* The peer: a thread that follows a script on its end of a socket pair. */
struct peer {
    int fd;
    pthread_t thread;
    void (*script)(struct peer *p);
    atomic_int events, ends;
    int64_t ages[8]; /* of events STAMPED, by their numbers */
    char in[65536];
    size_t n;
};

static void *run_script(void *arg)
{
    struct peer *p = arg;
    p->script(p);
    return NULL;
}

static void say(struct peer *p, const char *text)
{
    io_write_full(p->fd, text, strlen(text), INT64_MAX, -1, NULL);
}

/* The next command; its id. -1 at the end. */
static int hear(struct peer *p, char command[64])
{
    for (;;) {
        char *newline = memchr(p->in, '\n', p->n);
        if (newline) {
            *newline = 0;
            json_t *j = json_loads(p->in, 0, NULL);
            int id = (int)qmp_integer(j, "id");
            snprintf(command, 64, "%s", qmp_string(j, "execute"));
            json_decref(j);
            size_t used = (size_t)(newline + 1 - p->in);
            memmove(p->in, newline + 1, p->n - used);
            p->n -= used;
            return id;
        }
        ssize_t n = read(p->fd, p->in + p->n, sizeof(p->in) - p->n);
        if (n <= 0)
            return -1;
        p->n += (size_t)n;
    }
}

static void reply(struct peer *p, int id, const char *rest)
{
    char text[512];
    snprintf(text, sizeof(text), "{\"id\": %d, %s}\n", id, rest);
    say(p, text);
}

static void greet(struct peer *p)
{
    char command[64];
    say(p, GREETING);
    int id = hear(p, command);
    if (!strcmp(command, "qmp_capabilities"))
        reply(p, id, "\"return\": {}");
}

static void on_event(const char *event, json_t *data, int64_t at_ns, void *arg)
{
    struct peer *p = arg;
    if (!event)
        p->ends++;
    else if (!strcmp(event, "STAMPED"))
        p->ages[qmp_integer(data, "n")] = clock_mono_ns() - at_ns;
    else if (!strcmp(event, "TEST") && qmp_integer(data, "n") == p->events)
        p->events++;
}

static struct qmp *open_with(struct peer *p, void (*script)(struct peer *p), int timeout_ms,
                             struct vm_error **err)
{
    int fds[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    *p = (struct peer){.fd = fds[1], .script = script};
    assert_int_equal(pthread_create(&p->thread, NULL, run_script, p), 0);
    return qmp_open(fds[0], "test.qmp", timeout_ms, on_event, p, err);
}

static void finish(struct peer *p, struct qmp *q)
{
    qmp_destroy(q);
    pthread_join(p->thread, NULL);
    close(p->fd);
}

static void expect_failure(struct peer *p, struct qmp *q, struct vm_error *err,
                           enum vm_error_kind kind, const char *text)
{
    assert_null(q);
    if (err->kind != kind || !strstr(error_message(err), text))
        fail_msg("expected %s with '%s', got %s: %s", error_kind_name(kind), text,
                 error_kind_name(err->kind), error_message(err));
    error_free(err);
    finish(p, NULL);
}

/* Two commands are answered in the opposite order, an error and events in between. */
static void script_commands(struct peer *p)
{
    char command[64];
    say(p, "{\"event\": \"RESUME\"}\n"); /* as a QEMU that starts may do */
    greet(p);
    int refused = hear(p, command);
    say(p, "{\"event\": \"TEST\", \"data\": {\"n\": 0}, \"timestamp\": {}}\r\n");
    reply(p, refused, "\"error\": {\"class\": \"GenericError\", \"desc\": \"not\\nnow\"}");
    int first = hear(p, command), second = hear(p, command);
    say(p, "{\"event\": \"TEST\", \"data\": {\"n\": 1}}\n");
    reply(p, 9999, "\"return\": {}"); /* nobody's */
    char text[64];
    snprintf(text, sizeof(text), "\"return\": {\"id\": %d}", second);
    reply(p, second, text);
    snprintf(text, sizeof(text), "\"return\": {\"id\": %d}", first);
    reply(p, first, text);
    hear(p, command);
}

static void stamp(struct peer *p, int n, int64_t seconds, int64_t microseconds)
{
    char text[256];
    snprintf(text, sizeof(text),
             "{\"timestamp\": {\"seconds\": %" PRId64 ", \"microseconds\": %" PRId64 "}, \"event\": \"STAMPED\", "
             "\"data\": {\"n\": %d}}\n", seconds, microseconds, n);
    say(p, text);
}

/* 0: 300 ms ago; 1: later than now; 2: long ago; 3 to 6: no time at all. */
static void script_stamps(struct peer *p)
{
    char command[64];
    greet(p);
    int64_t wall = clock_wall_ns(), ago = wall - 300 * NSEC_PER_MSEC, second = wall / NSEC_PER_SEC;
    stamp(p, 0, ago / NSEC_PER_SEC, ago % NSEC_PER_SEC / NSEC_PER_USEC);
    stamp(p, 1, second + 100, 0);
    stamp(p, 2, second - 100, 0);
    stamp(p, 3, INT64_MAX, 0);
    stamp(p, 4, -1, 0);
    stamp(p, 5, second - 100, INT64_MAX);
    say(p, "{\"timestamp\": 7, \"event\": \"STAMPED\", \"data\": {\"n\": 6}}\n");
    reply(p, hear(p, command), "\"return\": {}");
    hear(p, command);
}

static void test_events_are_of_the_time_that_they_say(void **state)
{
    (void)state;
    struct peer p;
    struct vm_error *err = NULL;
    int64_t began = clock_mono_ns();
    struct qmp *q = open_with(&p, script_stamps, 5000, &err);
    assert_non_null(q);
    assert_int_equal(qmp_execute(q, "query", NULL, 5000, NULL, &err), 0);
    int64_t took = clock_mono_ns() - began;
    assert_true(p.ages[0] >= 300 * NSEC_PER_MSEC);
    for (int i = 1; i <= 6; i++)
        assert_in_range(p.ages[i], 0, took); /* when it was read */
    finish(&p, q);
}

static void *ask(void *arg)
{
    json_t *ret = NULL;
    struct vm_error *err = NULL;
    qmp_execute(arg, "query", json_pack("{s:i}", "a", 1), 5000, &ret, &err);
    error_free(err);
    return ret;
}

static void test_commands(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_commands, 5000, &err);
    assert_non_null(q);
    assert_int_equal(qmp_version(q)->major, 7);
    assert_int_equal(qmp_version(q)->micro, 22);
    assert_string_equal(qmp_version(q)->package, "Debian");

    assert_int_equal(qmp_execute(q, "bad", NULL, 5000, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(err), "QEMU refuses bad: not now (GenericError)");
    error_clear(&err);
    assert_int_equal(p.events, 1);

    pthread_t a, b;
    json_t *ra, *rb;
    pthread_create(&a, NULL, ask, q);
    pthread_create(&b, NULL, ask, q);
    pthread_join(a, (void **)&ra);
    pthread_join(b, (void **)&rb);
    assert_non_null(ra);
    assert_non_null(rb);
    assert_int_not_equal(qmp_integer(ra, "id"), qmp_integer(rb, "id"));
    json_decref(ra);
    json_decref(rb);
    assert_int_equal(p.events, 2);
    assert_false(qmp_is_closed(q));
    finish(&p, q);
    assert_int_equal(p.ends, 1);
}

static void script_silent(struct peer *p)
{
    char command[64];
    hear(p, command);
}

static void script_wrong(struct peer *p)
{
    say(p, "SSH-2.0-OpenSSH_9.2p1\r\n");
}

static void script_other_json(struct peer *p)
{
    say(p, "{\"hello\": 1}\n");
}

static void script_flood(struct peer *p)
{
    static char junk[1 << 20];
    memset(junk, ' ', sizeof(junk));
    for (int i = 0; i < 20; i++)
        if (io_write_full(p->fd, junk, sizeof(junk), INT64_MAX, -1, NULL) < 0)
            return;
}

static void script_gone(struct peer *p)
{
    shutdown(p->fd, SHUT_RDWR);
}

/* As a QEMU that is killed: what it was asked it never read. */
static void script_killed(struct peer *p)
{
    say(p, GREETING);
    poll(&(struct pollfd){p->fd, POLLIN, 0}, 1, -1);
    close(p->fd);
    p->fd = -1;
}

static void test_not_qmp(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_silent, 50, &err);
    expect_failure(&p, q, err, VM_ERROR_TIMEOUT, "does not greet");
    err = NULL;
    q = open_with(&p, script_wrong, 5000, &err);
    expect_failure(&p, q, err, VM_ERROR_PROTOCOL, "does not speak QMP");
    err = NULL;
    q = open_with(&p, script_other_json, 5000, &err);
    expect_failure(&p, q, err, VM_ERROR_PROTOCOL, "no greeting");
    err = NULL;
    q = open_with(&p, script_flood, 20000, &err);
    expect_failure(&p, q, err, VM_ERROR_PROTOCOL, "a line of more than");
    err = NULL;
    q = open_with(&p, script_gone, 5000, &err);
    expect_failure(&p, q, err, VM_ERROR_VMM_DIED, "closed the connection");
    err = NULL;
    q = open_with(&p, script_killed, 5000, &err);
    expect_failure(&p, q, err, VM_ERROR_VMM_DIED, "test.qmp: QEMU closed the connection");
}

static void script_mute(struct peer *p)
{
    char command[64];
    greet(p);
    int late = hear(p, command);
    hear(p, command); /* the second command: only now the answer to the first */
    reply(p, late, "\"return\": {}");
    hear(p, command);
}

static void test_timeout(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_mute, 5000, &err);
    assert_non_null(q);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(qmp_execute(q, "stop", NULL, 30, NULL, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
        error_clear(&err);
    }
    assert_false(qmp_is_closed(q));
    finish(&p, q);
}

static void script_dies(struct peer *p)
{
    char command[64];
    greet(p);
    hear(p, command);
    hear(p, command);
    shutdown(p->fd, SHUT_RDWR);
}

/* Both waiting callers learn it, and so does every later one. */
static void test_death(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_dies, 5000, &err);
    assert_non_null(q);
    pthread_t other;
    void *nothing;
    pthread_create(&other, NULL, ask, q);
    assert_int_equal(qmp_execute(q, "query", NULL, 20000, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    pthread_join(other, &nothing);
    assert_null(nothing);
    assert_int_equal(qmp_execute(q, "query", NULL, 20000, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    assert_true(qmp_is_closed(q));
    finish(&p, q);
    assert_int_equal(p.ends, 1);
}

static void script_malformed(struct peer *p)
{
    char command[64];
    greet(p);
    hear(p, command);
    say(p, "{\"return\": \n");
    hear(p, command);
}

static void test_malformed(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_malformed, 5000, &err);
    assert_int_equal(qmp_execute(q, "query", NULL, 20000, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    error_clear(&err);
    finish(&p, q);
}

static atomic_uint_fast64_t received_inode;

static void script_fd(struct peer *p)
{
    char data[512];
    int fd = -1, n_fds = 0;
    struct stat st;
    greet(p);
    ssize_t n = io_recv_fds(p->fd, data, sizeof(data) - 1, &fd, 1, &n_fds, NULL);
    data[n > 0 ? n : 0] = 0;
    if (n_fds == 1 && strstr(data, "getfd") && fstat(fd, &st) == 0)
        received_inode = st.st_ino;
    close(fd);
    const char *id = strstr(data, "\"id\":");
    reply(p, id ? atoi(id + 5) : 0, "\"return\": {}");
    hear(p, data);
}

static void test_descriptor(void **state)
{
    struct peer p;
    struct vm_error *err = NULL;
    struct qmp *q = open_with(&p, script_fd, 5000, &err);
    int pipe_fds[2];
    struct stat st;
    assert_int_equal(pipe(pipe_fds), 0);
    assert_int_equal(fstat(pipe_fds[1], &st), 0);
    assert_int_equal(qmp_execute_fd(q, "getfd", json_pack("{s:s}", "fdname", "x"), pipe_fds[1],
                                    5000, NULL, &err),
                     0);
    assert_int_equal(received_inode, st.st_ino);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    finish(&p, q);
}

static void test_paths(void **state)
{
    struct vm_error *err = NULL;
    assert_null(qmp_connect("/nonexistent/a.qmp", 1000, NULL, NULL, &err));
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    error_clear(&err);

    /* A file name longer than sun_path, of a socket that nobody listens on. */
    char folder[] = "/tmp/vmmig-qmp-XXXXXX", path[256];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/%0120d", folder, 7);
    int dir_length = snprintf(NULL, 0, "%s", folder);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%.*s/s", dir_length, folder);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(rename(address.sun_path, path), 0);
    assert_null(qmp_connect(path, 1000, NULL, NULL, &err));
    assert_int_equal(err->kind, VM_ERROR_UNREACHABLE);
    error_clear(&err);
    /* Somebody listens, and does not even accept. */
    assert_int_equal(listen(fd, 1), 0);
    int64_t begin = clock_mono_ns();
    assert_null(qmp_connect(path, 50, NULL, NULL, &err));
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_true(clock_mono_ns() - begin < 2 * NSEC_PER_SEC);
    error_clear(&err);
    close(fd);
    unlink(path);
    rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commands),
        cmocka_unit_test(test_events_are_of_the_time_that_they_say),  cmocka_unit_test(test_not_qmp),
        cmocka_unit_test(test_timeout),   cmocka_unit_test(test_death),
        cmocka_unit_test(test_malformed), cmocka_unit_test(test_descriptor),
        cmocka_unit_test(test_paths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
