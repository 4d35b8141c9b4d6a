/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Collection beside writers, readers and other collectors. What the protocol must survive is
 * brought about by a hook that runs something between two operations of the collector, or by
 * threads that wait for each other's steps on the store.
 */
enum { SIZE = 6 * 1024 * 1024, CONTENT = 4 * SIZE };

#include "tests/unit/repo/repo_collected.h"
#include "repo/catalogue_shard.h"
#include "repo/collect.h"
#include "repo/names.h"
#include "repo/scrub.h"

#include "base/clock.h"
#include "base/cond.h"

#include <pthread.h>

static struct collect_report collect_fencing(int64_t fence_after_ns)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_options o = {.fence_after_ns = fence_after_ns, .control.cancel_fd = -1};
    struct collect_report report = {0};
    repo_collect(gc, &o, &report, &err);
    assert_ok(err);
    return report;
}

static struct collect_report collect(void)
{
    return collect_fencing(60 * NSEC_PER_SEC);
}

static uint64_t packs_stored(void)
{
    struct repo_stat stat;
    assert_int_equal(repo_stat(repo, &stat, NULL), 0);
    return stat.packs + stat.trees;
}

/* ---- what goes and what stays ---- */

static void what_nothing_names_goes(void **state)
{
    store_image("a", content);
    store_image("b", content + SIZE);
    assert_int_equal(collect().condemned, 0);
    delete_image("a");
    struct collect_report report = collect();
    assert_true(report.packs > 0 && report.trees > 0 && report.bytes > SIZE / 4);
    assert_image("b", content + SIZE);
    delete_image("b");
    collect();
    assert_int_equal(packs_stored(), 0);
}

static void what_another_image_shares_stays(void **state)
{
    store_image("a", content);
    store_image("b", content);
    delete_image("a");
    assert_int_equal(collect().packs, 0);
    assert_image("b", content);
}

static void what_a_failed_import_left_goes(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(watched, "update.cat=error@2", &err);
    assert_int_equal(put_all(gc, "a", NULL, content, SIZE, NULL, NULL), -1);
    store_fault_arm(watched, "", &err);
    assert_true(packs_stored() > 0);
    collect();
    assert_int_equal(packs_stored(), 0);
}

static void the_index_forgets_what_went(void **state)
{
    struct index_stat stat;
    store_image("a", content);
    assert_int_equal(index_stat(repo_index(repo), &stat, NULL), 0);
    assert_true(stat.keys >= 48);
    delete_image("a");
    collect();
    assert_int_equal(index_stat(repo_index(repo), &stat, NULL), 0);
    assert_int_equal(stat.keys, 0);
}

static void a_lease_holds_what_is_deleted(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    store_image("a", content);
    catalogue_lease(repo_store(repo), "a", "web1", &lease, &err);
    assert_ok(err);
    delete_image("a");
    assert_int_equal(collect().condemned, 0);
    assert_lease(&lease, content);
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    collect();
    assert_int_equal(packs_stored(), 0);
}

static int first_tree(const char *name, void *arg, struct vm_error **err)
{
    strcpy(arg, name);
    return error_set(err, VM_ERROR_FAILED, "enough");
}

