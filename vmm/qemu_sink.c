/* SPDX-License-Identifier: Apache-2.0 */
/* The sink half of the QEMU driver. */
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_memory.h"
#include "vmm/qemu_portable.h"
#include "vmm/qemu_preflight.h"
#include "vmm/qemu_settings.h"
#include "vmm/qemu_source.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static const char fd_name[] = "vmmig-incoming";
enum { KILL_TIMEOUT_MS = 5000 };
/* Between us and QEMU's loader, a millisecond's worth. */
enum { LOADER_BUFFER = 1 << 20 };

struct sink {
    struct qemu_memory *memory;
    int fd; /* our end of what QEMU loads; -1 before the first byte and after the last */
    bool begun;
};

void qemu_sink_destroy(struct sink *s)
{
    if (!s)
        return;
    close_fd(&s->fd);
    qemu_memory_destroy(s->memory);
    free(s);
}

void qemu_sink_release(struct qemu *q)
{
    qemu_sink_destroy(steal_ptr(&q->sink));
    qemu_settings_restore(q);
}

/* Takes `memory` over. */
static int add_sink(struct qemu *q, struct qemu_memory **memory, struct vm_error **err)
{
    q->sink = calloc(1, sizeof(*q->sink));
    if (!q->sink)
        return error_nomem(err);
    *q->sink = (struct sink){.memory = steal_ptr(memory), .fd = -1};
    return 0;
}

static int get_sink(struct guest *g, struct sink **ret, struct vm_error **err)
{
    *ret = qemu_from_guest(g)->sink;
    return *ret ? 0 : error_set(err, VM_ERROR_USAGE, "this VM does not wait for a guest");
}

/* Both a fresh QEMU and a prepared one: it must wait, and must not start by itself. */
static int make_ready(struct qemu *q, const struct qemu_definition *d, struct qemu_memory *memory,
                      struct vm_error **err)
{
    static const char *const on[] = {"events", "late-block-activate", NULL};
    char state[32], migration[32];
    if (qemu_query_run_state(q, state, err) < 0 ||
        qemu_query_migration(q, migration, NULL, err) < 0)
        return -1;
    if (strcmp(state, "inmigrate"))
        return error_set(
            err, VM_ERROR_REFUSED,
            "the QEMU prepared for the guest is '%s': it must wait with -incoming defer", state);
    if (*migration && strcmp(migration, "none"))
        return error_set(err, VM_ERROR_REFUSED,
                         "the QEMU prepared for the guest already listens for a migration: it must "
                         "wait with -incoming defer");
    if (qemu_verify(q, d, err) < 0 || qemu_memory_bind(memory, q, err) < 0)
        return -1;
    /* Nothing is changed at one that is refused. While it waits, `stop` only takes back that it would run by itself. */
    if (qemu_settings_use(q, on, json_pack("{s:s}", "tls-creds", ""), err) < 0)
        return -1;
    if (qemu_command(q, "stop", NULL, NULL, err) == 0)
        return 0;
    qemu_settings_restore(q);
    return -1;
}

/* A QEMU of the definition's command line, whose memory that shall be. */
static struct qemu *spawn(const struct qemu_sink_params *params, const struct qemu_memory *memory, bool boots,
                          struct vm_error **err)
{
    const struct qemu_definition *d = params->definition;
    struct qemu_place place = {qemu_memory_fds(memory), params->maps, params->n_maps, boots};
    cleanup_free char **argv = NULL;
    if (qemu_argv_destination(d, &place, &argv, err) < 0)
        return NULL;
    struct qemu_launch launch = params->launch;
    launch.argv = argv;
    launch.n_fds = 0;
    int fds[GUEST_REGIONS_MAX];
    for (unsigned i = 0; i < d->n_ram; i++)
        if (place.fds[i] >= 0)
            fds[launch.n_fds++] = place.fds[i];
    launch.fds = fds;
    launch.foreign_cwd = !launch.cwd;
    launch.cwd = launch.cwd ? launch.cwd : d->cwd;
    return qemu_spawn(&launch, err);
}

static void end(struct qemu *q, const struct qemu_sink_params *params)
{
    guest_kill(&q->guest, KILL_TIMEOUT_MS, NULL);
    unlink(params->launch.qmp_path);
    qemu_destroy(q);
}

struct qemu *qemu_sink_spawn(const struct qemu_sink_params *params, struct vm_error **err)
{
    const struct qemu_definition *d = params->definition;
    CLEANUP(qemu_memory) struct qemu_memory *memory = qemu_memory_create(params->vm, d, err);
    struct qemu *q = memory ? spawn(params, memory, false, err) : NULL;
    if (!q)
        return NULL;
    if (make_ready(q, d, memory, err) == 0 && add_sink(q, &memory, err) == 0)
        return q;
    end(q, params);
    return NULL;
}

struct qemu *qemu_boot_spawn(const struct qemu_sink_params *params, struct vm_error **err)
{
    const struct qemu_definition *d = params->definition;
    CLEANUP(qemu_memory) struct qemu_memory *memory = qemu_memory_create(params->vm, d, err);
    struct qemu *q = memory ? spawn(params, memory, true, err) : NULL;
    if (!q || qemu_verify(q, d, err) == 0)
        return q;
    end(q, params);
    return NULL;
}

