/* SPDX-License-Identifier: Apache-2.0 */
#include "dirtylog/attach_internal.h"

#include "base/argv.h"
#include "base/fault.h"
#include "base/io.h"
#include "proto/fields.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/un.h>

/* ---- Errors for the VMM ---- */

static int code_of(const struct vm_error *err)
{
    if (err->sys_errno)
        return err->sys_errno;
    switch (err->kind) {
    case VM_ERROR_NO_SPACE:
        return ENOMEM;
    case VM_ERROR_CONFLICT:
        return EBUSY;
    case VM_ERROR_REFUSED:
        return EOPNOTSUPP;
    case VM_ERROR_USAGE:
        return EINVAL;
    default:
        return EIO;
    }
}

/* Takes err over. Returns -1. */
static int give_error(struct vm_error *err, struct vmmig_error *error)
{
    if (error) {
        error->code = code_of(err);
        snprintf(error->text, sizeof(error->text), "%s", error_message(err));
    }
    error_free(err);
    return -1;
}

void attach_log(struct vmmig_attach *a, const char *fmt, ...)
{
    char text[512];
    va_list args;
    if (!a->config.callbacks.log)
        return;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    a->config.callbacks.log(a->config.arg, text);
}

/* ---- Tracking ---- */

#define SAME(id, number, name)                                                                     \
    _Static_assert((int)VMMIG_TRACKING_##id == (int)DIRTYLOG_##id, "one numbering of drivers");
DIRTYLOG_KINDS(SAME)
#undef SAME

const char *vmmig_tracking_name(enum vmmig_tracking tracking)
{
    return (unsigned)tracking <= VMMIG_TRACKING_TRACE
               ? dirtylog_kind_name((enum dirtylog_kind)tracking)
               : NULL;
}

int vmmig_tracking_parse(const char *name, enum vmmig_tracking *ret_tracking)
{
    enum dirtylog_kind kind;
    if (!dirtylog_kind_parse(name, &kind))
        return -1;
    *ret_tracking = (enum vmmig_tracking)kind;
    return 0;
}

int vmmig_prepare_vm(int vm_fd, enum vmmig_tracking want, unsigned ring_entries,
                     enum vmmig_tracking *ret_tracking, struct vmmig_error *error)
{
    struct vm_error *err = NULL;
    enum dirtylog_kind kind = (enum dirtylog_kind)want;
    if (dirtylog_prepare(vm_fd, &kind, ring_entries, &err) < 0)
        return give_error(err, error);
    *ret_tracking = (enum vmmig_tracking)kind;
    return 0;
}

/* ---- Life ---- */

static const char *missing_callback(const struct vmmig_callbacks *cb)
{
    return !cb->pause    ? "pause"
           : !cb->resume ? "resume"
           : !cb->save   ? "save"
           : !cb->load   ? "load"
           : !cb->kick   ? "kick"
                         : NULL;
}

static int check_word(const char *what, const char *word, struct vm_error **err)
{
    if (!word)
        return error_set(err, VM_ERROR_USAGE, "%s is missing", what);
    return field_check_text(what, word, 1, ATTACH_WORD_MAX, err) < 0 ? error_set_kind(err, VM_ERROR_USAGE) : 0;
}

static int check_config(const struct vmmig_config *c, struct vm_error **err)
{
    if (c->size != VMMIG_CONFIG_SIZE)
        return error_set(err, VM_ERROR_USAGE,
                         "config.size is %zu; the library that is loaded has %zu: build the VMM anew",
                         c->size, VMMIG_CONFIG_SIZE);
    const char *missing = missing_callback(&c->callbacks);
    if (missing)
        return error_set(err, VM_ERROR_USAGE, "config.callbacks.%s is missing", missing);
    if (check_word("config.vmm", c->vmm, err) < 0 || check_word("config.machine", c->machine, err) < 0)
        return -1;
    if (c->tracking <= VMMIG_TRACKING_AUTO || c->tracking > VMMIG_TRACKING_TRACE)
        return error_set(err, VM_ERROR_USAGE, "config.tracking is not what vmmig_prepare_vm said");
    if (c->tracking != VMMIG_TRACKING_TRACE && !c->vcpu_fds)
        return error_set(err, VM_ERROR_USAGE, "config.vcpu_fds is missing");
    if (c->state_bytes > VMMIG_STATE_MAX)
        return error_set(err, VM_ERROR_USAGE, "config.state_bytes is more than %u", VMMIG_STATE_MAX);
    if (!c->socket_path || strlen(c->socket_path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return error_set(err, VM_ERROR_USAGE, "config.socket_path is missing or longer than 107 bytes");
    if (!c->n_vcpus || c->n_vcpus > VMMIG_VCPUS_MAX)
        return error_set(err, VM_ERROR_USAGE, "%u vCPUs; 1 to %d are possible", c->n_vcpus,
                         VMMIG_VCPUS_MAX);
    if (c->state && c->state != VMMIG_RUNNING && c->state != VMMIG_PAUSED && c->state != VMMIG_INCOMING)
        return error_set(err, VM_ERROR_USAGE,
                         "config.state is none of VMMIG_RUNNING, VMMIG_PAUSED and VMMIG_INCOMING");
    if (c->callback_timeout_ms > VMMIG_CALLBACK_SECONDS * 1000)
        return error_set(err, VM_ERROR_USAGE, "config.callback_timeout_ms is more than %d s",
                         VMMIG_CALLBACK_SECONDS);
    return 0;
}

/* What an agent would refuse is better said to the VMM's author. All else was looked at before. */
static int check_incoming(const struct vmmig_config *c, struct vm_error **err)
{
    cleanup_buffer struct buffer scratch = {0};
    Vmmig__Attach__Welcome w = VMMIG__ATTACH__WELCOME__INIT;
    w.version = ATTACH_VERSION_MAX;
    w.pid = 1;
    w.n_vcpus = c->n_vcpus;
    w.vmm = (char *)(uintptr_t)c->vmm;
    w.machine = (char *)(uintptr_t)c->machine;
    w.tracking = (char *)(uintptr_t)"none";
    w.incoming_argv = (char **)(uintptr_t)c->incoming_argv;
    while (c->incoming_argv && c->incoming_argv[w.n_incoming_argv])
        w.n_incoming_argv++;
    return attach_pack(VMMIG__ATTACH__TYPE__WELCOME, &w.base, &scratch, err) < 0
               ? error_wrap(err, "config.incoming_argv")
               : 0;
}

/* A copy in *to; NULL stays NULL. */
static bool copy_text(const char **to, const char *from)
{
    *to = from ? strdup(from) : NULL;
    return !from || *to;
}

static int copy_config(struct vmmig_attach *a, const struct vmmig_config *from,
                       struct vm_error **err)
{
    struct vmmig_config *c = &a->config;
    *c = *from;
    c->vcpu_fds = NULL; /* the dirty log has its own */
    c->incoming_argv = NULL;
    bool copied = copy_text(&c->socket_path, from->socket_path);
    copied &= copy_text(&c->vmm, from->vmm);
    copied &= copy_text(&c->machine, from->machine);
    copied &= copy_text(&c->record_path, from->record_path);
    c->trace_path = NULL;
    char **argv = (char **)(uintptr_t)from->incoming_argv;
    if (argv)
        c->incoming_argv = (const char *const *)argv_copy(argv, argv_count(argv));
    if (!c->callback_timeout_ms)
        c->callback_timeout_ms = VMMIG_CALLBACK_SECONDS * 1000;
    return copied && (!from->incoming_argv || c->incoming_argv) ? 0 : error_nomem(err);
}

static void free_config(struct vmmig_config *c)
{
    free((char *)(uintptr_t)c->socket_path);
    free((char *)(uintptr_t)c->vmm);
    free((char *)(uintptr_t)c->machine);
    free((char *)(uintptr_t)c->record_path);
    free((char **)(uintptr_t)c->incoming_argv);
}

static bool in_guest(void *arg, unsigned vcpu)
{
    struct vmmig_attach *a = arg;
    return atomic_load(&a->in_guest[vcpu]);
}

static void kick(void *arg, unsigned vcpu)
{
    struct vmmig_attach *a = arg;
    a->config.callbacks.kick(a->config.arg, vcpu);
}

static int make_parts(struct vmmig_attach *a, const struct vmmig_config *config,
                      struct vm_error **err)
{
    struct dirtylog_params log = {.kind = (enum dirtylog_kind)config->tracking,
                                  .vm_fd = config->vm_fd,
                                  .vcpu_fds = config->vcpu_fds,
                                  .n_vcpus = config->tracking == VMMIG_TRACKING_TRACE ? 0
                                                                                      : config->n_vcpus,
                                  .ring_entries = config->ring_entries,
                                  .trace_path = config->trace_path,
                                  .kick = kick,
                                  .in_guest = in_guest,
                                  .arg = a};
    if (copy_config(a, config, err) < 0)
        return -1;
    a->in_guest = calloc(config->n_vcpus, sizeof(*a->in_guest));
    if (!a->in_guest)
        return error_nomem(err);
    a->memory.log = dirtylog_create(&log, err);
    if (!a->memory.log)
        return -1;
    a->stop = io_latch_new(err);
    return a->stop < 0 ? -1 : attach_server_listen(a, err);
}

int vmmig_create(const struct vmmig_config *config, struct vmmig_attach **ret_attach,
                 struct vmmig_error *error)
{
    struct vm_error *err = NULL;
    if (check_config(config, &err) < 0 || check_incoming(config, &err) < 0)
        return give_error(err, error);
#ifdef VMMIG_FAULTS /* in a build for tests, a VMM is armed as our own programs are */
    if (fault_init(&err) < 0)
        return give_error(err, error);
#endif
    struct vmmig_attach *a = calloc(1, sizeof(*a));
    if (!a) {
        error_nomem(&err);
        return give_error(err, error);
    }
    a->state = config->state ? config->state : VMMIG_PAUSED;
    a->listen_fd = a->stop = -1;
    pthread_mutex_init(&a->state_lock, NULL);
    pthread_mutex_init(&a->call_lock, NULL);
    cond_init(&a->call_changed);
    attach_memory_init(&a->memory);
    attach_throttle_init(&a->throttle);
    if (make_parts(a, config, &err) < 0) {
        vmmig_destroy(a);
        return give_error(err, error);
    }
    *ret_attach = a;
    return 0;
}

void vmmig_destroy(struct vmmig_attach *a)
{
    if (!a)
        return;
    attach_server_stop(a);
    attach_throttle_finish(a);
    attach_call_drain(a);
    attach_memory_finish(&a->memory);
    close_fd(&a->stop);
    free(a->in_guest);
    free_config(&a->config);
    pthread_cond_destroy(&a->call_changed);
    pthread_mutex_destroy(&a->call_lock);
    pthread_mutex_destroy(&a->state_lock);
    free(a);
}

/* ---- What the VMM tells ---- */

int vmmig_set_slots(struct vmmig_attach *a, const struct vmmig_slot *slots, unsigned n,
                    struct vmmig_error *error)
{
    struct vm_error *err = NULL;
    int set = attach_memory_set(&a->memory, slots, n, &err);
    if (attach_server_start(a, set < 0 ? NULL : &err) < 0)
        set = -1;
    (void)FAULT("library.told"); /* agents are answered, and the VMM has not gone on yet */
    return set < 0 ? give_error(err, error) : 0;
}

/* What is broken stays so, and why. */
static void change_state(struct vmmig_attach *a, enum vmmig_run_state state)
{
    if (a->state == VMMIG_BROKEN)
        return;
    a->state = state;
    a->detail[0] = 0;
}

void attach_set_state(struct vmmig_attach *a, enum vmmig_run_state state, bool held)
{
    SCOPE_LOCK(&a->state_lock);
    change_state(a, state);
    a->held = held;
    a->pause_hangs = false;
}

void attach_hold(struct vmmig_attach *a)
{
    SCOPE_LOCK(&a->state_lock);
    if (!a->held)
        a->before = a->state;
    a->held = true;
    change_state(a, VMMIG_PAUSED);
}

void attach_released(struct vmmig_attach *a, bool done)
{
    SCOPE_LOCK(&a->state_lock);
    a->releasing = false;
    if (!done && a->state == VMMIG_PAUSED)
        a->held = true;
}

void vmmig_set_state(struct vmmig_attach *a, enum vmmig_run_state state, const char *detail)
{
    SCOPE_LOCK(&a->state_lock);
    if (a->held && state != VMMIG_BROKEN)
        return;
    a->state = state;
    snprintf(a->detail, sizeof(a->detail), "%s", detail ? detail : "");
}

void vmmig_mark_dirty(struct vmmig_attach *a, uint64_t guest_address, uint64_t size)
{
    if (FAULT("attach.mark") != FAULT_DROP)
        attach_memory_mark(&a->memory, guest_address, size);
}

void vmmig_vcpu_enter(struct vmmig_attach *a, unsigned vcpu)
{
    attach_throttle_sleep(&a->throttle);
    atomic_store(&a->in_guest[vcpu], true);
}

bool vmmig_vcpu_exit(struct vmmig_attach *a, unsigned vcpu, uint32_t exit_reason)
{
    atomic_store(&a->in_guest[vcpu], false);
    return dirtylog_vcpu_exit(a->memory.log, vcpu, exit_reason);
}
