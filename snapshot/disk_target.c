/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/disk_target.h"

#include "base/activation.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/push_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

struct disk_target {
    struct disk_target_params params;
    pid_t nbdkit;
    int data; /* what the plugin says */
    int over; /* latch: the thread is through */
    pthread_t thread;
    bool started;
    uint8_t *buffer;
    atomic_uint_fast64_t bytes;
    pthread_mutex_t lock;
    struct vm_error *error; /* under lock */
};

/* ---- what arrives ---- */

static int take(struct disk_target *t, const struct push_message *m, struct vm_error **err)
{
    const struct disk_target_params *p = &t->params;
    bool write = m->op == PUSH_WRITE;
    if ((!write && m->op != PUSH_ZERO) || (write && m->len > PUSH_WRITE_MAX))
        return error_set(err, VM_ERROR_PROTOCOL, "nbdkit says %" PRIu32 ", which nobody knows",
                         m->op);
    if (write && io_read_full(t->data, t->buffer, (size_t)m->len, INT64_MAX, -1, err) < 0)
        return -1;
    if (FAULT("snapshot.arrived") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot take a disk's data");
    atomic_fetch_add(&t->bytes, m->len);
    return gather_write(p->gather, p->file, p->size, m->offset, write ? t->buffer : NULL, m->len,
                        err);
}

static int receive(struct disk_target *t, struct vm_error **err)
{
    for (;;) {
        struct push_message m;
        if (io_read_full(t->data, &m, sizeof(m), INT64_MAX, -1, err) < 0)
            return error_wrap(err, "nbdkit ended before the disk was complete");
        if (m.op == PUSH_CLOSE)
            return 0;
        if (take(t, &m, err) < 0)
            return -1;
    }
}

static void *receive_main(void *arg)
{
    struct disk_target *t = arg;
    struct vm_error *err = NULL;
    receive(t, &err);
    shutdown(t->data, SHUT_RDWR); /* the plugin's next write fails */
    pthread_mutex_lock(&t->lock);
    t->error = err;
    pthread_mutex_unlock(&t->lock);
    io_latch_set(t->over);
    return NULL;
}

/* ---- nbdkit ---- */

/* Nobody but QEMU's user may connect, from the first instant. */
static int listen_at(const char *path, uid_t user, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the name of a socket is too long: %s", path);
    strcpy(address.sun_path, path);
    unlink(path);
    if (fd < 0 || fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        listen(fd, 1) < 0)
        return error_errno(err, errno, "cannot make the socket %s", path);
    if (user != geteuid() && lchown(path, user, (gid_t)-1) < 0)
        log_info("a disk's target stays the agent's own", "path=%s errno=%d", log_q(path), errno);
    return steal_fd(&fd);
}

static int spawn_nbdkit(struct disk_target *t, int listener, int data, struct vm_error **err)
{
    const int fds[] = {listener, data};
    char size[32], fd[16];
    snprintf(size, sizeof(size), "size=%" PRIu64, t->params.size);
    snprintf(fd, sizeof(fd), "fd=%d", ACTIVATION_LISTENER + 1);
    const char *argv[] = {"nbdkit", "-f", "--exit-with-parent", t->params.plugin, fd, size, NULL};
    return activation_spawn(argv, fds, 2, false, &t->nbdkit, err);
}

static int start(struct disk_target *t, struct vm_error **err)
{
    int data[2];
    cleanup_close int listener = listen_at(t->params.socket_path, t->params.user, err);
    if (listener < 0)
        return -1;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, data) < 0)
        return error_errno(err, errno, "cannot make a socket");
    t->data = data[0];
    cleanup_close int plugins = data[1];
    t->over = io_latch_new(err);
    t->buffer = malloc(PUSH_WRITE_MAX);
    if (!t->buffer)
        return error_nomem(err);
    if (t->over < 0 || spawn_nbdkit(t, listener, plugins, err) < 0)
        return -1;
    int rc = pthread_create(&t->thread, NULL, receive_main, t);
    if (rc)
        return error_errno(err, rc, "cannot start a thread");
    t->started = true;
    return 0;
}

struct disk_target *disk_target_create(const struct disk_target_params *params, struct vm_error **err)
{
    struct disk_target *t = calloc(1, sizeof(*t));
    if (!t) {
        error_nomem(err);
        return NULL;
    }
    t->params = *params;
    t->data = t->over = -1;
    pthread_mutex_init(&t->lock, NULL);
    if (access(params->plugin, R_OK) < 0)
        error_errno(err, errno, "cannot read nbdkit's plugin %s", params->plugin);
    else if (start(t, err) == 0)
        return t;
    disk_target_destroy(t);
    return NULL;
}

const struct vm_error *disk_target_error(struct disk_target *t)
{
    SCOPE_LOCK(&t->lock);
    return t->error;
}

uint64_t disk_target_bytes(struct disk_target *t)
{
    return atomic_load(&t->bytes);
}

int disk_target_finish(struct disk_target *t, int64_t deadline_ns, int cancel_fd,
                       struct vm_error **err)
{
    if (io_wait(t->over, POLLIN, deadline_ns, cancel_fd, err) < 0)
        return -1;
    const struct vm_error *failed = disk_target_error(t);
    return failed ? error_propagate(err, error_copy(failed)) : 0;
}

void disk_target_destroy(struct disk_target *t)
{
    if (!t)
        return;
    if (t->nbdkit) {
        kill(t->nbdkit, SIGKILL);
        while (waitpid(t->nbdkit, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (t->data >= 0)
        shutdown(t->data, SHUT_RDWR);
    if (t->started)
        pthread_join(t->thread, NULL);
    close_fd(&t->data);
    close_fd(&t->over);
    unlink(t->params.socket_path); /* if QEMU never came */
    error_free(t->error);
    free(t->buffer);
    pthread_mutex_destroy(&t->lock);
    free(t);
}
