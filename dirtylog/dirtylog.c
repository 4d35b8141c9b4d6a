/* SPDX-License-Identifier: Apache-2.0 */
#include "dirtylog/dirtylog_driver.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/ioctl.h>

static const struct dirtylog_driver *const drivers[] = {
    [DIRTYLOG_BITMAP] = &dirtylog_bitmap_driver,
    [DIRTYLOG_RING] = &dirtylog_ring_driver,
    [DIRTYLOG_PLAIN] = &dirtylog_plain_driver,
    [DIRTYLOG_TRACE] = &dirtylog_trace_driver,
};

static const char *const kind_names[] = {
#define X(id, number, name) [number] = name,
    DIRTYLOG_KINDS(X)
#undef X
};

enum { N_KINDS = sizeof(kind_names) / sizeof(*kind_names) };

const char *dirtylog_kind_name(enum dirtylog_kind kind)
{
    return (unsigned)kind < N_KINDS ? kind_names[kind] : "unknown";
}

bool dirtylog_kind_parse(const char *name, enum dirtylog_kind *ret_kind)
{
    for (unsigned i = 0; i < N_KINDS; i++) {
        if (!strcmp(kind_names[i], name)) {
            *ret_kind = (enum dirtylog_kind)i;
            return true;
        }
    }
    return false;
}

/* ---- Choosing ---- */

static int enable(int vm_fd, uint32_t capability, uint64_t arg)
{
    struct kvm_enable_cap cap = {.cap = capability, .args = {arg}};
    return ioctl(vm_fd, KVM_ENABLE_CAP, &cap);
}

static int prepare_bitmap(int vm_fd, struct vm_error **err)
{
    static const uint64_t wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    int offered = ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    if (offered < 0 || ((uint64_t)offered & wanted) != wanted)
        return error_set(err, VM_ERROR_REFUSED,
                         "this host's KVM has no manual protection of dirty pages");
    if (enable(vm_fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted) < 0)
        return error_errno(err, errno, "cannot switch manual protection of dirty pages on");
    return 0;
}

static int prepare_ring(int vm_fd, unsigned entries, struct vm_error **err)
{
    uint64_t bytes = (uint64_t)entries * sizeof(struct kvm_dirty_gfn);
    uint32_t capability = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
    int offered = ioctl(vm_fd, KVM_CHECK_EXTENSION, capability);
    if (offered <= 0) {
        capability = KVM_CAP_DIRTY_LOG_RING;
        offered = ioctl(vm_fd, KVM_CHECK_EXTENSION, capability);
    }
    if (offered <= 0)
        return error_set(err, VM_ERROR_REFUSED, "this host's KVM has no dirty ring");
    if (entries < DIRTYLOG_RING_ENTRIES_MIN || entries & (entries - 1) || bytes > (uint64_t)offered)
        return error_set(err, VM_ERROR_USAGE,
                         "a dirty ring of %u entries: a power of two from %u to %zu is possible",
                         entries, DIRTYLOG_RING_ENTRIES_MIN,
                         (size_t)offered / sizeof(struct kvm_dirty_gfn));
    if (enable(vm_fd, capability, bytes) == 0)
        return 0;
    if (errno == EINVAL)
        return error_set(err, VM_ERROR_REFUSED,
                         "the dirty ring must be chosen before the first vCPU is made");
    return error_errno(err, errno, "cannot switch the dirty ring on");
}

int dirtylog_prepare(int vm_fd, enum dirtylog_kind *kind, unsigned ring_entries,
                     struct vm_error **err)
{
    struct vm_error *lacking = NULL;
    switch (*kind) {
    case DIRTYLOG_AUTO:
        *kind = prepare_bitmap(vm_fd, &lacking) == 0 ? DIRTYLOG_BITMAP : DIRTYLOG_PLAIN;
        error_free(lacking);
        return 0;
    case DIRTYLOG_BITMAP:
        return prepare_bitmap(vm_fd, err);
    case DIRTYLOG_RING:
        return prepare_ring(vm_fd, ring_entries ? ring_entries : DIRTYLOG_RING_ENTRIES_DEFAULT, err);
    case DIRTYLOG_PLAIN:
    case DIRTYLOG_TRACE:
        return 0;
    }
    return error_set(err, VM_ERROR_USAGE, "no dirty log has the number %d", (int)*kind);
}

/* ---- Life ---- */

