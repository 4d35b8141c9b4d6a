/* SPDX-License-Identifier: Apache-2.0 */
#include "base/argv.h"
#include "base/clock.h"
#include "vmm/attach_private.h"

#include <stdio.h>
#include <string.h>

static const char accel[] = "attach";

/* ---- guest_ops ---- */

static struct attach *of(struct guest *g)
{
    return (struct attach *)g;
}

static enum guest_run_state run_state(Vmmig__Attach__RunState state)
{
    switch (state) {
    case VMMIG__ATTACH__RUN_STATE__RUN_RUNNING:
        return GUEST_RUNNING;
    case VMMIG__ATTACH__RUN_STATE__RUN_PAUSED:
        return GUEST_PAUSED;
    case VMMIG__ATTACH__RUN_STATE__RUN_INCOMING:
        return GUEST_INCOMING;
    default:
        return GUEST_BROKEN;
    }
}

static const char *state_name(enum guest_run_state state)
{
    static const char *const names[] = {[GUEST_RUNNING] = "running",
                                        [GUEST_PAUSED] = "paused",
                                        [GUEST_INCOMING] = "incoming",
                                        [GUEST_POSTMIGRATE] = "postmigrate",
                                        [GUEST_BROKEN] = "broken"};
    return names[state];
}

int attach_query_state(struct attach *a, Vmmig__Attach__RunState *ret_state,
                       struct guest_status *ret_status, struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer answer = {.n_fds = 0};
    if (attach_request(&a->client, VMMIG__ATTACH__TYPE__STATUS, NULL, -1, VMMIG__ATTACH__TYPE__STATE,
                       &answer, err) < 0)
        return -1;
    const Vmmig__Attach__State *m = answer.message.state;
    if (ret_state)
        *ret_state = m->state;
    if (ret_status) {
        *ret_status = (struct guest_status){.state = run_state(m->state), .migrating = m->tracking};
        snprintf(ret_status->detail, sizeof(ret_status->detail), "%s",
                 *m->detail ? m->detail : state_name(ret_status->state));
    }
    return 0;
}

static int status(struct guest *g, struct guest_status *ret_status, struct vm_error **err)
{
    return attach_query_state(of(g), NULL, ret_status, err);
}

static int pause_guest(struct guest *g, struct vm_error **err)
{
    if (attach_order(&of(g)->client, VMMIG__ATTACH__TYPE__PAUSE, NULL, err) < 0)
        return -1;
    attach_source_paused(of(g));
    return 0;
}

static int resume(struct guest *g, struct vm_error **err)
{
    struct attach *a = of(g);
    if (attach_order(&a->client, VMMIG__ATTACH__TYPE__RESUME, NULL, err) < 0)
        return -1;
    atomic_store(&a->resumed_ns, clock_mono_ns());
    attach_end_copy(a);
    return 0;
}

static int release(struct guest *g, struct vm_error **err)
{
    struct attach *a = of(g);
    if (attach_order(&a->client, VMMIG__ATTACH__TYPE__RELEASE, NULL, err) < 0)
        return -1;
    attach_end_copy(a);
    return 0;
}

int64_t attach_resumed_ns(struct attach *a)
{
    return atomic_load(&a->resumed_ns);
}

void attach_end_copy(struct attach *a)
{
    attach_source_release(a);
    /* A lost connection has ended the tracking, too: none is made for that. */
    if (atomic_exchange(&a->tracking_left_on, false) && attach_client_connected(&a->client))
        attach_order(&a->client, VMMIG__ATTACH__TYPE__UNTRACK, NULL, NULL);
}

int attach_query_stands(struct attach *a, enum attach_stands *ret_stands, struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer answer = {.n_fds = 0};
    if (attach_request(&a->client, VMMIG__ATTACH__TYPE__STATUS, NULL, -1, VMMIG__ATTACH__TYPE__STATE,
                       &answer, err) < 0)
        return -1;
    const Vmmig__Attach__State *m = answer.message.state;
    *ret_stands = m->state != VMMIG__ATTACH__RUN_STATE__RUN_PAUSED     ? ATTACH_STANDS_NOT
                  : !m->held                                           ? ATTACH_STANDS_VMMS
                  : m->before == VMMIG__ATTACH__RUN_STATE__RUN_RUNNING ? ATTACH_STANDS_PAUSED
                  : m->before == VMMIG__ATTACH__RUN_STATE__RUN_PAUSED  ? ATTACH_STANDS_BORROWED
                                                                       : ATTACH_STANDS_LOADED;
    return 0;
}

int attach_let_go(struct attach *a, struct vm_error **err)
{
    enum attach_stands stands;
    if (attach_query_stands(a, &stands, err) < 0)
        return -1;
    if (stands == ATTACH_STANDS_BORROWED)
        return guest_release(&a->guest, err);
    return stands == ATTACH_STANDS_PAUSED || stands == ATTACH_STANDS_LOADED ? guest_resume(&a->guest, err) : 0;
}

static int announce(struct guest *g, struct vm_error **err)
{
    (void)g; /* the guest's devices are the VMM's business: its resume announces them */
    (void)err;
    return 0;
}

static int quit(struct guest *g, struct vm_error **err)
{
    return attach_order(&of(g)->client, VMMIG__ATTACH__TYPE__QUIT, NULL, err);
}