static void a_recipe_that_cannot_be_read_stops_it(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char name[STORE_NAME_MAX + 1];
    struct collect_options o = {.control.cancel_fd = -1};
    struct collect_report report;
    store_image("a", content);
    store_list(repo_store(repo), STORE_BLOB, "tree.", first_tree, name, NULL);
    store_image("b", content + SIZE);
    delete_image("b");
    store_remove(repo_store(repo), STORE_BLOB, name, &err);
    assert_ok(err);
    uint64_t before = packs_stored();
    assert_int_equal(repo_collect(gc, &o, &report, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    assert_non_null(strstr(error_message(err), "image a"));
    assert_int_equal(packs_stored(), before);
}

/* ---- writers at work ---- */

static void a_writers_packs_are_not_collected(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(4 * SIZE);
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "a", NULL, &err);
    struct image_file *f = image_session_file(s, "disk0.raw", 4 * SIZE, &err);
    assert_ok(err);
    for (unsigned i = 0; i < 4 * SIZE / MIB; i++)
        put(s, f, i, content);
    while (!packs_stored())
        sched_yield();
    struct collect_report report = collect();
    assert_int_equal(report.condemned + report.packs + report.writers_fenced, 0);
    assert_int_equal(image_session_commit(s, NULL, &err), 0);
    assert_int_equal(get_all(repo, "a", got, 4 * SIZE, &err), 0);
    assert_memory_equal(got, content, 4 * SIZE);
}

struct collector {
    struct collect_report report;
    pthread_t thread;
};

static void *run_collector(void *arg)
{
    ((struct collector *)arg)->report = collect();
    return NULL;
}

/* Until a list is open and every shard has its epoch: the collector waits for writers then. */
static void wait_raised(void)
{
    struct condemned_state state;
    struct store *s = repo_store(repo);
    do {
        sched_yield();
        assert_int_equal(condemned_read_state(s, &state, NULL), 0);
    } while (!state.is_open);
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++) {
        char shard[SHARD_NAME_SIZE];
        for (uint64_t now = 0; now < 2; sched_yield()) {
            cleanup_buffer struct buffer epoch = {0};
            assert_int_equal(store_get(s, shard_name(i, shard), "epoch", &epoch, NULL), STORE_DONE);
            now = get_le64(epoch.data);
        }
    }
}

/* Writers do not look for an epoch while they write, but at their commit. */
static void write_without_looking(void)
{
    repo_tune(repo, &(struct repo_tuning){.checkpoint_ms = 600 * 1000});
}

/*
 * Pages of a deleted image, shared before they are condemned: the writer rescues them at its
 * commit.
 */
static void what_a_writer_shares_is_rescued(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    struct collector collector;
    struct import_report report;
    store_image("old", content);
    delete_image("old");
    write_without_looking();
    struct image_file *f = begin(&s, "new", NULL);
    for (unsigned i = 0; i < 6; i++)
        put(s, f, i, content);
    wait_pages(s, SIZE / PAGE_BYTES);
    pthread_create(&collector.thread, NULL, run_collector, &collector);
    wait_raised();
    image_session_commit(s, &report, &err);
    assert_ok(err);
    assert_true(report.written.pages_new < 50);
    pthread_join(collector.thread, NULL);
    assert_true(collector.report.condemned > 0);
    assert_int_equal(collector.report.packs, 0);
    assert_image("new", content);
}

/* As before, but the epoch is noticed while the writer has nothing to do, and it goes on. */
static void an_idle_writer_answers_in_time(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    struct collector collector;
    store_image("old", content);
    delete_image("old");
    struct image_file *f = begin(&s, "new", NULL);
    put(s, f, 0, content);
    wait_pages(s, MIB / PAGE_BYTES);
    pthread_create(&collector.thread, NULL, run_collector, &collector);
    pthread_join(collector.thread,
                 NULL); /* without fencing it, in less than the minute that takes */
    assert_int_equal(collector.report.writers_fenced, 0);
    for (unsigned i = 0; i < 6; i++)
        put(s, f, i, content);
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    assert_image("new", content);
}

