/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/jobs.h"

#include "base/clock.h"
#include "base/io.h"
#include "repo/service.h"

#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <cmocka.h>

#define LONG_NS (20 * NSEC_PER_SEC)

/* A job that the test steps through. */
struct script {
    int started;  /* latch: run was entered */
    int release;  /* latch: run may end */
    int updated;  /* latch: progress was reported */
    bool close_cancel;
    bool ignore_cancel;
    int close_result;
    bool fail;
    bool freed;
};

static void script_init(struct script *s)
{
    *s = (struct script){io_latch_new(NULL), io_latch_new(NULL), io_latch_new(NULL)};
}

static void script_finish(struct script *s)
{
    close_fd(&s->started);
    close_fd(&s->release);
    close_fd(&s->updated);
}

static void script_free(void *arg)
{
    ((struct script *)arg)->freed = true;
}

static void await(int latch)
{
    assert_int_equal(io_wait(latch, POLLIN, clock_mono_ns() + LONG_NS, -1, NULL), 0);
}

static int script_run(struct job *job, void *arg, struct vm_error **err)
{
    struct script *s = arg;
    struct job_progress p = {.phase = JOB_PHASE_COPYING, .round = 3, .remaining = 4096};
    job_update(job, &p);
    io_latch_set(s->updated);
    if (s->close_cancel)
        s->close_result = job_close_cancel(job, "too late", NULL);
    io_latch_set(s->started);
    if (io_wait(s->release, POLLIN, clock_mono_ns() + LONG_NS,
                s->ignore_cancel ? -1 : job_cancel_fd(job), err) < 0)
        return -1;
    return s->fail ? error_set(err, VM_ERROR_REFUSED, "no such luck") : 0;
}

static int start(struct job_table *t, const char *vm, struct script *s, struct uuid *ret_id,
                 struct vm_error **err)
{
    struct job_params p = {.kind = JOB_SEND, .vm = vm, .peer = "host2:1", .run = script_run,
                           .arg = s, .free_arg = script_free};
    return job_start(t, &p, ret_id, err);
}

static void wait_ended(struct job_table *t, const struct uuid *id)
{
    assert_int_equal(job_wait(t, id, clock_mono_ns() + LONG_NS, -1, NULL), 0);
}

