/* SPDX-License-Identifier: Apache-2.0 */
/* Events of an attempt are not lost, and an attempt begins once. */
#include "agent/attempt.h"
#include "base/cond.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static unsigned count(const struct attempt *a, enum handover_event event)
{
    unsigned n = 0;
    for (unsigned i = 0; i < a->n_events; i++)
        n += a->events[(a->first_event + i) % ATTEMPT_EVENTS_MAX] == event;
    return n;
}

/* However many messages a peer sends, and however often something happens here. */
static void local_events_find_room(void **state)
{
    struct attempt a = {.first_event = ATTEMPT_EVENTS_MAX - 1};
    (void)state;
    pthread_mutex_init(&a.lock, NULL);
    cond_init(&a.changed);
    for (int i = 0; i < 2 * ATTEMPT_EVENTS_MAX; i++)
        attempt_post(&a, HANDOVER_EV_TIMER);
    for (int i = 0; i < 2 * ATTEMPT_EVENTS_MAX; i++)
        attempt_post(&a, HANDOVER_EV_MSG_LOADED);
    for (int event = HANDOVER_MSG_COUNT; event < HANDOVER_EV_COUNT; event++)
        attempt_post(&a, event);
    for (int event = HANDOVER_MSG_COUNT; event < HANDOVER_EV_COUNT; event++)
        assert_int_equal(count(&a, event), 1);
    assert_in_range(count(&a, HANDOVER_EV_MSG_LOADED), 1, ATTEMPT_MESSAGES_MAX);
    pthread_cond_destroy(&a.changed);
    pthread_mutex_destroy(&a.lock);
}

/* ---- With a table and a journal ---- */

struct place {
    char folder[32];
    struct transfer t;
};

static int set_up(void **state)
{
    struct place *p = calloc(1, sizeof(*p));
    snprintf(p->folder, sizeof(p->folder), "/tmp/vmmig-attempt-XXXXXX");
    if (!mkdtemp(p->folder))
        return -1;
    pthread_mutex_init(&p->t.lock, NULL);
    cond_init(&p->t.changed);
    p->t.journal = journal_open(p->folder, NULL);
    *state = p;
    return p->t.journal ? 0 : -1;
}

static int tear_down(void **state)
{
    struct place *p = *state;
    journal_close(p->t.journal);
    char command[64];
    snprintf(command, sizeof(command), "rm -r %s", p->folder);
    int failed = system(command);
    pthread_cond_destroy(&p->t.changed);
    pthread_mutex_destroy(&p->t.lock);
    free(p);
    return failed;
}

static struct attempt *make(struct transfer *t, const struct uuid *id)
{
    struct attempt *a = attempt_create(t, &attempt_destination_role, id, "web1", NULL);
    assert_non_null(a);
    return a;
}

static void expect_refusal(struct transfer *t, const struct uuid *id, const char *why)
{
    CLEANUP(attempt) struct attempt *again = make(t, id);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(attempt_start_new(again, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_non_null(strstr(error_message(err), why));
}

/* Also if PREPARE comes twice, over two connections, before either is in the journal. */
static void an_attempt_begins_once(void **state)
{
    struct transfer *t = &((struct place *)*state)->t;
    struct uuid id = uuid_new();
    CLEANUP(attempt) struct attempt *first = make(t, &id);
    assert_int_equal(attempt_start_new(first, NULL), 0);
    expect_refusal(t, &id, "has begun already");
    /* Its thread ends as soon as it has looked: an attempt without a record has nothing to do. */
    pthread_mutex_lock(&t->lock);
    while (t->attempts)
        pthread_cond_wait(&t->changed, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

static void an_attempt_of_the_journal_does_not_begin_again(void **state)
{
    struct transfer *t = &((struct place *)*state)->t;
    struct journal_record record = {
        .attempt = uuid_new(), .record = HANDOVER_REC_NEVER, .vm = "web1", .peer = "host2"};
    assert_int_equal(journal_put(t->journal, &record, NULL), 0);
    expect_refusal(t, &record.attempt, "is in the journal already");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(local_events_find_room),
        cmocka_unit_test_setup_teardown(an_attempt_begins_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(an_attempt_of_the_journal_does_not_begin_again, set_up,
                                        tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