static void a_fenced_writer_commits_nothing(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    store_image("old", content);
    delete_image("old");
    write_without_looking();
    struct image_file *f = begin(&s, "new", NULL);
    for (unsigned i = 0; i < 6; i++)
        put(s, f, i, content);
    wait_pages(s, SIZE / PAGE_BYTES);
    struct collect_report report = collect_fencing(1);
    assert_int_equal(report.writers_fenced, 1);
    assert_true(report.packs > 0);
    assert_int_equal(image_session_commit(s, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    error_clear(&err);
    assert_int_equal(get_all(repo, "new", content, SIZE, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

static void a_deleted_parent_stays_while_its_child_is_written(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    struct collector collector;
    store_image("monday", content);
    store_image("other", content + SIZE);
    struct image_file *f = begin(&s, "tuesday", "monday");
    delete_image("monday");
    delete_image("other");
    pthread_create(&collector.thread, NULL, run_collector, &collector);
    wait_raised();
    memcpy(content + 2 * MIB, content + 2 * SIZE, MIB);
    put(s, f, 2, content);
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    pthread_join(collector.thread, NULL);
    assert_true(collector.report.packs > 0);
    assert_image("tuesday", content);
    collect();
    assert_image("tuesday", content);
}

static void collect_with(const char *key, enum store_op_kind kind, void (*run)(void))
{
    struct between b = {key, kind, run, NULL, 1};
    store_fault_set_hook(watched, run_between, &b);
    collect();
    store_fault_set_hook(watched, NULL, NULL);
    assert_int_equal(b.nth, 0);
}

static void write_the_same_again(void)
{
    cleanup_error struct vm_error *err = NULL;
    struct import_report report;
    put_all(repo, "new", NULL, content, SIZE, &report, &err);
    assert_ok(err);
    assert_true(report.written.pages_new > report.written.pages_shared); /* nothing condemned */
}

static void a_writer_that_comes_later_shares_nothing_condemned(void **state)
{
    store_image("old", content);
    delete_image("old");
    /* Before the collector claims the first entry; it has waited for everybody by then. */
    collect_with("pack.", STORE_SIZE, write_the_same_again);
    assert_image("new", content);
}

static void commit_the_same_again(void)
{
    store_image("new", content);
}

static void what_is_committed_between_the_marks_stays(void **state)
{
    store_image("old", content);
    delete_image("old");
    /* After marking and before the list is published; the writer shares what is being condemned. */
    collect_with("condemned.", STORE_UPDATE, commit_the_same_again);
    assert_image("new", content);
    collect();
    assert_image("new", content);
}

static void a_pinned_parent_is_no_garbage(void **state)
{
    CLEANUP(image_session) struct image_session *s = NULL;
    store_image("monday", content);
    begin(&s, "tuesday", "monday");
    delete_image("monday");
    assert_int_equal(collect().condemned, 0);
}

static struct image_session *child;

/* A parent takes over what is being condemned; its child begins; the parent is deleted. */
static void parent_comes_and_goes(void)
{
    store_image("parent", content);
    struct image_file *f = begin(&child, "child", "parent");
    put(child, f, 0, content + SIZE); /* the rest it keeps */
    wait_pages(child, MIB / PAGE_BYTES);
    delete_image("parent");
}

static void child_commits(void)
{
    cleanup_error struct vm_error *err = NULL;
    image_session_commit(child, NULL, &err);
    assert_ok(err);
    image_session_end(child); /* and its pin is gone before pins are scanned */
}

static store_fault_between_fn *chain_of_hooks(const struct store_op *op, void *arg)
{
    struct between *steps = arg;
    store_fault_between_fn *first = run_between(op, &steps[0]);
    return first ? first : run_between(op, &steps[1]);
}

/* Only the child's writer can know then what it keeps of its parent. */
static void a_child_rescues_what_its_deleted_parent_held(void **state)
{
    struct between steps[] = {
        {"condemned.", STORE_UPDATE, parent_comes_and_goes, NULL, 1},
        {"cat.00", STORE_SCAN, child_commits, "p:", 4}, /* of the second mark: names were scanned */
    };
    store_image("old", content);
    delete_image("old");
    store_fault_set_hook(watched, chain_of_hooks, steps);
    collect();
    store_fault_set_hook(watched, NULL, NULL);
    assert_int_equal(steps[0].nth + steps[1].nth, 0);
    memcpy(content, content + SIZE, MIB);
    assert_image("child", content);
}

static int fence_it(const struct registered *r, void *arg, struct vm_error **err)
{
    bool fenced;
    return catalogue_fence(repo_store(repo), r, &fenced, err);
}

/* Also when no epoch has begun: the registration alone decides. */
static void without_its_registration_a_writer_commits_nothing(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    struct image_file *f = begin(&s, "a", NULL);
    put(s, f, 0, content);
    wait_pages(s, MIB / PAGE_BYTES); /* and looked at its registration */
    catalogue_registered(repo_store(repo), fence_it, NULL, &err);
    assert_ok(err);
    assert_int_equal(image_session_commit(s, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
}

/* ---- what the disks cannot read ---- */

static void what_cannot_be_read_is_removed_all_the_same(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct repo_stat stat;
    store_image("a", content);
    store_image("b", content + SIZE);
    delete_image("a");
    store_fault_arm(watched, "read.pack=error:EIO@*, size.pack=error:EIO@*", &err);
    assert_true(collect().packs > 0);
    store_fault_arm(watched, "", &err);
    assert_image("b", content + SIZE);
    delete_image("b");
    collect();
    assert_int_equal(repo_stat(repo, &stat, &err), 0);
    assert_int_equal(stat.packs + stat.trees, 0);
}

/* ---- the guards of a writer's updates ---- */

enum { MADE_UP = 0x7700000 }; /* packs that nobody stored, by the epoch that condemns them */

/* As a collector does, up to where it would wait for writers: closes the list that is open. */
static void open_next_list(void)
{
    struct store *s = repo_store(repo);
    cleanup_object_set struct object_set old = {{0}, {0}}, fresh = {{0}, {0}};
    struct condemned_state state;
    struct condemned_list list;
    uint64_t number;
    bool open;
    assert_int_equal(condemned_load_open(s, &state, &old, NULL), 0);
    if (state.is_open) {
        assert_int_equal(condemned_spare(s, &state.list, &old, NULL), 0);
        assert_int_equal(condemned_close(s, &state, NULL), 0);
        assert_int_equal(condemned_read_state(s, &state, NULL), 0);
        assert_false(state.is_open);
    }
    number_set_add(&fresh.packs, MADE_UP + state.epoch + 1, NULL);
    assert_int_equal(catalogue_next_number(s, &number, NULL), 0);
    assert_int_equal(condemned_make(s, number, &fresh, &list, NULL), 0);
    assert_int_equal(condemned_publish(s, &list, &fresh, &state, &open, NULL), 0);
    assert_true(open);
    assert_int_equal(catalogue_raise_epochs(s, state.epoch + 1, NULL), 0);
}

static void assert_knows_open_list(const struct registration *r)
{
    struct condemned_state state;
    assert_int_equal(condemned_read_state(repo_store(repo), &state, NULL), 0);
    assert_true(state.is_open);
    assert_true(number_set_has(&registration_condemned(r)->packs, MADE_UP + state.epoch));
}

static struct registration *begin_between(void (*run)(void), struct vm_error **err)
{
    struct between b = {"cat.", STORE_UPDATE, run, NULL, 1, 0};
    store_fault_set_hook(watched, run_between, &b);
    struct registration *r = catalogue_register(repo_store(gc), "new", NULL, err);
    store_fault_set_hook(watched, NULL, NULL);
    assert_int_equal(b.nth, 0);
    return r;
}

/* Between reading the epoch and the list, and registering. */
static void who_registers_knows_the_list_that_is_open(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(registration) struct registration *r = begin_between(open_next_list, &err);
    assert_ok(err);
    assert_knows_open_list(r);
}

static void who_registers_does_so_for_a_name_that_is_free(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    assert_null(begin_between(commit_the_same_again, &err));
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
}

static int check_between(struct registration *r, void (*run)(void), struct vm_error **err)
{
    const struct object_set nothing = {{0}, {0}};
    struct between b = {"cat.", STORE_UPDATE, run, NULL, 1, 0};
    bool changed;
    open_next_list();
    store_fault_set_hook(watched, run_between, &b);
    int result = registration_checkpoint(r, &nothing, &changed, err);
    store_fault_set_hook(watched, NULL, NULL);
    assert_int_equal(b.nth, 0);
    return result;
}

/* The acknowledgement happened, and its answer is lost: the import goes on, and is committed. */
static void an_acknowledgement_without_an_answer_counts(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    const struct object_set nothing = {{0}, {0}};
    CLEANUP(registration)
    struct registration *r = catalogue_register(repo_store(gc), "new", NULL, &err);
    cleanup_free struct image *image = calloc(1, sizeof(*image));
    bool changed;
    store_image("old", content);
    open_next_list();
    store_fault_arm(watched, "update.cat=unknown", NULL);
    registration_checkpoint(r, &nothing, &changed, &err);
    assert_ok(err);
    assert_true(changed);
    catalogue_find(repo_store(repo), "old", image, &err);
    strcpy(image->name, "new");
    catalogue_commit(r, image, &nothing, &err);
    assert_ok(err);
    assert_image("new", content);
}

static void a_deletion_without_an_answer_is_looked_at(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct image image;
    store_image("a", content);
    store_fault_arm(watched, "update.cat=error:ETIMEDOUT", NULL);
    assert_int_equal(catalogue_delete(repo_store(gc), "a", &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    assert_image("a", content);
    store_fault_arm(watched, "update.cat=unknown", NULL);
    catalogue_delete(repo_store(gc), "a", &err);
    assert_ok(err);
    assert_int_equal(catalogue_find(repo_store(repo), "a", &image, NULL), -1);
}

static void who_acknowledges_knows_the_list_that_is_open(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(registration)
    struct registration *r = catalogue_register(repo_store(gc), "new", NULL, &err);
    assert_int_equal(check_between(r, open_next_list, &err), 0);
    assert_knows_open_list(r);
}

static void fence_all(void)
{
    assert_int_equal(catalogue_registered(repo_store(repo), fence_it, NULL, NULL), 0);
}

static int count_registered(const struct registered *r, void *arg, struct vm_error **err)
{
    ++*(unsigned *)arg;
    return 0;
}

static void who_was_fenced_does_not_come_back(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    unsigned n = 0;
    CLEANUP(registration)
    struct registration *r = catalogue_register(repo_store(gc), "new", NULL, &err);
    assert_int_equal(check_between(r, fence_all, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_int_equal(catalogue_registered(repo_store(repo), count_registered, &n, NULL), 0);
    assert_int_equal(n, 0);
}

/* ---- collectors ---- */

static void give_up(void)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(watched, "remove.pack=error@*", &err);
    assert_ok(err);
}

static void a_list_that_was_left_open_is_gone_on_with(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_options o = {.control.cancel_fd = -1};
    struct collect_report report;
    store_image("a", content);
    store_image("b", content + SIZE);
    delete_image("a");
    give_up();
    assert_int_equal(repo_collect(gc, &o, &report, &err), -1);
    store_fault_arm(watched, "", NULL);
    store_image("c", content); /* may not share what is condemned */
    report = collect();
    assert_true(report.adopted && report.packs > 0);
    assert_image("b", content + SIZE);
    assert_image("c", content);
    assert_false(collect().adopted);
}

static void collect_too(void)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_options o = {.control.cancel_fd = -1};
    struct collect_report report;
    CLEANUP(repo) struct repo *other = repo_open(place, &err);
    repo_collect(other, &o, &report, &err);
    assert_ok(err);
}

static void sweep_now(void)
{
    assert_int_equal(condemned_sweep(repo_store(repo), NULL), 0);
}

static void what_is_swept_while_a_list_is_made_is_not_condemned(void **state)
{
    /* Before its entries are written, and before it is published. */
    for (int published = 0; published < 2; published++) {
        struct between b = {published ? "repository" : "condemned.", STORE_UPDATE, sweep_now, NULL,
                            published ? 2 : 1};
        store_image("a", content);
        store_image("b", content + SIZE);
        delete_image("a");
        size_t before = packs_stored();
        store_fault_set_hook(watched, run_between, &b);
        struct collect_report report = collect();
        store_fault_set_hook(watched, NULL, NULL);
        assert_int_equal(b.nth, 0);
        assert_int_equal(report.packs > 0, !published);
        assert_int_equal(packs_stored() < before, !published);
        assert_image("b", content + SIZE);
        assert_int_equal(collect().packs > 0, published);
        delete_image("b");
        collect();
        assert_int_equal(packs_stored(), 0);
    }
}

static void two_collectors_do_each_others_work(void **state)
{
    static const struct {
        const char *key;
        enum store_op_kind kind;
    } moments[] = {{"pack.", STORE_SIZE}, {"condemned.", STORE_SCAN}, {"condemned.", STORE_UPDATE},
                   {"cat.", STORE_UPDATE}, {"tree.", STORE_REMOVE}, {"repository", STORE_UPDATE}};
    for (size_t i = 0; i < sizeof(moments) / sizeof(*moments); i++) {
        store_image("a", content);
        store_image("b", content + SIZE);
        delete_image("a");
        collect_with(moments[i].key, moments[i].kind, collect_too);
        assert_image("b", content + SIZE);
        delete_image("b");
        collect();
        assert_int_equal(packs_stored(), 0);
    }
}

/* ---- everything at once ---- */

struct worker_state {
    unsigned number;
    unsigned failures;
    int64_t until_ns;
};

/* Writes, checks and deletes images that overlap with those of the others. */
static void *write_and_delete(void *arg)
{
    struct worker_state *w = arg;
    struct repo *r = repo_open(place, NULL);
    cleanup_free uint8_t *got = malloc(SIZE);
    uint64_t random = w->number + 1;
    while (clock_mono_ns() < w->until_ns) {
        char name[32];
        snprintf(name, sizeof(name), "writer%u", w->number);
        const uint8_t *from = content + test_random(&random) % 12 * (SIZE / 4);
        if (put_all(r, name, NULL, from, SIZE, NULL, NULL) < 0 ||
            get_all(r, name, got, SIZE, NULL) < 0 || memcmp(got, from, SIZE) != 0 ||
            catalogue_delete(repo_store(r), name, NULL) < 0)
            w->failures++;
    }
    repo_close(r);
    return NULL;
}

static void *collect_again_and_again(void *arg)
{
    struct worker_state *w = arg;
    struct repo *r = repo_open(place, NULL);
    while (clock_mono_ns() < w->until_ns) {
        struct collect_options o = {.control.cancel_fd = -1};
        struct collect_report report;
        struct vm_error *err = NULL;
        w->failures += repo_collect(r, &o, &report, &err) < 0;
        if (err)
            print_message("%s\n", error_message(err));
        error_free(err);
    }
    repo_close(r);
    return NULL;
}

static void no_finding(enum scrub_kind kind, const char *what, void *arg)
{
    fail_msg("scrub finds %s", what);
}

static void writers_and_collectors_at_once(void **state)
{
    enum { WRITERS = 3, COLLECTORS = 2 };
    struct worker_state workers[WRITERS + COLLECTORS];
    pthread_t threads[WRITERS + COLLECTORS];
    struct scrub_report report;
    int64_t until = clock_mono_ns() + 4 * NSEC_PER_SEC;
    store_image("kept", content + SIZE / 2);
    for (unsigned i = 0; i < WRITERS + COLLECTORS; i++) {
        workers[i] = (struct worker_state){.number = i, .until_ns = until};
        pthread_create(&threads[i], NULL, i < WRITERS ? write_and_delete : collect_again_and_again,
                       &workers[i]);
    }
    for (unsigned i = 0; i < WRITERS + COLLECTORS; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(workers[i].failures, 0);
    }
    assert_image("kept", content + SIZE / 2);
    assert_int_equal(repo_scrub(repo, NULL, no_finding, NULL, &report, NULL), 0);
    collect();
    delete_image("kept");
    collect();
    assert_int_equal(packs_stored(), 0);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_nothing_names_goes),
        TEST(what_another_image_shares_stays),
        TEST(what_a_failed_import_left_goes),
        TEST(the_index_forgets_what_went),
        TEST(a_lease_holds_what_is_deleted),
        TEST(a_recipe_that_cannot_be_read_stops_it),
        TEST(a_writers_packs_are_not_collected),
        TEST(what_a_writer_shares_is_rescued),
        TEST(an_idle_writer_answers_in_time),
        TEST(a_fenced_writer_commits_nothing),
        TEST(a_deleted_parent_stays_while_its_child_is_written),
        TEST(a_writer_that_comes_later_shares_nothing_condemned),
        TEST(what_is_committed_between_the_marks_stays),
        TEST(a_pinned_parent_is_no_garbage),
        TEST(a_child_rescues_what_its_deleted_parent_held),
        TEST(without_its_registration_a_writer_commits_nothing),
        TEST(what_cannot_be_read_is_removed_all_the_same),
        TEST(who_registers_knows_the_list_that_is_open),
        TEST(who_registers_does_so_for_a_name_that_is_free),
        TEST(who_acknowledges_knows_the_list_that_is_open),
        TEST(an_acknowledgement_without_an_answer_counts),
        TEST(a_deletion_without_an_answer_is_looked_at),
        TEST(who_was_fenced_does_not_come_back),
        TEST(a_list_that_was_left_open_is_gone_on_with),
        TEST(what_is_swept_while_a_list_is_made_is_not_condemned),
        TEST(two_collectors_do_each_others_work),
        TEST(writers_and_collectors_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
