/* SPDX-License-Identifier: Apache-2.0 */
/* The attach driver and the library it talks to, with a guest that really runs, on each way of tracking. */
#include "base/clock.h"
#include "base/cond.h"
#include "tests/unit/dirtylog/toy_vmm.h"
#include "vmm/attach.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

enum { CHANNELS = 3, ROUNDS = 4 };

static enum dirtylog_kind kind; /* of the group that runs */

/* ---- An engine that copies at once, in the driver's own thread ---- */

struct engine {
    struct toy_vmm *source, *sink;
    struct attach *from, *to;
    struct guest_region regions[2];
    unsigned pause_after; /* rounds; 0: it stands already */
    uint64_t pages, zero_pages, state_bytes;
    bool memory_done, state_came_early, saw_dirty_rate;
    uint64_t dropped_page; /* a run of the dirty log that gets lost on the way; 0: none */
    /* Called after a page was copied. */
    void (*copied)(struct engine *e, uint64_t page);
    unsigned round;
    int64_t rtt_ns; /* of the link that there would be */
    bool unsettled; /* pages came, and nobody asked whether they have arrived */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
    struct vm_error *error;
};

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    struct engine *e = arg;
    e->unsettled = true;
    for (unsigned i = 0; i < batch->n; i++) {
        const struct page_ref *p = &batch->pages[i];
        unsigned region = page_addr_region(p->addr);
        uint64_t page = page_addr_number(p->addr);
        assert_int_equal(page_stripe_channel(p->addr, CHANNELS), batch->channel);
        e->pages++;
        e->zero_pages += !p->data;
        if (p->data && !(region == 1 && e->dropped_page && page == e->dropped_page && e->round > 1))
            memcpy(e->regions[region].base + page * GUEST_PAGE_SIZE, p->data, GUEST_PAGE_SIZE);
        if (e->copied && region == 1)
            e->copied(e, page);
    }
    page_batch_unref(batch);
    return 0;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct engine *e = arg;
    e->state_came_early |= !e->memory_done;
    e->state_bytes += n;
    return guest_sink_bytes(attach_guest(e->to), data, n, INT64_MAX, -1, err);
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    struct engine *e = arg;
    e->memory_done = true;
    return 0;
}

static void on_done(void *arg, struct vm_error *err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    e->done = true;
    e->error = err;
    pthread_cond_broadcast(&e->changed);
}

/* A round in which nothing was written would prove nothing. */
static void wait_for_writes(struct toy_vmm *v)
{
    uint64_t device = atomic_load(&v->device_writes); /* one of them may still be under way */
    if (!atomic_load(&v->running))
        return;
    toy_vmm_wait_progress(v);
    while (v->params.device && atomic_load(&v->device_writes) < device + 2)
        sched_yield();
}

static int on_settle(void *arg, int64_t *ret_rtt_ns, struct vm_error **err)
{
    ((struct engine *)arg)->unsettled = false;
    *ret_rtt_ns = ((struct engine *)arg)->rtt_ns;
    return 0;
}

static void on_round(void *arg, unsigned round)
{
    struct engine *e = arg;
    struct guest_source_progress p;
    e->round = round;
    assert_false(e->unsettled); /* what was given before is where it belongs when the log is read again */
    if (guest_source_progress(attach_guest(e->from), &p, NULL) == 0)
        e->saw_dirty_rate |= p.dirty_rate > 0; /* the last round may have found nothing */
    wait_for_writes(e->source);
    if (e->pause_after && round > e->pause_after)
        assert_int_equal(guest_pause(attach_guest(e->from), NULL), 0);
}

static const struct guest_source_events events = {.pages = on_pages,
                                                  .settle = on_settle,
                                                  .bytes = on_bytes,
                                                  .memory_done = on_memory_done,
                                                  .done = on_done,
                                                  .round = on_round};

static void engine_begin(struct engine *e, const struct toy_params *params)
{
    struct vm_error *err = NULL;
    memset(e, 0, sizeof(*e));
    pthread_mutex_init(&e->lock, NULL);
    cond_init(&e->changed);
    e->source = toy_vmm_create(params);
    e->sink = toy_vmm_create_incoming(e->source);
    e->from = attach_connect(e->source->path, 1000, &err);
    assert_string_equal(error_message(err), "no error");
    cleanup_qemu_definition struct qemu_definition d = {0};
    attach_define(e->from, &d, &err);
    assert_string_equal(error_message(err), "no error");
    assert_true(attach_is_definition(&d));
    e->to = attach_sink_connect(&d, e->sink->path, 1000, &err);
    assert_string_equal(error_message(err), "no error");
    const struct guest_region *regions;
    unsigned n;
    assert_int_equal(guest_sink_regions(attach_guest(e->to), &regions, &n), 0);
    assert_int_equal(n, 2);
    memcpy(e->regions, regions, sizeof(e->regions));
    e->pause_after = ROUNDS;
}