struct dirtylog *dirtylog_create(const struct dirtylog_params *params, struct vm_error **err)
{
    if (params->kind <= DIRTYLOG_AUTO || (unsigned)params->kind >= N_KINDS ||
        params->n_vcpus > DIRTYLOG_VCPUS_MAX) {
        error_set(err, VM_ERROR_USAGE, "a dirty log of kind %d for %u vCPUs", (int)params->kind,
                  params->n_vcpus);
        return NULL;
    }
    struct dirtylog *log = calloc(1, sizeof(*log));
    int *fds = calloc(params->n_vcpus + 1, sizeof(*fds));
    if (!log || !fds) {
        free(log);
        free(fds);
        error_nomem(err);
        return NULL;
    }
    if (params->n_vcpus)
        memcpy(fds, params->vcpu_fds, params->n_vcpus * sizeof(*fds));
    log->driver = drivers[params->kind];
    log->params = *params;
    log->params.vcpu_fds = fds;
    log->params.trace_path = NULL;
    if (!log->params.ring_entries)
        log->params.ring_entries = DIRTYLOG_RING_ENTRIES_DEFAULT;
    if (log->driver->create && log->driver->create(log, params, err) < 0) {
        dirtylog_destroy(log);
        return NULL;
    }
    return log;
}

void dirtylog_destroy(struct dirtylog *log)
{
    if (!log)
        return;
    dirtylog_stop(log);
    if (log->driver->destroy)
        log->driver->destroy(log);
    if (log->record)
        fclose(log->record);
    free((int *)(uintptr_t)log->params.vcpu_fds);
    free(log);
}

/* ---- Start and stop ---- */

int dirtylog_ioctl_failed(const struct dirtylog *log, unsigned slot, const char *what,
                          struct vm_error **err)
{
    int why = errno;
    uint32_t id = log->slots[slot].id;
    if (why == ENOENT || why == EINVAL)
        return error_set(err, VM_ERROR_CONFLICT,
                         "%s: memory slot %u is not what it was when tracking began", what, id);
    return error_errno(err, why, "%s of memory slot %u", what, id);
}

static int set_logging(const struct dirtylog *log, unsigned slot, bool on, struct vm_error **err)
{
    const struct dirtylog_slot *s = &log->slots[slot];
    struct kvm_userspace_memory_region region = {
        .slot = s->id,
        .flags = s->flags | (on ? KVM_MEM_LOG_DIRTY_PAGES : 0),
        .guest_phys_addr = s->guest_address,
        .memory_size = s->size,
        .userspace_addr = (uintptr_t)s->host,
    };
    if (ioctl(log->params.vm_fd, KVM_SET_USER_MEMORY_REGION, &region) == 0)
        return 0;
    return dirtylog_ioctl_failed(log, slot, "cannot switch logging", err);
}

static int start_logging(struct dirtylog *log, struct vm_error **err)
{
    if (!log->driver->uses_kvm)
        return 0;
    for (unsigned i = 0; i < log->n_slots; i++) {
        if (set_logging(log, i, true, err) == 0)
            continue;
        while (i-- > 0)
            set_logging(log, i, false, NULL);
        return -1;
    }
    return 0;
}

static void forget_slots(struct dirtylog *log)
{
    free(steal_ptr(&log->scratch));
    log->n_slots = 0;
}

static int take_slots(struct dirtylog *log, const struct dirtylog_slot *slots, unsigned n,
                      struct vm_error **err)
{
    size_t words = 1;
    if (!n || n > DIRTYLOG_SLOTS_MAX)
        return error_set(err, VM_ERROR_USAGE, "%u memory slots; 1 to %d can be tracked", n,
                         DIRTYLOG_SLOTS_MAX);
    for (unsigned i = 0; i < n; i++)
        if (dirtylog_words(slots[i].size) > words)
            words = dirtylog_words(slots[i].size);
    log->scratch = calloc(words, sizeof(*log->scratch));
    if (!log->scratch)
        return error_nomem(err);
    memcpy(log->slots, slots, n * sizeof(*slots));
    log->n_slots = n;
    return 0;
}

static void record_slots(struct dirtylog *log)
{
    if (!log->record)
        return;
    fprintf(log->record, "vmmig-trace 1\nslots");
    for (unsigned i = 0; i < log->n_slots; i++)
        fprintf(log->record, " %llu", (unsigned long long)(log->slots[i].size / DIRTYLOG_PAGE));
    fprintf(log->record, "\n");
}

