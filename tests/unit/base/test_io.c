/* SPDX-License-Identifier: Apache-2.0 */
#include "base/io.h"

#include "base/cleanup.h"
#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <cmocka.h>

#define LONG_NS (20 * NSEC_PER_SEC)

static void socket_pair(int fds[2])
{
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
}

struct writer {
    int fd;
    const uint8_t *data;
    size_t n;
    int result;
};

static void *write_all(void *arg)
{
    struct writer *w = arg;
    struct iovec iov[] = {{(void *)(uintptr_t)w->data, 1},
                          {NULL, 0},
                          {(void *)(uintptr_t)(w->data + 1), w->n - 1}};
    w->result = io_writev_full(w->fd, iov, 3, clock_mono_ns() + LONG_NS, -1, NULL);
    return NULL;
}

static void more_than_a_socket_holds_goes_through(void **state)
{
    (void)state;
    enum { SIZE = 4 << 20 };
    int fds[2];
    uint8_t *data = malloc(SIZE), *got = calloc(1, SIZE);
    for (size_t i = 0; i < SIZE; i++)
        data[i] = (uint8_t)(i * 31 >> 3);
    socket_pair(fds);
    struct writer w = {fds[0], data, SIZE, -1};
    pthread_t thread;
    pthread_create(&thread, NULL, write_all, &w);
    assert_int_equal(io_read_full(fds[1], got, SIZE, clock_mono_ns() + LONG_NS, -1, NULL), 0);
    pthread_join(thread, NULL);
    assert_int_equal(w.result, 0);
    assert_memory_equal(data, got, SIZE);
    close(fds[0]);
    close(fds[1]);
    free(data);
    free(got);
}

static void waits_end_at_the_deadline_and_on_the_latch(void **state)
{
    (void)state;
    int fds[2], latch = io_latch_new(NULL);
    char byte;
    cleanup_error struct vm_error *late = NULL, *cancelled = NULL, *full = NULL;
    socket_pair(fds);
    assert_int_equal(io_read_full(fds[0], &byte, 1, clock_mono_ns() + NSEC_PER_MSEC, latch, &late),
                     -1);
    assert_int_equal(late->kind, VM_ERROR_TIMEOUT);
    assert_false(io_latch_is_set(latch));
    io_latch_set(latch);
    assert_true(io_latch_is_set(latch));
    assert_int_equal(io_read_full(fds[0], &byte, 1, INT64_MAX, latch, &cancelled), -1);
    assert_int_equal(cancelled->kind, VM_ERROR_CANCELLED);
    assert_true(io_latch_is_set(latch)); /* for good */
    char *much = calloc(1, 8 << 20);
    assert_int_equal(
        io_write_full(fds[0], much, 8 << 20, clock_mono_ns() + NSEC_PER_MSEC, -1, &full), -1);
    assert_int_equal(full->kind, VM_ERROR_TIMEOUT);
    free(much);
    close(latch);
    close(fds[0]);
    close(fds[1]);
}

static void an_end_of_file_is_unreachable_and_no_signal(void **state)
{
    (void)state;
    int fds[2];
    char two[2];
    cleanup_error struct vm_error *end = NULL, *broken = NULL;
    socket_pair(fds);
    assert_int_equal(write(fds[1], "x", 1), 1);
    close(fds[1]);
    assert_int_equal(io_read_full(fds[0], two, 2, INT64_MAX, -1, &end), -1);
    assert_int_equal(end->kind, VM_ERROR_UNREACHABLE);
    assert_int_equal(io_write_full(fds[0], "y", 1, INT64_MAX, -1, &broken), -1);
    assert_int_equal(broken->kind, VM_ERROR_UNREACHABLE);
    close(fds[0]);
}