static void engine_end(struct engine *e)
{
    error_free(e->error);
    attach_destroy(e->from);
    attach_destroy(e->to);
    toy_vmm_destroy(e->source);
    toy_vmm_destroy(e->sink);
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
}

static int engine_start(struct engine *e, struct vm_error **err)
{
    struct guest_source_params params = {.channels = CHANNELS, .regions = e->regions, .n_regions = 2};
    return guest_source_start(attach_guest(e->from), &params, &events, e, err);
}

static void engine_wait(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    while (!e->done)
        assert_true(cond_wait_until(&e->changed, &e->lock, clock_mono_ns() + 60 * NSEC_PER_SEC));
    pthread_mutex_unlock(&e->lock);
    assert_int_equal(guest_source_stop(attach_guest(e->from), NULL), 0);
}

static void engine_copy(struct engine *e)
{
    struct vm_error *err = NULL;
    engine_start(e, &err);
    assert_string_equal(error_message(err), "no error");
    engine_wait(e);
    assert_string_equal(error_message(e->error), "no error");
}

static bool memory_is_equal(const struct engine *e)
{
    for (unsigned i = 0; i < 2; i++)
        for (uint64_t at = 0; at < e->source->sizes[i]; at += GUEST_PAGE_SIZE)
            if (memcmp(e->source->memory[i] + at, e->sink->memory[i] + at, GUEST_PAGE_SIZE)) {
                print_message("slot %u, page %llu differs\n", i, (unsigned long long)(at / GUEST_PAGE_SIZE));
                return false;
            }
    return true;
}

/* ---- Migrations ---- */

static void a_busy_guest_arrives_whole(void **state)
{
    for (int i = 0; i < 3; i++) {
        struct engine e;
        struct vm_error *err = NULL;
        struct guest_status status;
        engine_begin(&e, &(struct toy_params){.kind = kind,
                                              .vcpus = 2,
                                              .device = true,
                                              .ring_entries = i ? 0 : DIRTYLOG_RING_ENTRIES_MIN,
                                              .write_on_save = true});
        toy_vmm_run(e.source);
        toy_vmm_wait_progress(e.source);
        engine_copy(&e);
        assert_true(memory_is_equal(&e));
        assert_false(e.state_came_early);
        assert_int_equal(e.state_bytes, TOY_STATE);
        assert_true(e.zero_pages > 0); /* holes stay holes */
        assert_int_equal(guest_sink_finish(attach_guest(e.to), INT64_MAX, -1, &err), 0);
        assert_int_equal(e.sink->n_loaded, TOY_STATE);
        assert_memory_equal(e.sink->loaded, toy_vmm_state(), TOY_STATE);
        assert_int_equal(guest_status(attach_guest(e.to), &status, &err), 0);
        assert_int_equal(status.state, GUEST_PAUSED);
        assert_int_equal(guest_resume(attach_guest(e.to), &err), 0);
        assert_true(atomic_load(&e.sink->running));
        assert_false(atomic_load(&e.source->running));
        engine_end(&e);
    }
}

/* The comparison above would notice. */
static void one_dropped_run_is_noticed(void **state)
{
    struct engine e;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    e.dropped_page = 100;
    toy_vmm_run(e.source);
    engine_copy(&e);
    assert_false(memory_is_equal(&e));
    engine_end(&e);
}