static void a_job_runs_and_is_remembered(void **state)
{
    (void)state;
    struct script s;
    struct uuid id;
    struct job_status st;
    script_init(&s);
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    await(s.updated);
    await(s.started);
    assert_int_equal(job_get(t, &id, &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_RUNNING);
    assert_string_equal(st.vm, "web1");
    assert_string_equal(st.peer, "host2:1");
    assert_int_equal(st.progress.round, 3);
    assert_false(s.freed);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(job_wait(t, &id, clock_mono_ns(), -1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    io_latch_set(s.release);
    wait_ended(t, &id);
    assert_true(s.freed);
    assert_int_equal(job_get_of_vm(t, "web1", &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_DONE);
    assert_null(st.error);
    assert_true(st.elapsed_ns > 0);
    script_finish(&s);
}

static void one_job_per_vm(void **state)
{
    (void)state;
    struct script s, other;
    struct uuid id, other_id;
    script_init(&s);
    script_init(&other);
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    cleanup_error struct vm_error *err = NULL, *claimed = NULL;
    assert_int_equal(start(t, "web1", &other, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_string_equal(error_message(err),
                        "web1: send is under way; wait for it, or say `vmmig cancel web1`");
    assert_false(other.freed); /* still the caller's */
    assert_int_equal(job_claim(t, "web1", "detach", &claimed), -1);
    assert_int_equal(claimed->kind, VM_ERROR_CONFLICT);
    assert_int_equal(start(t, "web2", &other, &other_id, NULL), 0);
    io_latch_set(s.release);
    io_latch_set(other.release);
    wait_ended(t, &id);
    wait_ended(t, &other_id);
    /* Ended: the VM is free again. */
    script_finish(&s);
    script_init(&s);
    io_latch_set(s.release);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    wait_ended(t, &id);
    script_finish(&s);
    script_finish(&other);
}

static void a_claim_keeps_jobs_off(void **state)
{
    (void)state;
    struct script s;
    script_init(&s);
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(job_claim(t, "web1", "detach", NULL), 0);
    assert_int_equal(start(t, "web1", &s, NULL, &err), -1);
    assert_string_equal(error_message(err), "web1: detach is under way");
    assert_int_equal(job_claim(t, "web1", "run", NULL), -1);
    job_release(t, "web1");
    struct uuid id;
    io_latch_set(s.release);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    wait_ended(t, &id);
    script_finish(&s);
}

static void cancelling_ends_a_job(void **state)
{
    (void)state;
    struct script s;
    struct uuid id, cancelled;
    script_init(&s);
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(job_cancel(t, "web1", NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    await(s.started);
    assert_int_equal(job_cancel(t, "web1", &cancelled, NULL), 0);
    assert_true(uuid_equal(&id, &cancelled));
    wait_ended(t, &id);
    cleanup_job_status struct job_status st;
    assert_int_equal(job_get(t, &id, &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_CANCELLED);
    assert_int_equal(st.error->kind, VM_ERROR_CANCELLED);
    assert_false(st.cancelling);
    script_finish(&s);
}

static void past_the_point_of_no_return_cancel_is_refused(void **state)
{
    (void)state;
    struct script s;
    struct uuid id;
    script_init(&s);
    s.close_cancel = true;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    await(s.started);
    assert_int_equal(s.close_result, 0);
    assert_int_equal(job_cancel(t, "web1", NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(err), "web1: too late");
    io_latch_set(s.release);
    wait_ended(t, &id);
    cleanup_job_status struct job_status st;
    assert_int_equal(job_get(t, &id, &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_DONE);
    script_finish(&s);
}

/* Waits for the cancel, then tries to pass the point of no return. */
static int late_run(struct job *job, void *arg, struct vm_error **err)
{
    int *result = arg;
    io_wait(job_cancel_fd(job), POLLIN, clock_mono_ns() + LONG_NS, -1, NULL);
    *result = job_close_cancel(job, "too late", err);
    return *result;
}

static void a_cancel_that_came_first_wins(void **state)
{
    (void)state;
    int result = 0;
    struct uuid id;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    struct job_params p = {.kind = JOB_SEND, .vm = "web1", .run = late_run, .arg = &result};
    assert_int_equal(job_start(t, &p, &id, NULL), 0);
    assert_int_equal(job_cancel(t, "web1", NULL, NULL), 0);
    wait_ended(t, &id);
    assert_int_equal(result, -1);
    cleanup_job_status struct job_status st;
    assert_int_equal(job_get(t, &id, &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_CANCELLED);
}

static void a_failure_keeps_its_kind_and_words(void **state)
{
    (void)state;
    struct script s;
    struct uuid id;
    script_init(&s);
    s.fail = true;
    io_latch_set(s.release);
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    wait_ended(t, &id);
    cleanup_job_status struct job_status st;
    assert_int_equal(job_get_of_vm(t, "web1", &st, NULL), 0);
    assert_int_equal(st.state, JOB_STATE_FAILED);
    assert_int_equal(st.error->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(st.error), "no such luck");
    script_finish(&s);
}

static void jobs_are_bounded(void **state)
{
    (void)state;
    struct script s;
    struct uuid id;
    script_init(&s);
    CLEANUP(job_table) struct job_table *t = job_table_create(1, NULL);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    assert_int_equal(start(t, "web2", &s, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    io_latch_set(s.release);
    wait_ended(t, &id);
    script_finish(&s);
}

static int nothing(struct job *job, void *arg, struct vm_error **err)
{
    (void)job;
    (void)arg;
    (void)err;
    return 0;
}

static void count(const struct job_status *st, void *arg)
{
    (void)st;
    ++*(unsigned *)arg;
}

static void the_history_is_bounded_and_forgets_the_oldest(void **state)
{
    (void)state;
    struct uuid first, id;
    CLEANUP(job_table) struct job_table *t = job_table_create(1, NULL);
    struct job_params p = {.kind = JOB_SEND, .vm = "web1", .run = nothing};
    for (unsigned i = 0; i < JOB_HISTORY_MAX + 2; i++) {
        assert_int_equal(job_start(t, &p, &id, NULL), 0);
        wait_ended(t, &id);
        if (i == 0)
            first = id;
    }
    unsigned n = 0;
    job_each(t, count, &n);
    assert_int_equal(n, JOB_HISTORY_MAX + 1); /* the one that just ended is pruned with the next */
    struct job_status st;
    assert_int_equal(job_get(t, &first, &st, NULL), -1);
    assert_int_equal(job_get(t, &id, &st, NULL), 0);
}

static void stopping_ends_jobs_also_those_that_closed_their_latch(void **state)
{
    (void)state;
    struct script s;
    script_init(&s);
    s.close_cancel = true;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    struct uuid id;
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    await(s.started);
    assert_true(job_table_stop(t, 20000));
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(start(t, "web2", &s, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_UNREACHABLE);
    script_finish(&s);
}

static void stopping_says_when_a_job_does_not_end(void **state)
{
    (void)state;
    struct script s;
    struct uuid id;
    script_init(&s);
    s.ignore_cancel = true;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    assert_int_equal(start(t, "web1", &s, &id, NULL), 0);
    await(s.started);
    assert_false(job_table_stop(t, 1));
    io_latch_set(s.release);
    wait_ended(t, &id);
    script_finish(&s);
}

static void an_id_may_be_given(void **state)
{
    (void)state;
    struct uuid id = uuid_new(), got;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    struct job_params p = {.kind = JOB_RECEIVE, .vm = "web1", .run = nothing, .id = &id};
    assert_int_equal(job_start(t, &p, &got, NULL), 0);
    assert_true(uuid_equal(&id, &got));
    wait_ended(t, &id);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(job_start(t, &p, &got, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
}

/* Jobs of the repository have no VM, run side by side, are cancelled by id and keep a result. */
static int with_result(struct job *job, void *arg, struct vm_error **err)
{
    return job_set_result(job, arg, strlen(arg), err);
}

static void jobs_of_the_repository(void **state)
{
    (void)state;
    struct script a, b;
    struct uuid id_a, id_b, id_c;
    char found[] = "found";
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(job_table) struct job_table *t = job_table_create(4, NULL);
    script_init(&a);
    script_init(&b);
    assert_int_equal(start(t, NULL, &a, &id_a, NULL), 0);
    assert_int_equal(start(t, NULL, &b, &id_b, NULL), 0);
    assert_int_equal(job_cancel_id(t, &id_a, NULL), 0);
    wait_ended(t, &id_a);
    assert_int_equal(job_cancel_id(t, &id_a, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    io_latch_set(b.release);
    wait_ended(t, &id_b);
    struct job_params p = {.kind = JOB_SCRUB, .run = with_result, .arg = found};
    assert_int_equal(job_start(t, &p, &id_c, NULL), 0);
    wait_ended(t, &id_c);
    cleanup_job_status struct job_status status = {0};
    assert_int_equal(job_get(t, &id_c, &status, NULL), 0);
    assert_int_equal(status.state, JOB_STATE_DONE);
    assert_string_equal(status.vm, "");
    assert_int_equal(status.result_len, 5);
    assert_memory_equal(status.result, found, 5);
    script_finish(&a);
    script_finish(&b);
}

static void every_long_verb_is_a_kind_of_job(void **state)
{
    (void)state;
    unsigned n = 0;
    for (unsigned verb = 1; verb <= VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF; verb++) {
        bool found = false;
        for (unsigned kind = 0; kind < JOB_KIND_COUNT; kind++)
            found |= !strcmp(job_kind_name(kind), repo_service_verb_name(verb));
        assert_int_equal(found, repo_service_is_long(verb));
        n += found;
    }
    assert_int_equal(n, 6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_job_runs_and_is_remembered),
        cmocka_unit_test(one_job_per_vm),
        cmocka_unit_test(a_claim_keeps_jobs_off),
        cmocka_unit_test(cancelling_ends_a_job),
        cmocka_unit_test(past_the_point_of_no_return_cancel_is_refused),
        cmocka_unit_test(a_cancel_that_came_first_wins),
        cmocka_unit_test(a_failure_keeps_its_kind_and_words),
        cmocka_unit_test(jobs_are_bounded),
        cmocka_unit_test(the_history_is_bounded_and_forgets_the_oldest),
        cmocka_unit_test(stopping_ends_jobs_also_those_that_closed_their_latch),
        cmocka_unit_test(stopping_says_when_a_job_does_not_end),
        cmocka_unit_test(an_id_may_be_given),
        cmocka_unit_test(jobs_of_the_repository),
        cmocka_unit_test(every_long_verb_is_a_kind_of_job),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