static void files_are_replaced_whole(void **state)
{
    (void)state;
    char dir[] = "/tmp/vmmig-test-io.XXXXXX", path[64], deep[64];
    struct stat st;
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/f", dir);
    snprintf(deep, sizeof(deep), "%s/a/b/c", dir);
    assert_int_equal(io_write_file_durably(path, "old", 3, 0600, NULL), 0);
    assert_int_equal(io_write_file_durably(path, "newer", 5, 0600, NULL), 0);
    /* Somebody who may write into the folder guesses the name of the temporary file. */
    char trap[96], other[64];
    snprintf(trap, sizeof(trap), "%s.%d.tmp", path, getpid());
    snprintf(other, sizeof(other), "%s/other", dir);
    assert_int_equal(symlink(other, trap), 0);
    assert_int_equal(io_write_file_durably(path, "newer", 5, 0600, NULL), 0);
    assert_int_equal(access(other, F_OK), -1);
    assert_int_equal(lstat(path, &st), 0);
    assert_true(S_ISREG(st.st_mode));
    cleanup_free char *data = NULL;
    size_t n;
    assert_int_equal(io_read_file(path, 5, &data, &n, NULL), 0);
    assert_int_equal(n, 5);
    assert_string_equal(data, "newer");
    cleanup_free char *none = NULL;
    cleanup_error struct vm_error *err = NULL, *missing = NULL;
    assert_int_equal(io_read_file(path, 4, &none, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_int_equal(io_write_file_durably("/nonexistent/f", "x", 1, 0600, &missing), -1);
    assert_int_equal(missing->kind, VM_ERROR_NOT_FOUND);
    assert_int_equal(io_make_folders(deep, 0700, NULL), 0);
    assert_int_equal(io_make_folders(deep, 0700, NULL), 0);
    assert_int_equal(stat(deep, &st), 0);
    assert_int_equal(io_make_folders("/dev/null/x", 0700, NULL), -1);
    char command[128];
    snprintf(command, sizeof(command), "test $(ls %s | wc -l) = 2 && rm -r %s", dir, dir);
    assert_int_equal(system(command), 0); /* no temporary file was left */
}

/* A device may act on being opened, and a FIFO waits for somebody who writes. */
static void what_is_of_another_type_is_not_opened(void **state)
{
    (void)state;
    char fifo[] = "/tmp/vmmig-test-fifo.XXXXXX", event[4096];
    close(mkstemp(fifo));
    unlink(fifo);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    const char *const paths[] = {fifo, "/dev/zero", "/dev"};
    int seen = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    for (size_t i = 0; i < sizeof(paths) / sizeof(*paths); i++) {
        cleanup_error struct vm_error *err = NULL, *also = NULL;
        assert_true(inotify_add_watch(seen, paths[i], IN_OPEN) >= 0);
        assert_int_equal(io_open_type("", paths[i], S_IFREG, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_REFUSED);
        assert_int_equal(io_open_type("", paths[i], S_IFBLK, &also), -1);
        assert_int_equal(also->kind, VM_ERROR_REFUSED);
        assert_int_equal(read(seen, event, sizeof(event)), -1);
    }
    close(seen);
    unlink(fifo);
    cleanup_close int fd = io_open_type("", "/proc/self/status", S_IFREG, NULL);
    assert_true(read(fd, event, sizeof(event)) > 0);
}

static void descriptors_travel(void **state)
{
    (void)state;
    int fds[2], pipes[2], got[2], n_got;
    char text[8];
    socket_pair(fds);
    assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
    assert_int_equal(io_send_fds(fds[0], "hi", 2, &pipes[1], 1, NULL), 0);
    assert_int_equal(io_recv_fds(fds[1], text, sizeof(text), got, 2, &n_got, NULL), 2);
    assert_int_equal(n_got, 1);
    assert_true(fcntl(got[0], F_GETFD) & FD_CLOEXEC);
    assert_int_equal(write(got[0], "z", 1), 1);
    assert_int_equal(read(pipes[0], text, 1), 1);
    close(got[0]);
    close(pipes[1]);
    assert_int_equal(read(pipes[0], text, 1), 0);
    /* More than is expected: refused, and none of them is kept open. */
    assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
    const int two[] = {pipes[1], pipes[1]};
    assert_int_equal(io_send_fds(fds[0], "x", 1, two, 2, NULL), 0);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(io_recv_fds(fds[1], text, sizeof(text), got, 1, &n_got, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    close(pipes[1]);
    assert_int_equal(read(pipes[0], text, 1), 0);
    close(pipes[0]);
    close(fds[0]);
    close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(more_than_a_socket_holds_goes_through),
        cmocka_unit_test(waits_end_at_the_deadline_and_on_the_latch),
        cmocka_unit_test(an_end_of_file_is_unreachable_and_no_signal),
        cmocka_unit_test(files_are_replaced_whole),
        cmocka_unit_test(what_is_of_another_type_is_not_opened),
        cmocka_unit_test(descriptors_travel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