static void destroy(struct guest *g)
{
    struct attach *a = of(g);
    attach_source_stop(g, NULL);
    attach_source_release(a);
    attach_sink_destroy(a->sink);
    attach_client_finish(&a->client);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

static const struct guest_ops attach_ops = {.driver = accel,
                                            .mapped_source = true,
                                            .destroy = destroy,
                                            .status = status,
                                            .pause = pause_guest,
                                            .resume = resume,
                                            .release = release,
                                            .source_start = attach_source_start,
                                            .source_progress = attach_source_progress,
                                            .source_stop = attach_source_stop,
                                            .announce = announce,
                                            .quit = quit,
                                            .sink_populate = attach_sink_populate,
                                            .sink_regions = attach_sink_regions,
                                            .sink_bytes = attach_sink_bytes,
                                            .sink_finish = attach_sink_finish};

/* ---- Life ---- */

struct attach *attach_connect(const char *path, int timeout_ms, struct vm_error **err)
{
    struct attach *a = calloc(1, sizeof(*a));
    if (!a) {
        error_nomem(err);
        return NULL;
    }
    if (attach_client_open(&a->client, path, timeout_ms, err) < 0) {
        free(a);
        return NULL;
    }
    a->guest.ops = &attach_ops;
    a->guest.process = a->client.process;
    pthread_mutex_init(&a->lock, NULL);
    return a;
}

void attach_destroy(struct attach *a)
{
    if (a)
        destroy(&a->guest);
}

struct guest *attach_guest(struct attach *a)
{
    return &a->guest;
}

struct attach *attach_from_guest(struct guest *g)
{
    return g->ops == &attach_ops ? of(g) : NULL;
}

const struct attach_info *attach_info(const struct attach *a)
{
    return &a->client.info;
}

/* ---- Definition ---- */

bool attach_is_definition(const struct qemu_definition *d)
{
    return !strcmp(d->accel, accel);
}

/* Slots, from the VMM's answer: nothing is mapped for that. */
int attach_define_memory(struct attach *a, struct qemu_definition *d, uint64_t *ret_generation, struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer answer = {.n_fds = 0};
    if (attach_memory_ask(&a->client, &answer, err) < 0)
        return -1;
    for (size_t i = 0; i < answer.message.memory->n_slots; i++) {
        const Vmmig__Attach__Slot *slot = answer.message.memory->slots[i];
        struct qemu_ram *ram = qemu_definition_add_ram(d);
        if (!ram)
            return error_nomem(err);
        ram->block = strdup(slot->name);
        ram->backend = strdup(slot->name);
        ram->guest_address = slot->guest_address;
        ram->size = slot->size;
        ram->page_size = slot->page_size;
        if (!ram->block || !ram->backend)
            return error_nomem(err);
        d->memory += slot->size;
    }
    *ret_generation = answer.message.memory->generation;
    return 0;
}

/* The command line that the VMM gave for a destination; without one its own name, which starts nothing useful. */
static int define_argv(struct attach *a, struct qemu_definition *d, struct vm_error **err)
{
    const struct attach_info *info = attach_info(a);
    size_t n = argv_count(info->incoming_argv);
    const char *name = n ? info->incoming_argv[0] : info->vmm;
    char *only[] = {(char *)(uintptr_t)name};
    const char *slash = strrchr(name, '/');
    d->argv = n ? argv_copy(info->incoming_argv, n) : argv_copy(only, 1);
    d->binary = strdup(n && slash ? slash + 1 : ATTACH_NO_BINARY);
    if (n && !slash) {
        free(d->binary);
        d->binary = strdup(name);
    }
    return d->argv && d->binary ? 0 : error_nomem(err);
}

int attach_define(struct attach *a, struct qemu_definition *ret_definition, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition d = {.state = GUEST_PAUSED};
    const struct attach_info *info = attach_info(a);
    struct guest_status now;
    uint64_t generation; /* of no use: they may change as long as nobody copies */
    if (attach_query_state(a, NULL, &now, err) < 0 || attach_define_memory(a, &d, &generation, err) < 0 ||
        define_argv(a, &d, err) < 0)
        return -1;
    bool has_word = strcmp(now.detail, state_name(now.state)) != 0;
    if (now.state == GUEST_BROKEN)
        return error_set(err, VM_ERROR_REFUSED, "the guest is broken%s%s%s: it can be neither moved nor snapshotted",
                         has_word ? " (" : "", has_word ? now.detail : "", has_word ? ")" : "");
    if (now.state != GUEST_RUNNING && now.state != GUEST_PAUSED)
        return error_set(err, VM_ERROR_REFUSED, "the guest is %s", now.detail);
    d.state = now.state;
    d.boot = a->guest.process.boot;
    d.cwd = strdup("/");
    d.machine = strdup(info->machine);
    d.accel = strdup(accel);
    d.cpu_model = strdup(info->vmm);
    d.cpu_features = strdup("");
    d.n_cpus = info->n_vcpus;
    if (!d.cwd || !d.machine || !d.accel || !d.cpu_model || !d.cpu_features)
        return error_nomem(err);
    *ret_definition = d;
    d = (struct qemu_definition){0};
    return 0;
}