struct qemu *qemu_sink_attach(const struct qemu_definition *definition, const char *qmp_path,
                              int timeout_ms, struct vm_error **err)
{
    CLEANUP(qemu_memory) struct qemu_memory *memory = qemu_memory_create_unmapped(definition, err);
    if (!memory)
        return NULL;
    CLEANUP(qemu) struct qemu *q = qemu_attach(qmp_path, timeout_ms, err);
    if (!q)
        return NULL;
    if (make_ready(q, definition, memory, err) < 0) {
        error_wrap(err, "%s", qmp_path);
        return NULL;
    }
    return add_sink(q, &memory, err) < 0 ? NULL : steal_ptr(&q);
}

int qemu_sink_populate(struct qemu *q, const uint64_t *addrs, unsigned n, struct vm_error **err)
{
    return qemu_memory_populate(q->sink->memory, addrs, n, err);
}

int qemu_sink_regions(struct guest *g, const struct guest_region **ret_regions, unsigned *ret_n)
{
    struct sink *s;
    if (get_sink(g, &s, NULL) < 0)
        return -1;
    *ret_regions = qemu_memory_regions(s->memory, ret_n);
    return 0;
}

/* Loading. */

/*
 * QEMU loads with one thread: where all of the memory goes through that, it must not wait for us to be scheduled each
 * time that it has taken the kernel's 208 KiB. An agent that is not root gets what the system allows.
 */
static void keep_fed(int fd)
{
    int size = LOADER_BUFFER;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
}

static int begin(struct qemu *q, struct sink *s, struct vm_error **err)
{
    char uri[32];
    int qemus;
    snprintf(uri, sizeof(uri), "fd:%s", fd_name);
    if (qemu_source_socketpair(&qemus, &s->fd, err) < 0)
        return -1;
    keep_fed(s->fd);
    s->begun = true;
    cleanup_close int owned = qemus;
    if (qemu_give_fd(q, fd_name, owned, err) < 0)
        return -1;
    if (qemu_command(q, "migrate-incoming", json_pack("{s:s}", "uri", uri), NULL, err) == 0)
        return 0;
    qemu_forget_fd(q, fd_name);
    return -1;
}

/* QEMU does not take what it is given: mostly it ended, and its log says why. */
static int load_failed(struct qemu *q, struct vm_error **err)
{
    char status[32];
    struct vm_error *died = NULL;
    CLEANUP(json) json_t *info = NULL;
    if ((*err)->kind == VM_ERROR_CANCELLED || (*err)->kind == VM_ERROR_TIMEOUT)
        return -1;
    if (qemu_query_migration(q, status, &info, &died) < 0) {
        error_clear(err);
        return error_propagate(err, died);
    }
    const char *why = qmp_string(info, "error-desc");
    return *why ? error_wrap(err, "QEMU cannot load the guest: %.400s", why) : -1;
}

int qemu_sink_bytes(struct guest *g, const void *data, size_t n, int64_t deadline_ns, int cancel_fd,
                    struct vm_error **err)
{
    struct qemu *q = qemu_from_guest(g);
    struct sink *s;
    struct vm_error *failed = NULL;
    if (get_sink(g, &s, err) < 0)
        return -1;
    if (!s->begun && begin(q, s, err) < 0)
        return -1;
    if (s->fd < 0)
        return error_set(err, VM_ERROR_USAGE, "the guest's state was complete already");
    if (FAULT("stream.write") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "stream.write");
    if (io_write_full(s->fd, data, n, deadline_ns, cancel_fd, &failed) == 0)
        return 0;
    load_failed(q, &failed);
    return error_propagate(err, failed);
}

/* One look at a QEMU that loads: 1 when it is done, 0 when it is not yet. */
static int look(struct qemu *q, struct vm_error **err)
{
    char status[32], state[32];
    CLEANUP(json) json_t *info = NULL;
    if (qemu_query_migration(q, status, &info, err) < 0 || qemu_query_run_state(q, state, err) < 0)
        return -1;
    if (!strcmp(status, "failed"))
        return error_set(err, VM_ERROR_FAILED, "QEMU cannot load the guest: %.400s",
                         qmp_string(info, "error-desc"));
    if (strcmp(status, "completed") || !strcmp(state, "inmigrate"))
        return 0;
    if (!strcmp(state, "running"))
        return error_set(err, VM_ERROR_FAILED, "QEMU started the guest by itself after loading it");
    return 1;
}

int qemu_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    struct qemu *q = qemu_from_guest(g);
    struct sink *s;
    if (get_sink(g, &s, err) < 0)
        return -1;
    close_fd(&s->fd);
    if (FAULT("stream.load") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "stream.load");
    for (;;) {
        uint64_t events;
        /* Emptied before looking: what happens after the look makes it readable again. */
        if (read(q->poke, &events, sizeof(events)) < 0 && errno != EAGAIN)
            return error_errno(err, errno, "cannot wait for QEMU");
        int done = look(q, err);
        if (done)
            return done < 0 ? -1 : 0;
        if (io_wait(q->poke, POLLIN, deadline_ns, cancel_fd, err) < 0)
            return error_wrap(err, "QEMU has not loaded the guest");
    }
}
