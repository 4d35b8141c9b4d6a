/* SPDX-License-Identifier: Apache-2.0 */
/* The sink half of the attach driver. */
#include "base/io.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

struct attach_sink {
    struct attach_memory_map memory;
    int state_fd; /* what sink_bytes gathered */
    uint64_t state_size;
    bool finished;
};

void attach_sink_release(struct attach *a)
{
    attach_sink_destroy(steal_ptr(&a->sink));
}

void attach_sink_destroy(struct attach_sink *s)
{
    if (!s)
        return;
    attach_memory_unmap(&s->memory);
    close_fd(&s->state_fd);
    free(s);
}

static int get_sink(struct guest *g, struct attach_sink **ret, struct vm_error **err)
{
    *ret = attach_from_guest(g)->sink;
    return *ret ? 0 : error_set(err, VM_ERROR_USAGE, "this VM does not wait for a guest");
}

/* The same machine, waiting. */
int attach_check_waits(struct attach *a, const struct qemu_definition *d, struct vm_error **err)
{
    Vmmig__Attach__RunState state;
    const char *machine = attach_info(a)->machine;
    if (strcmp(machine, d->machine))
        return error_set(err, VM_ERROR_REFUSED,
                         "the VMM prepared for the guest is another machine: '%s', not '%s'", machine,
                         d->machine);
    if (attach_query_state(a, &state, NULL, err) < 0)
        return -1;
    if (state != VMMIG__ATTACH__RUN_STATE__RUN_INCOMING)
        return error_set(err, VM_ERROR_REFUSED,
                         "the VMM prepared for the guest does not wait for one");
    return 0;
}

int attach_check_slots(struct attach *a, const struct qemu_definition *d, uint64_t *ret_generation,
                       struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition has = {0};
    if (attach_define_memory(a, &has, ret_generation, err) < 0)
        return -1;
    if (has.n_ram != d->n_ram)
        return error_set(err, VM_ERROR_REFUSED, "the VMM prepared for the guest has %u memory slots, "
                         "the guest %u", has.n_ram, d->n_ram);
    for (unsigned i = 0; i < d->n_ram; i++)
        if (strcmp(has.ram[i].block, d->ram[i].block) || has.ram[i].size != d->ram[i].size ||
            has.ram[i].guest_address != d->ram[i].guest_address)
            return error_set(err, VM_ERROR_REFUSED,
                             "memory slot %s of the guest is not that of the VMM prepared for it",
                             d->ram[i].block);
    return 0;
}

/* Memory in which no page is yet. Who started the VMM says nothing: it may load firmware before it waits. */
static bool is_untouched(int fd)
{
    struct statfs kind;
    struct stat st;
    return fstatfs(fd, &kind) == 0 &&
           (kind.f_type == TMPFS_MAGIC || kind.f_type == HUGETLBFS_MAGIC) && fstat(fd, &st) == 0 &&
           !st.st_blocks;
}

static int begin(struct attach *a, struct vm_error **err)
{
    struct attach_sink *s = calloc(1, sizeof(*s));
    if (!s)
        return error_nomem(err);
    s->state_fd = memfd_create("vmmig-state", MFD_CLOEXEC);
    if (s->state_fd < 0)
        error_errno(err, errno, "cannot make a file for the guest's state");
    if (s->state_fd < 0 || attach_memory_map(&s->memory, &a->client, true, err) < 0) {
        attach_sink_destroy(s);
        return -1;
    }
    for (unsigned i = 0; i < s->memory.n; i++)
        s->memory.list[i].zero = is_untouched(s->memory.regions[i].fd);
    a->sink = s;
    return 0;
}

int attach_sink_make(struct attach *a, const struct qemu_definition *d, struct vm_error **err)
{
    uint64_t checked;
    if (attach_check_waits(a, d, err) < 0 || attach_check_slots(a, d, &checked, err) < 0 || begin(a, err) < 0)
        return -1;
    if (a->sink->memory.generation != checked)
        return error_set(err, VM_ERROR_CONFLICT, "the VMM prepared for the guest changes its memory slots");
    return 0;
}

