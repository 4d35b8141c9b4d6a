/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/holder_control.h"

#include "base/cleanup.h"
#include "base/log.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

enum { CLIENTS_MAX = 16 };

struct client {
    struct holder *holder;
    int fd;
    struct loop_watch *watch;
};

struct control_socket {
    int fd;
    struct loop_watch *watch;
    struct client clients[CLIENTS_MAX];
    struct mount_packet packet;
};

unsigned control_count_open(const struct holder *h, unsigned *ret_leases)
{
    unsigned open = 0, leases = 0;
    for (const struct image_dir *d = h->images; d; d = d->next) {
        leases += d->lease != 0;
        for (unsigned i = 0; i < d->n_nodes; i++)
            open += d->nodes[i].open;
    }
    if (ret_leases)
        *ret_leases = leases;
    return open;
}

static void fill_state(struct holder *h)
{
    struct mount_state *s = &h->state;
    pid_t newest = 0;
    s->pid = getpid();
    s->fetchers = fetchers_connected(h, &newest);
    s->fetcher_pid = newest;
    s->images = h->n_images;
    s->open_files = control_count_open(h, &s->leases);
    s->cache_used = h->cache_used;
    s->cache_limit = h->options.cache_size;
    s->read_timeout_ms = h->options.read_timeout_ms;
    snprintf(s->repository, sizeof(s->repository), "%s", h->options.repository);
    snprintf(s->folder, sizeof(s->folder), "%s", h->options.mount);
    snprintf(s->software, sizeof(s->software), "vmmig " VMMIG_VERSION);
}

static int record_now(struct holder *h, const char *name, struct vm_error **err)
{
    for (struct image_dir *d = h->images; d; d = d->next)
        if (!strcmp(d->name, name) && d->recording) {
            image_record(h, d);
            return 0;
        }
    return error_set(err, VM_ERROR_NOT_FOUND, "nothing is being recorded of %s", name);
}

static int handle(struct holder *h, const struct mount_packet *p, struct vm_error **err)
{
    unsigned open;
    switch (p->m.type) {
    case MOUNT_STATUS:
        fill_state(h);
        return 0;
    case MOUNT_REFRESH:
        fetchers_refresh(h);
        return 0;
    case MOUNT_LIMITS:
        h->options.read_timeout_ms = p->m.offset;
        images_limit(h, p->m.len);
        return 0;
    case MOUNT_RECORD:
        return record_now(h, p->m.name, err);
    case MOUNT_STOP:
        open = control_count_open(h, NULL);
        if (open)
            return error_set(err, VM_ERROR_CONFLICT, "%u files below %s are in use", open,
                             h->options.mount);
        loop_stop(h->loop);
        return 0;
    default:
        return error_set(err, VM_ERROR_VERSION, "this mount does not know request %u", p->m.type);
    }
}

static void close_client(struct client *c)
{
    loop_watch_destroy(steal_ptr(&c->watch));
    close_fd(&c->fd);
}

static void on_request(int fd, int ready, void *arg)
{
    struct client *c = arg;
    struct holder *h = c->holder;
    struct mount_packet *p = &h->control->packet;
    cleanup_error struct vm_error *err = NULL;
    (void)ready;
    int r = mount_receive(fd, p, NULL, 0, NULL, &err);
    if (r < 0 && err->sys_errno == EAGAIN)
        return;
    if (r <= 0) {
        close_client(c);
        return;
    }
    bool state = p->m.type == MOUNT_STATUS;
    struct mount_message answer = mount_message(state ? MOUNT_STATE : MOUNT_OK, p->m.id, NULL);
    const void *payload = NULL;
    if (handle(h, p, &err) < 0) {
        answer.type = MOUNT_FAILED;
        answer.kind = (int32_t)err->kind;
        payload = error_message(err);
        answer.payload_len = (uint32_t)strlen(error_message(err));
    } else if (state) {
        payload = &h->state;
        answer.payload_len = sizeof(h->state);
    }
    if (mount_send(fd, &answer, payload, NULL, 0, NULL) < 0)
        close_client(c);
}

static bool is_allowed(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 &&
           (peer.uid == 0 || peer.uid == geteuid());
}

static void on_connection(int listener, int ready, void *arg)
{
    struct holder *h = arg;
    (void)ready;
    cleanup_close int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0 || !is_allowed(fd))
        return;
    for (int i = 0; i < CLIENTS_MAX; i++) {
        struct client *c = &h->control->clients[i];
        if (c->fd >= 0)
            continue;
        c->holder = h;
        c->watch = loop_watch_fd(h->loop, fd, LOOP_READ, on_request, c, NULL);
        if (c->watch)
            c->fd = steal_fd(&fd);
        return;
    }
}

int control_open(struct holder *h, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = h->options.control;
    struct control_socket *c = calloc(1, sizeof(*c));
    if (!c)
        return error_nomem(err);
    h->control = c;
    for (int i = 0; i < CLIENTS_MAX; i++)
        c->clients[i].fd = -1;
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the path of a socket has at most %zu bytes",
                         sizeof(address.sun_path) - 1);
    strcpy(address.sun_path, path);
    c->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        return error_errno(err, errno, "socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof(address)) == 0) {
        close_fd(&c->fd);
        return error_set(err, VM_ERROR_CONFLICT, "another mount answers on %s", path);
    }
    if (errno == ECONNREFUSED)
        unlink(path);
    mode_t before = umask(0177);
    int bound = bind(c->fd, (struct sockaddr *)&address, sizeof(address));
    umask(before);
    if (bound < 0 || listen(c->fd, CLIENTS_MAX) < 0) {
        error_errno(err, errno, "cannot make the socket %s", path);
        close_fd(&c->fd);
        return -1;
    }
    c->watch = loop_watch_fd(h->loop, c->fd, LOOP_READ, on_connection, h, err);
    return c->watch ? 0 : -1;
}

void control_close(struct holder *h)
{
    struct control_socket *c = h->control;
    if (!c)
        return;
    for (int i = 0; i < CLIENTS_MAX; i++)
        if (c->clients[i].fd >= 0)
            close_client(&c->clients[i]);
    loop_watch_destroy(c->watch);
    if (c->fd >= 0)
        unlink(h->options.control);
    close_fd(&c->fd);
    free(c);
    h->control = NULL;
}