int dirtylog_start(struct dirtylog *log, const struct dirtylog_slot *slots, unsigned n,
                   struct vm_error **err)
{
    if (log->started)
        return error_set(err, VM_ERROR_CONFLICT, "dirty pages are being tracked already");
    if (take_slots(log, slots, n, err) < 0)
        return -1;
    if (log->driver->start && log->driver->start(log, err) < 0) {
        forget_slots(log);
        return -1;
    }
    if (start_logging(log, err) < 0) {
        if (log->driver->stop)
            log->driver->stop(log);
        forget_slots(log);
        return -1;
    }
    record_slots(log);
    log->started = true;
    return 0;
}

bool dirtylog_is_started(const struct dirtylog *log)
{
    return log->started;
}

void dirtylog_stop(struct dirtylog *log)
{
    if (!log->started)
        return;
    for (unsigned i = 0; log->driver->uses_kvm && i < log->n_slots; i++)
        set_logging(log, i, false, NULL);
    log->started = false;
    if (log->driver->stop)
        log->driver->stop(log);
    forget_slots(log);
    if (log->record)
        fclose(steal_ptr(&log->record));
}

/* ---- Harvest and clear ---- */

static int check_started(const struct dirtylog *log, unsigned slot, struct vm_error **err)
{
    if (!log->started)
        return error_set(err, VM_ERROR_USAGE, "dirty pages are not being tracked");
    if (slot >= log->n_slots)
        return error_set(err, VM_ERROR_USAGE, "there is no memory slot %u", slot);
    return 0;
}

/* Runs of set bits, as lines. */
static void record_runs(struct dirtylog *log, unsigned slot, const uint64_t *bitmap)
{
    uint64_t pages = log->slots[slot].size / DIRTYLOG_PAGE, first = 0;
    bool in_run = false;
    for (uint64_t page = 0; page <= pages; page++) {
        bool set = page < pages && bitmap[page / 64] >> (page % 64) & 1;
        if (set && !in_run)
            first = page;
        if (!set && in_run)
            fprintf(log->record, "%u %llu %llu\n", slot, (unsigned long long)first,
                    (unsigned long long)(page - first));
        in_run = set;
    }
}

int dirtylog_begin_harvest(struct dirtylog *log, struct vm_error **err)
{
    if (check_started(log, 0, err) < 0)
        return -1;
    log->harvests++;
    if (log->record)
        fprintf(log->record, "round\n");
    return log->driver->begin_harvest ? log->driver->begin_harvest(log, err) : 0;
}

int dirtylog_harvest(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err)
{
    if (check_started(log, slot, err) < 0)
        return -1;
    size_t words = dirtylog_words(log->slots[slot].size);
    memset(log->scratch, 0, words * sizeof(*log->scratch));
    if (log->driver->harvest(log, slot, log->scratch, err) < 0)
        return -1;
    for (size_t i = 0; i < words; i++) {
        log->pages += (uint64_t)__builtin_popcountll(log->scratch[i]);
        bitmap[i] |= log->scratch[i];
    }
    if (log->record)
        record_runs(log, slot, log->scratch);
    return 0;
}

int dirtylog_clear(struct dirtylog *log, unsigned slot, uint64_t first, uint64_t n,
                   const uint64_t *bitmap, struct vm_error **err)
{
    if (check_started(log, slot, err) < 0)
        return -1;
    uint64_t pages = log->slots[slot].size / DIRTYLOG_PAGE;
    if (first % DIRTYLOG_CLEAR_ALIGN || first >= pages || !n || n > pages - first ||
        (n % DIRTYLOG_CLEAR_ALIGN && first + n != pages))
        return error_set(err, VM_ERROR_USAGE, "pages %llu+%llu of memory slot %u cannot be cleared",
                         (unsigned long long)first, (unsigned long long)n, log->slots[slot].id);
    return log->driver->clear ? log->driver->clear(log, slot, first, n, bitmap, err) : 0;
}

bool dirtylog_vcpu_exit(struct dirtylog *log, unsigned vcpu, uint32_t exit_reason)
{
    return log->driver->vcpu_exit && log->driver->vcpu_exit(log, vcpu, exit_reason);
}

int dirtylog_record(struct dirtylog *log, const char *path, struct vm_error **err)
{
    FILE *file = fopen(path, "we");
    if (!file)
        return error_errno(err, errno, "cannot record to %s", path);
    if (log->record)
        fclose(log->record);
    log->record = file;
    return 0;
}

void dirtylog_get_stats(struct dirtylog *log, struct dirtylog_stats *ret_stats)
{
    *ret_stats = (struct dirtylog_stats){.ring_full = atomic_load(&log->ring_full),
                                         .pages = log->pages,
                                         .harvests = log->harvests};
}
