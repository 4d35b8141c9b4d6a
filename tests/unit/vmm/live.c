/* SPDX-License-Identifier: Apache-2.0 */
#include "live.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/uuid.h"
#include "vmm/guest_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

char live_dir[64];
enum { RANDOM_BYTES = 8 << 20, WAIT_S = 30, STARTED_MAX = 64 };

/* Every QEMU that a test started, so that none is left when it fails. */
static struct process_identity started[STARTED_MAX];
static unsigned n_started;

struct qemu *live_note(struct qemu *q)
{
    if (q) {
        assert_true(n_started < STARTED_MAX);
        started[n_started++] = qemu_guest(q)->process;
    }
    return q;
}

int live_kill_all(void **state)
{
    while (n_started)
        process_kill(&started[--n_started], 5000, NULL);
    return 0;
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

static void write_random(void)
{
    cleanup_free uint64_t *data = malloc(RANDOM_BYTES);
    uint64_t x = 0x9e3779b97f4a7c15; /* xorshift: the same on every run */
    for (size_t i = 0; i < RANDOM_BYTES / sizeof(x); i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        data[i] = x;
    }
    cleanup_close int fd = open(live_path("random", ".bin"), O_CREAT | O_WRONLY, 0600);
    assert_ok(io_write_full(fd, data, RANDOM_BYTES, INT64_MAX, -1, why));
}

int live_setup(void **state)
{
    strcpy(live_dir, "/var/tmp/vmmig-live-XXXXXX");
    if (!mkdtemp(live_dir))
        return -1;
    if (access(LIVE_BINARY, X_OK) == 0)
        write_random();
    return 0;
}

int live_teardown(void **state)
{
    return nftw(live_dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

void assert_error(struct vm_error **err, enum vm_error_kind kind, const char *text)
{
    assert_non_null(*err);
    if ((*err)->kind != kind || !strstr(error_message(*err), text))
        fail_msg("expected %s with '%s', got %s: %s", error_kind_name(kind), text,
                 error_kind_name((*err)->kind), error_message(*err));
    error_clear(err);
}

const char *live_path(const char *name, const char *suffix)
{
    static char paths[64][160];
    static unsigned next;
    char *path = paths[next++ % 64];
    snprintf(path, sizeof(paths[0]), "%s/%s%s", live_dir, name, suffix);
    return path;
}

struct qemu *live_spawn(const char *name, struct vm_error **err, ...)
{
    static const char *const common[] = {"qemu-system-x86_64", "-accel", "tcg",   "-nodefaults",
                                         "-display",           "none",   "-name", "live"};
    char *argv[LIVE_ARGS_MAX];
    size_t n = 0;
    if (access(LIVE_BINARY, X_OK) < 0) {
        print_message("SKIPPED: there is no %s\n", LIVE_BINARY);
        skip();
    }
    for (; n < sizeof(common) / sizeof(*common); n++)
        argv[n] = (char *)(uintptr_t)common[n];
    va_list args;
    va_start(args, err);
    while ((argv[n] = va_arg(args, char *)))
        assert_true(++n < LIVE_ARGS_MAX);
    va_end(args);
    struct qemu_launch launch = {.binary = LIVE_BINARY,
                                 .argv = argv,
                                 .cwd = live_dir,
                                 .qmp_path = live_path(name, ".qmp"),
                                 .log_path = live_path(name, ".log")};
    return live_note(qemu_spawn(&launch, err));
}

void live_end(struct qemu *q)
{
    if (!q)
        return;
    assert_ok(guest_kill(qemu_guest(q), 5000, why));
    qemu_destroy(q);
}

json_t *live_qmp(struct qemu *q, const char *command, const char *arguments)
{
    json_t *reply = NULL;
    assert_ok(qmp_execute(qemu_qmp(q), command, *arguments ? json_loads(arguments, 0, NULL) : NULL,
                          QMP_TIMEOUT_MS, &reply, why));
    return reply;
}

/* The engine of a test: pages straight into place, bytes straight on. */

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    static const uint8_t zero[GUEST_PAGE_SIZE];
    struct live_move *m = arg;
    uint64_t addrs[PAGE_BATCH_MAX];
    pthread_mutex_lock(&m->lock);
    m->batches++;
    m->pages += batch->n;
    if (m->on_batch)
        m->on_batch(m);
    while (m->block)
        pthread_cond_wait(&m->changed, &m->lock);
    pthread_mutex_unlock(&m->lock);
    for (unsigned i = 0; i < batch->n; i++)
        addrs[i] = batch->pages[i].addr;
    int rc = m->populate ? qemu_sink_populate(m->to, addrs, batch->n, err) : 0;
    for (unsigned i = 0; rc == 0 && i < batch->n; i++) {
        const struct page_ref *p = &batch->pages[i];
        rc = guest_region_write(&m->regions[page_addr_region(p->addr)],
                                page_addr_number(p->addr) * GUEST_PAGE_SIZE,
                                p->data ? p->data : zero, GUEST_PAGE_SIZE, err);
    }
    page_batch_unref(batch);
    return rc;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct live_move *m = arg;
    m->bytes += n;
    return guest_sink_bytes(qemu_guest(m->to), data, n, clock_mono_ns() + WAIT_S * NSEC_PER_SEC, -1,
                            err);
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    struct live_move *m = arg;
    m->memory_done = true;
    return 0;
}

static void on_done(void *arg, struct vm_error *err)
{
    struct live_move *m = arg;
    SCOPE_LOCK(&m->lock);
    m->done = true;
    m->error = err;
    pthread_cond_broadcast(&m->changed);
}

static void on_round(void *arg, unsigned round)
{
    struct live_move *m = arg;
    SCOPE_LOCK(&m->lock);
    m->rounds = round;
    pthread_cond_broadcast(&m->changed);
}

int live_prepare(struct live_move *m, struct qemu *from, const char *name, struct vm_error **err)
{
    m->from = from;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->changed, NULL);
    struct qemu_host host = {.binary = LIVE_BINARY, .scratch_dir = live_dir, .user = m->user};
    if (qemu_preflight(from, m->dest_qmp != NULL, &m->definition, err) < 0 ||
        qemu_definition_validate(&m->definition, err) < 0 ||
        qemu_dest_check(&m->definition, &host, err) < 0)
        return -1;
    struct qemu_sink_params sink = {.vm = name,
                                    .definition = &m->definition,
                                    .launch = {.binary = LIVE_BINARY,
                                               .qmp_path = live_path(name, ".qmp"),
                                               .log_path = live_path(name, ".log"),
                                               .cgroup = m->cgroup,
                                               .user = m->user}};
    m->to = m->dest_qmp ? qemu_sink_attach(&m->definition, m->dest_qmp, 5000, err)
                        : live_note(qemu_sink_spawn(&sink, err));
    return m->to ? guest_sink_regions(qemu_guest(m->to), &m->regions, &m->n_regions) : -1;
}

int live_start_with(struct live_move *m, const struct guest_source_params *params,
                    struct vm_error **err)
{
    struct guest_source_events events = {.pages = on_pages,
                                         .bytes = on_bytes,
                                         .memory_done = on_memory_done,
                                         .done = on_done,
                                         .round = on_round};
    return guest_source_start(qemu_guest(m->from), params, &events, m, err);
}

int live_start(struct live_move *m, struct vm_error **err)
{
    struct guest_source_params params = {
        .channels = 2, .regions = m->regions, .n_regions = m->by_loader ? 0 : m->n_regions};
    return live_start_with(m, &params, err);
}

int live_wait(struct live_move *m, struct vm_error **err)
{
    struct timespec at = {time(NULL) + WAIT_S, 0};
    SCOPE_LOCK(&m->lock);
    while (!m->done)
        if (pthread_cond_timedwait(&m->changed, &m->lock, &at) == ETIMEDOUT && !m->done)
            return error_set(err, VM_ERROR_TIMEOUT, "the migration did not end");
    return m->error ? error_propagate(err, steal_ptr(&m->error)) : 0;
}

int live_move(struct live_move *m, struct qemu *from, const char *name, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + WAIT_S * NSEC_PER_SEC;
    if (live_prepare(m, from, name, err) < 0 || live_start(m, err) < 0 ||
        guest_pause(qemu_guest(from), err) < 0 || live_wait(m, err) < 0 ||
        guest_source_stop(qemu_guest(from), err) < 0)
        return -1;
    return guest_sink_finish(qemu_guest(m->to), deadline, -1, err);
}

void live_move_finish(struct live_move *m)
{
    if (m->from)
        guest_source_stop(qemu_guest(m->from), NULL);
    live_end(m->to);
    live_end(m->from);
    error_free(m->error);
    qemu_definition_finish(&m->definition);
    *m = (struct live_move){0};
}

static char *read_memory(struct qemu *q, const char *name, uint64_t from, uint64_t size)
{
    char arguments[300], *data;
    size_t n;
    const char *path = live_path(name, ".mem");
    snprintf(arguments, sizeof(arguments),
             "{\"val\": %" PRIu64 ", \"size\": %" PRIu64 ", \"filename\": \"%s\"}", from, size,
             path);
    json_decref(live_qmp(q, "pmemsave", arguments));
    assert_ok(io_read_file(path, size, &data, &n, why));
    assert_int_equal(n, size);
    unlink(path);
    return data;
}

void assert_same_memory(struct qemu *a, struct qemu *b, uint64_t from, uint64_t size)
{
    cleanup_free char *x = read_memory(a, "a", from, size);
    cleanup_free char *y = read_memory(b, "b", from, size);
    for (uint64_t i = 0; i < size; i += GUEST_PAGE_SIZE)
        if (memcmp(x + i, y + i, GUEST_PAGE_SIZE))
            fail_msg("the page at 0x%" PRIx64 " differs", from + i);
    uint64_t set = 0;
    for (uint64_t i = 0; i < size; i += GUEST_PAGE_SIZE)
        set += x[i] != 0;
    assert_true(set > 0);
}

void assert_run_state(struct qemu *q, enum guest_run_state state)
{
    struct guest_status status;
    assert_ok(guest_status(qemu_guest(q), &status, why));
    if (status.state != state)
        fail_msg("the guest is '%s'", status.detail);
}
