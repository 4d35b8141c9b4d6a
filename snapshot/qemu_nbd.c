/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/qemu_nbd.h"

#include "base/activation.h"
#include "base/clock.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <libnbd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

struct qemu_nbd {
    char *path;
    pid_t pid;
    int process; /* a pidfd */
    int cancel_fd;
    struct nbd_handle *nbd;
};

static int fail(const struct qemu_nbd *q, const char *what, struct vm_error **err)
{
    return error_set(err, nbd_get_errno() == ENOSPC ? VM_ERROR_NO_SPACE : VM_ERROR_FAILED, "%s %s: %s", what, q->path,
                     nbd_get_error());
}

/* ---- waiting ---- */

/* What libnbd waits for, or the latch. */
static int wait_once(struct qemu_nbd *q, const char *what, struct vm_error **err)
{
    unsigned direction = nbd_aio_get_direction(q->nbd);
    struct pollfd p[2] = {{.fd = nbd_aio_get_fd(q->nbd)}, {.fd = q->cancel_fd, .events = POLLIN}};
    p[0].events = (direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                  (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
    if (poll(p, 2, -1) < 0)
        return errno == EINTR ? 0 : error_errno(err, errno, "%s %s", what, q->path);
    if (p[1].revents)
        return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    bool reads = (direction & LIBNBD_AIO_DIRECTION_READ) && p[0].revents & (POLLIN | POLLHUP | POLLERR);
    return (reads ? nbd_aio_notify_read(q->nbd) : nbd_aio_notify_write(q->nbd)) < 0 ? fail(q, what, err) : 0;
}

static int wait_connected(struct qemu_nbd *q, struct vm_error **err)
{
    static const char what[] = "qemu-nbd cannot write";
    while (!nbd_aio_is_ready(q->nbd)) {
        if (nbd_aio_is_dead(q->nbd) || nbd_aio_is_closed(q->nbd))
            return fail(q, what, err);
        if (wait_once(q, what, err) < 0)
            return -1;
    }
    return 0;
}

/* For the command that was just given. */
static int wait_answer(struct qemu_nbd *q, int64_t cookie, const char *what, struct vm_error **err)
{
    int done;
    if (cookie < 0)
        return fail(q, what, err);
    while ((done = nbd_aio_command_completed(q->nbd, (uint64_t)cookie)) == 0)
        if (wait_once(q, what, err) < 0)
            return -1;
    return done < 0 ? fail(q, what, err) : 0;
}

/* ---- starting ---- */

/*
 * A socket that listens, and our connection to it, which waits there. Nobody else can be faster:
 * its folder is ours alone, and gone when it is connected.
 */
static int make_sockets(int *ret_listener, int *ret_ours, struct vm_error **err)
{
    char folder[] = "/tmp/vmmig-nbd-XXXXXX";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    cleanup_close int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cleanup_close int ours = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0 || ours < 0 || !mkdtemp(folder))
        return error_errno(err, errno, "cannot make a socket for qemu-nbd");
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/s", folder);
    bool made = bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 1) == 0 &&
                connect(ours, (struct sockaddr *)&address, sizeof(address)) == 0;
    int failed = errno;
    unlink(address.sun_path);
    rmdir(folder);
    if (!made)
        return error_errno(err, failed, "cannot make a socket for qemu-nbd");
    *ret_listener = steal_fd(&listener);
    *ret_ours = steal_fd(&ours);
    return 0;
}

/* It ends with its only client. */
static int spawn(struct qemu_nbd *q, const char *format, int listener, struct vm_error **err)
{
    cleanup_free char *option = NULL;
    if (asprintf(&option, "--format=%s", format) < 0) {
        option = NULL;
        return error_nomem(err);
    }
    const char *argv[] = {"qemu-nbd", "--discard=unmap", option, "--", q->path, NULL};
    return activation_spawn(argv, &listener, 1, false, &q->pid, err);
}

static int start(struct qemu_nbd *q, const char *format, struct vm_error **err)
{
    int listener = -1, ours = -1;
    if (make_sockets(&listener, &ours, err) < 0)
        return -1;
    cleanup_close int listening __attribute__((unused)) = listener;
    cleanup_close int connected = ours;
    if (spawn(q, format, listener, err) < 0)
        return -1;
    q->process = (int)syscall(SYS_pidfd_open, q->pid, 0);
    if (q->process < 0)
        return error_errno(err, errno, "cannot watch qemu-nbd");
    q->nbd = nbd_create();
    if (!q->nbd || nbd_aio_connect_socket(q->nbd, connected) < 0)
        return fail(q, "qemu-nbd cannot write", err);
    steal_fd(&connected);
    close_fd(&listening); /* else nobody hears that qemu-nbd ended before it took the connection */
    return wait_connected(q, err);
}

struct qemu_nbd *qemu_nbd_start(const char *path, const char *format, int cancel_fd, struct vm_error **err)
{
    CLEANUP(qemu_nbd) struct qemu_nbd *q = calloc(1, sizeof(*q));
    if (q) {
        q->process = -1;
        q->cancel_fd = cancel_fd;
        q->path = strdup(path);
    }
    if (!q || !q->path) {
        error_nomem(err);
        return NULL;
    }
    return start(q, format, err) < 0 ? NULL : steal_ptr(&q);
}

/* ---- writing ---- */

int qemu_nbd_write(struct qemu_nbd *q, uint64_t offset, const void *data, size_t len, struct vm_error **err)
{
    return wait_answer(q, nbd_aio_pwrite(q->nbd, data, len, offset, NBD_NULL_COMPLETION, 0), "cannot write", err);
}

int qemu_nbd_finish(struct qemu_nbd *q, struct vm_error **err)
{
    static const char what[] = "cannot complete";
    if (wait_answer(q, nbd_aio_flush(q->nbd, NBD_NULL_COMPLETION, 0), what, err) < 0)
        return -1;
    if (nbd_aio_disconnect(q->nbd, 0) < 0)
        return fail(q, what, err);
    while (!nbd_aio_is_closed(q->nbd) && !nbd_aio_is_dead(q->nbd))
        if (wait_once(q, what, err) < 0)
            return -1;
    return io_wait(q->process, POLLIN, INT64_MAX, q->cancel_fd, err);
}

void qemu_nbd_stop(struct qemu_nbd *q)
{
    if (!q)
        return;
    nbd_close(q->nbd); /* which ends qemu-nbd, too, as soon as its storage answers; takes NULL */
    if (q->pid) {
        struct pollfd ended = {.fd = q->process, .events = POLLIN};
        if (q->process < 0 || poll(&ended, 1, QEMU_NBD_END_MS) <= 0)
            kill(q->pid, SIGKILL);
        while (waitpid(q->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    close_fd(&q->process);
    free(q->path);
    free(q);
}