struct attach *attach_sink_connect(const struct qemu_definition *definition, const char *path,
                                   int timeout_ms, struct vm_error **err)
{
    struct vm_error *failure = NULL;
    CLEANUP(attach) struct attach *a = attach_connect(path, timeout_ms, &failure);
    if (!a && failure->sys_errno == EPROTOTYPE) {
        error_free(failure);
        error_set(err, VM_ERROR_REFUSED,
                  "%s is a QEMU's socket: a guest of '%s' can be taken in by such a VMM only", path,
                  definition->machine);
        return NULL;
    }
    if (!a) {
        error_propagate(err, failure);
        return NULL;
    }
    return attach_sink_make(a, definition, err) < 0 ? NULL : steal_ptr(&a);
}

int attach_sink_regions(struct guest *g, const struct guest_region **ret_regions, unsigned *ret_n)
{
    struct attach_sink *s;
    if (get_sink(g, &s, NULL) < 0)
        return -1;
    *ret_regions = s->memory.list;
    *ret_n = s->memory.n;
    return 0;
}

/* The VMM's library gets the memory: what it gets is charged to the VMM. */
static int populate(struct attach *a, const Vmmig__Attach__Run *runs, unsigned n, struct vm_error **err)
{
    Vmmig__Attach__Populate m = VMMIG__ATTACH__POPULATE__INIT;
    m.memory = a->sink->memory.generation;
    Vmmig__Attach__Run *list[ATTACH_RUNS_MAX];
    for (unsigned i = 0; i < n; i++)
        list[i] = (Vmmig__Attach__Run *)(uintptr_t)&runs[i];
    m.runs = list;
    m.n_runs = n;
    return attach_order(&a->client, VMMIG__ATTACH__TYPE__POPULATE, &m.base, err);
}

int attach_sink_populate(struct guest *g, const uint64_t *addrs, unsigned n, struct vm_error **err)
{
    struct attach *a = attach_from_guest(g);
    struct attach_sink *s;
    Vmmig__Attach__Run runs[ATTACH_RUNS_MAX];
    unsigned n_runs = 0;
    if (get_sink(g, &s, err) < 0)
        return -1;
    if (!attach_info(a)->populates)
        return error_set(err, VM_ERROR_VERSION, "the VMM links an older libvmmig-attach");
    for (unsigned i = 0; i < n; i++) {
        Vmmig__Attach__Run *last = n_runs ? &runs[n_runs - 1] : NULL;
        if (last && last->slot == page_addr_region(addrs[i]) &&
            last->first + last->pages == page_addr_number(addrs[i])) {
            last->pages++;
            continue;
        }
        if (n_runs == ATTACH_RUNS_MAX && populate(a, runs, n_runs, err) < 0)
            return -1;
        n_runs %= ATTACH_RUNS_MAX;
        vmmig__attach__run__init(&runs[n_runs]);
        runs[n_runs].slot = page_addr_region(addrs[i]);
        runs[n_runs].first = page_addr_number(addrs[i]);
        runs[n_runs++].pages = 1;
    }
    return n_runs ? populate(a, runs, n_runs, err) : 0;
}

int attach_sink_bytes(struct guest *g, const void *data, size_t n, int64_t deadline_ns,
                      int cancel_fd, struct vm_error **err)
{
    struct attach_sink *s;
    if (get_sink(g, &s, err) < 0)
        return -1;
    if (s->finished)
        return error_set(err, VM_ERROR_USAGE, "the guest's state was complete already");
    if (n > ATTACH_STATE_BYTES_MAX - s->state_size)
        return error_set(err, VM_ERROR_PROTOCOL, "the guest's state is larger than %llu bytes",
                         ATTACH_STATE_BYTES_MAX);
    if (io_write_full(s->state_fd, data, n, deadline_ns, cancel_fd, err) < 0)
        return -1;
    s->state_size += n;
    return 0;
}

int attach_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    struct attach_sink *s;
    struct attach *a = attach_from_guest(g);
    Vmmig__Attach__Load m = VMMIG__ATTACH__LOAD__INIT;
    (void)deadline_ns; /* the library and the connection have shorter ones */
    (void)cancel_fd;
    if (get_sink(g, &s, err) < 0)
        return -1;
    m.size = s->state_size;
    m.memory = s->memory.generation;
    s->finished = true;
    return attach_request(&a->client, VMMIG__ATTACH__TYPE__LOAD, &m.base, s->state_fd,
                          VMMIG__ATTACH__TYPE__OK, NULL, err);
}