static void a_paused_guest_is_copied_and_stays_paused(void **state)
{
    struct engine e;
    engine_begin(&e, &(struct toy_params){.kind = kind, .write_on_save = true});
    engine_copy(&e);
    assert_true(memory_is_equal(&e));
    assert_false(atomic_load(&e.source->running));
    /* Its own VMM cannot set it going meanwhile, as far as the library can tell. */
    struct guest_status status;
    vmmig_set_state(e.source->attach, VMMIG_RUNNING, NULL);
    assert_int_equal(guest_status(attach_guest(e.from), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    engine_end(&e);
}

/* ---- A slot of more than 4 GiB ---- */

#define LARGE_PAGES ((6ull << 30) / GUEST_PAGE_SIZE)
#define LARGE_LAST (LARGE_PAGES - 1)
#define LARGE_ALIAS (LARGE_LAST - (1ull << 20)) /* 4 GiB before: what is left of LARGE_LAST in 32 bits */

static void write_at_its_end(struct engine *e, uint64_t page)
{
    if (page == LARGE_LAST && e->round < 3)
        tiny_vm_write(e->source->vm, 0, LARGE_LAST, 1);
}

static uint64_t pages_behind(int memfd)
{
    struct stat st;
    assert_return_code(fstat(memfd, &st), errno);
    return (uint64_t)st.st_blocks * 512 / GUEST_PAGE_SIZE;
}

/* Sparse: what the guest has not written is a hole here and there. */
static void memory_beyond_4_gib_arrives(void **state)
{
    static const uint64_t written[] = {LARGE_ALIAS, LARGE_LAST, TOY_QUIET_PAGE};
    struct engine e;
    engine_begin(&e, &(struct toy_params){.kind = kind, .pages = LARGE_PAGES});
    vmmig_set_state(e.source->attach, VMMIG_RUNNING, NULL);
    tiny_vm_write(e.source->vm, 0, LARGE_ALIAS, 1);
    tiny_vm_write(e.source->vm, 0, LARGE_LAST, 1);
    e.copied = write_at_its_end;
    e.pause_after = 3;
    engine_copy(&e);
    assert_true(e.pages >= LARGE_PAGES);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t here = 0, there = 0;
        off_t at = (off_t)(written[i] * GUEST_PAGE_SIZE);
        assert_int_equal(pread(e.source->memfds[1], &here, 8, at), 8);
        assert_int_equal(pread(e.sink->memfds[1], &there, 8, at), 8);
        assert_int_equal(here, there);
        assert_true(written[i] == LARGE_LAST ? here >= 2 : here == 1);
    }
    /* A page each, or what the kernel takes for one. */
    assert_true(pages_behind(e.source->memfds[1]) <= 3 * 512);
    assert_true(pages_behind(e.sink->memfds[1]) <= 3 * 512);
    engine_end(&e);
}

/* ---- The rules ---- */

/* A write after the copy must be logged: it is if the page was cleared before it was copied. */
static void write_behind_the_copy(struct engine *e, uint64_t page)
{
    if (page == 7 && e->round < 3)
        tiny_vm_write(e->source->vm, 0, page, 1);
}

static void pages_are_cleared_before_they_are_copied(void **state)
{
    struct engine e;
    engine_begin(&e, &(struct toy_params){.kind = kind});
    vmmig_set_state(e.source->attach, VMMIG_RUNNING, NULL);
    e.copied = write_behind_the_copy;
    engine_copy(&e);
    assert_true(tiny_vm_count(e.source->vm, 7) >= 2);
    assert_true(memory_is_equal(&e));
    engine_end(&e);
}

/* Between two clearings of the log the guest may fill what was a hole: it has to be looked at anew. */
static void what_was_a_hole_is_looked_at_again(void **state)
{
    enum { PAGES = 64, FILLED = 10, DATA = 50 };
    static const uint8_t content[GUEST_PAGE_SIZE] = {1};
    struct attach_region r = {.fd = memfd_create("holes", MFD_CLOEXEC), .pages = PAGES};
    struct attach_holes holes;
    r.region.size = (uint64_t)PAGES * GUEST_PAGE_SIZE;
    r.region.page_size = GUEST_PAGE_SIZE;
    assert_int_equal(ftruncate(r.fd, (off_t)r.region.size), 0);
    assert_int_equal(pwrite(r.fd, content, sizeof(content), (off_t)DATA * GUEST_PAGE_SIZE), sizeof(content));
    assert_int_equal(attach_holes_init(&holes, &r, NULL), 0);
    assert_false(attach_holes_has(&holes, 0));
    assert_int_equal(pwrite(r.fd, content, sizeof(content), (off_t)FILLED * GUEST_PAGE_SIZE), sizeof(content));
    attach_holes_renew(&holes, FILLED);
    assert_true(attach_holes_has(&holes, FILLED));
    assert_false(attach_holes_has(&holes, FILLED + 1));
    assert_true(attach_holes_has(&holes, DATA));
    /* Within data nothing is forgotten; behind it everything. */
    attach_holes_renew(&holes, DATA);
    assert_false(attach_holes_has(&holes, DATA + 1));
    assert_int_equal(pwrite(r.fd, content, sizeof(content), (off_t)(DATA + 1) * GUEST_PAGE_SIZE), sizeof(content));
    attach_holes_renew(&holes, DATA + 1);
    assert_true(attach_holes_has(&holes, DATA + 1));
    attach_holes_finish(&holes);
    close(r.fd);
}

/* Of huge pages the kernel does not say where the holes are: a piece is read, which fills none. (It
 * is a usual file here.) */
static void holes_of_huge_pages_are_found_by_reading(void **state)
{
    enum { HUGE = 512, PAGES = 4 * HUGE, DATA = HUGE + 77, FILLED = 2 * HUGE + 5 };
    static const uint8_t content[GUEST_PAGE_SIZE] = {[GUEST_PAGE_SIZE - 1] = 1};
    struct attach_region r = {.fd = memfd_create("holes", MFD_CLOEXEC), .pages = PAGES};
    struct attach_holes holes;
    r.region.size = (uint64_t)PAGES * GUEST_PAGE_SIZE;
    r.region.page_size = (uint64_t)HUGE * GUEST_PAGE_SIZE;
    assert_int_equal(ftruncate(r.fd, (off_t)r.region.size), 0);
    assert_int_equal(pwrite(r.fd, content, sizeof(content), (off_t)DATA * GUEST_PAGE_SIZE), sizeof(content));
    uint64_t there = pages_behind(r.fd);
    assert_int_equal(attach_holes_init(&holes, &r, NULL), 0);
    for (uint64_t page = 0; page < PAGES; page++)
        assert_int_equal(attach_holes_has(&holes, page), page / HUGE == DATA / HUGE);
    assert_false(attach_holes_has(&holes, FILLED));
    assert_int_equal(pages_behind(r.fd), there);
    assert_int_equal(pwrite(r.fd, content, sizeof(content), (off_t)FILLED * GUEST_PAGE_SIZE), sizeof(content));
    attach_holes_renew(&holes, FILLED);
    assert_true(attach_holes_has(&holes, FILLED));
    attach_holes_finish(&holes);
    close(r.fd);
}

static void the_first_round_is_everything(void **state)
{
    struct engine e;
    engine_begin(&e, &(struct toy_params){.kind = kind});
    uint64_t all = (e.source->sizes[0] + e.source->sizes[1]) / GUEST_PAGE_SIZE;
    engine_copy(&e);
    assert_true(e.pages >= all);
    assert_int_equal(tiny_vm_count(e.source->vm, TOY_QUIET_PAGE), 1);
    assert_int_equal(*(uint64_t *)(void *)(e.sink->memory[1] + TOY_QUIET_PAGE * GUEST_PAGE_SIZE), 1);
    engine_end(&e);
}

static bool arrives_whole(const struct toy_params *params)
{
    struct engine e;
    engine_begin(&e, params);
    toy_vmm_run(e.source);
    engine_copy(&e);
    bool equal = memory_is_equal(&e);
    engine_end(&e);
    return equal;
}

static void a_pass_after_saving_finds_what_saving_wrote(void **state)
{
    assert_true(arrives_whole(&(struct toy_params){.kind = kind, .write_on_save = true}));
    assert_false(arrives_whole(&(struct toy_params){
        .kind = kind, .write_on_save = true, .forget_mark_on_save = true}));
}

static void what_a_device_writes_arrives_if_it_is_marked(void **state)
{
    assert_true(arrives_whole(&(struct toy_params){.kind = kind, .device = true}));
    assert_false(
        arrives_whole(&(struct toy_params){.kind = kind, .device = true, .forget_marks = true}));
}

/* ---- Progress and throttling ---- */

static void progress_tells_what_was_tracked(void **state)
{
    struct engine e;
    struct guest_source_progress p;
    struct vm_error *err = NULL;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    toy_vmm_run(e.source);
    toy_vmm_wait_progress(e.source);
    engine_start(&e, &err);
    pthread_mutex_lock(&e.lock);
    while (!e.done)
        cond_wait_until(&e.changed, &e.lock, INT64_MAX);
    pthread_mutex_unlock(&e.lock);
    assert_int_equal(guest_source_progress(attach_guest(e.from), &p, &err), 0);
    assert_true(p.round > ROUNDS);
    assert_int_equal(p.total, e.source->sizes[0] + e.source->sizes[1]);
    assert_int_equal(p.remaining, 0);
    assert_int_equal(p.state_bytes, TOY_STATE); /* what the pause is predicted with */
    assert_true(e.saw_dirty_rate);
    assert_true(p.zero_pages > 0);
    assert_true(p.paused_at_ns > 0);
    assert_true(p.working_set > 1024 * GUEST_PAGE_SIZE && p.working_set < p.total);
    engine_wait(&e);
    engine_end(&e);
}

/* A copy so slow that the guest outruns it: throttled in steps, and let go when the guest is paused. */
static void slow_link(struct engine *e, uint64_t page)
{
    if (page % 16 == 0)
        usleep(1000);
}

static void a_guest_that_outruns_the_copy_is_throttled(void **state)
{
    struct engine e;
    struct guest_source_progress p;
    struct vm_error *err = NULL;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    e.copied = slow_link;
    e.pause_after = 7;
    toy_vmm_run(e.source);
    engine_start(&e, &err);
    pthread_mutex_lock(&e.lock);
    while (!e.done)
        cond_wait_until(&e.changed, &e.lock, INT64_MAX);
    pthread_mutex_unlock(&e.lock);
    assert_int_equal(guest_source_progress(attach_guest(e.from), &p, &err), 0);
    assert_true(p.throttle_percent >= 20);
    engine_wait(&e);
    assert_string_equal(error_message(e.error), "no error");
    assert_true(memory_is_equal(&e));
    engine_end(&e);
}

/* ---- Ends of all kinds ---- */

static void cancelled_copies_leave_nothing(void **state)
{
    struct engine e;
    struct vm_error *err = NULL;
    struct guest_status status;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    e.pause_after = 1000000;
    toy_vmm_run(e.source);
    for (int i = 0; i < 3; i++) {
        e.done = false;
        assert_int_equal(engine_start(&e, &err), 0);
        assert_int_equal(engine_start(&e, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CONFLICT);
        error_clear(&err);
        toy_vmm_wait_progress(e.source);
        assert_int_equal(guest_source_stop(attach_guest(e.from), &err), 0);
        assert_int_equal(e.error->kind, VM_ERROR_CANCELLED);
        error_clear(&e.error);
        assert_int_equal(guest_status(attach_guest(e.from), &status, &err), 0);
        assert_int_equal(status.state, GUEST_RUNNING);
        assert_false(status.migrating);
    }
    toy_vmm_wait_progress(e.source);
    engine_end(&e);
}

/* An agent whose tracking ended with a change of the slots has no say in another's. */
static void tracking_is_its_agents_own(void **state)
{
    struct toy_vmm *v = toy_vmm_create(&(struct toy_params){.kind = kind});
    struct vm_error *err = NULL;
    struct vmmig_error error;
    struct guest_status status;
    Vmmig__Attach__Clear clear = VMMIG__ATTACH__CLEAR__INIT;
    Vmmig__Attach__Throttle throttle = VMMIG__ATTACH__THROTTLE__INIT;
    const struct {
        unsigned type, answer;
        const ProtobufCMessage *message;
    } asked[] = {{VMMIG__ATTACH__TYPE__HARVEST, VMMIG__ATTACH__TYPE__HARVESTED, NULL},
                 {VMMIG__ATTACH__TYPE__CLEAR, VMMIG__ATTACH__TYPE__OK, &clear.base},
                 {VMMIG__ATTACH__TYPE__THROTTLE, VMMIG__ATTACH__TYPE__OK, &throttle.base}};
    clear.pages = 64;
    throttle.percent = 50;
    struct attach *first = attach_connect(v->path, 1000, &err), *second = attach_connect(v->path, 1000, &err);
    assert_int_equal(attach_order(&first->client, VMMIG__ATTACH__TYPE__TRACK, NULL, &err), 0);
    assert_int_equal(vmmig_set_slots(v->attach, v->slots, 2, &error), 0);
    assert_int_equal(attach_order(&second->client, VMMIG__ATTACH__TYPE__TRACK, NULL, &err), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(
            attach_request(&first->client, asked[i].type, asked[i].message, -1, asked[i].answer, NULL, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CONFLICT);
        assert_string_equal(error_message(err), "the VMM changed the guest's memory slots while they were copied");
        error_clear(&err);
    }
    assert_int_equal(attach_order(&first->client, VMMIG__ATTACH__TYPE__UNTRACK, NULL, &err), 0);
    attach_destroy(first);
    assert_int_equal(guest_status(attach_guest(second), &status, &err), 0);
    assert_true(status.migrating);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(
            attach_request(&second->client, asked[i].type, asked[i].message, -1, asked[i].answer, NULL, &err), 0);
    attach_destroy(second);
    toy_vmm_destroy(v);
}

static void break_down(struct engine *e, uint64_t page)
{
    if (e->round >= 2) /* whichever page is dirty then */
        vmmig_set_state(e->source->attach, VMMIG_BROKEN, "triple fault");
}

static void a_guest_that_breaks_ends_the_copy(void **state)
{
    struct engine e;
    struct guest_status status;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    e.copied = break_down;
    e.pause_after = 1000000;
    toy_vmm_run(e.source);
    assert_int_equal(engine_start(&e, NULL), 0);
    engine_wait(&e);
    assert_int_equal(e.error->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(e.error), "the guest is broken (triple fault)");
    assert_int_equal(guest_status(attach_guest(e.from), &status, NULL), 0);
    assert_false(status.migrating);
    engine_end(&e);
}

static void a_complete_copy_can_be_taken_back(void **state)
{
    struct engine e;
    struct guest_status status;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    toy_vmm_run(e.source);
    engine_copy(&e);
    assert_int_equal(guest_resume(attach_guest(e.from), NULL), 0);
    toy_vmm_wait_progress(e.source);
    assert_int_equal(guest_status(attach_guest(e.from), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    assert_false(status.migrating);
    /* And goes again, to the same place: the sink takes it as it did the first time. */
    e.done = false;
    engine_copy(&e);
    assert_true(memory_is_equal(&e));
    engine_end(&e);
}

static void an_agent_that_dies_leaves_a_guest_that_runs_untracked(void **state)
{
    struct engine e;
    struct vm_error *err = NULL;
    struct guest_status status;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    toy_vmm_run(e.source);
    pid_t agent = fork();
    if (agent == 0) {
        struct attach *a = attach_connect(e.source->path, 1000, NULL);
        struct guest_source_params params = {
            .channels = CHANNELS, .regions = e.regions, .n_regions = 2};
        e.pause_after = 1000000;
        e.from = a;
        if (!a || guest_source_start(attach_guest(a), &params, &events, &e, NULL) < 0)
            _exit(1);
        for (;;)
            pause();
    }
    do {
        assert_int_equal(guest_status(attach_guest(e.from), &status, &err), 0);
    } while (!status.migrating);
    kill(agent, SIGKILL);
    waitpid(agent, NULL, 0);
    do {
        assert_int_equal(guest_status(attach_guest(e.from), &status, &err), 0);
    } while (status.migrating);
    assert_int_equal(status.state, GUEST_RUNNING);
    toy_vmm_wait_progress(e.source);
    engine_copy(&e); /* the next agent may */
    assert_true(memory_is_equal(&e));
    engine_end(&e);
}

static void changed_slots_end_the_copy_and_nothing_else(void **state)
{
    struct engine e;
    struct vm_error *err = NULL;
    struct vmmig_error error;
    engine_begin(&e, &(struct toy_params){.kind = kind, .vcpus = 2});
    e.pause_after = 1000000;
    toy_vmm_run(e.source);
    assert_int_equal(engine_start(&e, &err), 0);
    toy_vmm_wait_progress(e.source);
    assert_int_equal(vmmig_set_slots(e.source->attach, e.source->slots, 2, &error), 0);
    engine_wait(&e);
    assert_int_equal(e.error->kind, VM_ERROR_CONFLICT);
    assert_string_equal(error_message(e.error),
                        "the VMM changed the guest's memory slots while they were copied");
    error_clear(&e.error);
    toy_vmm_wait_progress(e.source);
    e.done = false;
    e.pause_after = 2;
    engine_copy(&e);
    assert_true(memory_is_equal(&e));
    engine_end(&e);
}

/* Has KVM nothing at the address of the data slot? Another slot is put there, and taken away, if it can be. */
static bool kvm_has_room(const struct toy_vmm *v)
{
    struct kvm_userspace_memory_region r = {.slot = 7,
                                            .guest_phys_addr = TINY_VM_DATA_ADDRESS,
                                            .memory_size = GUEST_PAGE_SIZE,
                                            .userspace_addr = (uintptr_t)v->memory[TINY_VM_DATA_SLOT]};
    if (ioctl(tiny_vm_fd(v->vm), KVM_SET_USER_MEMORY_REGION, &r) < 0)
        return false;
    r.memory_size = 0;
    assert_return_code(ioctl(tiny_vm_fd(v->vm), KVM_SET_USER_MEMORY_REGION, &r), 0);
    return true;
}

static void set_kvm_data_slot(const struct toy_vmm *v, bool there)
{
    struct kvm_userspace_memory_region r = {.slot = TINY_VM_DATA_SLOT,
                                            .guest_phys_addr = TINY_VM_DATA_ADDRESS,
                                            .memory_size = there ? v->sizes[TINY_VM_DATA_SLOT] : 0,
                                            .userspace_addr = (uintptr_t)v->memory[TINY_VM_DATA_SLOT]};
    assert_return_code(ioctl(tiny_vm_fd(v->vm), KVM_SET_USER_MEMORY_REGION, &r), 0);
}

/*
 * Memory that is unplugged in the midst of a copy, and plugged again: told to the library before it goes, it is gone
 * when the copy has ended; told after, it would have been made anew.
 */
static void memory_that_goes_is_told_before_it_goes(void **state)
{
    for (int in_order = 1; in_order >= 0; in_order--) {
        struct engine e;
        struct vm_error *err = NULL;
        struct vmmig_error error;
        engine_begin(&e, &(struct toy_params){.kind = kind});
        struct toy_vmm *v = e.source;
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        e.pause_after = 1000000;
        assert_int_equal(engine_start(&e, &err), 0);
        if (in_order)
            assert_int_equal(vmmig_set_slots(v->attach, v->slots, 1, &error), 0);
        set_kvm_data_slot(v, false);
        if (!in_order)
            assert_int_equal(vmmig_set_slots(v->attach, v->slots, 1, &error), 0);
        engine_wait(&e);
        assert_non_null(e.error);
        error_clear(&e.error);
        assert_int_equal(kvm_has_room(v), in_order);
        set_kvm_data_slot(v, true);
        assert_int_equal(vmmig_set_slots(v->attach, v->slots, 2, &error), 0);
        e.done = false;
        e.pause_after = 2;
        engine_copy(&e);
        assert_true(memory_is_equal(&e));
        engine_end(&e);
    }
}

static int run_group(enum dirtylog_kind which)
{
    char name[32];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_busy_guest_arrives_whole),
        cmocka_unit_test(one_dropped_run_is_noticed),
        cmocka_unit_test(a_paused_guest_is_copied_and_stays_paused),
        cmocka_unit_test(memory_beyond_4_gib_arrives),
        cmocka_unit_test(pages_are_cleared_before_they_are_copied),
        cmocka_unit_test(what_was_a_hole_is_looked_at_again),
        cmocka_unit_test(holes_of_huge_pages_are_found_by_reading),
        cmocka_unit_test(the_first_round_is_everything),
        cmocka_unit_test(a_pass_after_saving_finds_what_saving_wrote),
        cmocka_unit_test(what_a_device_writes_arrives_if_it_is_marked),
        cmocka_unit_test(progress_tells_what_was_tracked),
        cmocka_unit_test(a_guest_that_outruns_the_copy_is_throttled),
        cmocka_unit_test(tracking_is_its_agents_own),
        cmocka_unit_test(cancelled_copies_leave_nothing),
        cmocka_unit_test(a_guest_that_breaks_ends_the_copy),
        cmocka_unit_test(a_complete_copy_can_be_taken_back),
        cmocka_unit_test(an_agent_that_dies_leaves_a_guest_that_runs_untracked),
        cmocka_unit_test(changed_slots_end_the_copy_and_nothing_else),
        cmocka_unit_test(memory_that_goes_is_told_before_it_goes),
    };
    kind = which;
    snprintf(name, sizeof(name), "attach %s", dirtylog_kind_name(which));
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}

int main(void)
{
    if (!tiny_vm_available())
        return 77;
    return run_group(DIRTYLOG_BITMAP) + run_group(DIRTYLOG_RING) + run_group(DIRTYLOG_PLAIN);
}
