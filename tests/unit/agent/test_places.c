/* SPDX-License-Identifier: Apache-2.0 */
/* Strangers do not keep hosts out, nor does one host keep out the others. */
#include "agent/places.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

static void leave_all(struct places *p)
{
    while (p->list)
        places_leave(p, p->list);
    assert_int_equal(places_taken(p), 0);
}

/* Takes places until there is none; how many. */
static unsigned fill(struct places *p, const char *address, const char *host, const char *why)
{
    cleanup_error struct vm_error *err = NULL;
    struct place *place;
    unsigned n = 0;
    while ((place = places_enter(p, address, &err)) && (!host || places_know(p, place, host, &err) == 0))
        n++;
    places_leave(p, place);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(err), why);
    return n;
}

static void strangers_leave_hosts_their_places(void **state)
{
    (void)state;
    struct places p = {0};
    char address[32];
    assert_int_equal(fill(&p, "192.0.2.1", NULL, "too many connections of strangers at 192.0.2.1"),
                     PLACES_STRANGERS_AT_ADDRESS);
    struct place *host = places_enter(&p, "192.0.2.2", NULL);
    assert_non_null(host);
    assert_int_equal(places_know(&p, host, "host2", NULL), 0);
    for (int i = 3; i < 5; i++) {
        snprintf(address, sizeof(address), "192.0.2.%d", i);
        while (places_enter(&p, address, NULL))
            ;
    }
    assert_int_equal(fill(&p, "192.0.2.9", NULL, "too many connections of strangers"),
                     PLACES_STRANGERS - 3 * PLACES_STRANGERS_AT_ADDRESS);
    assert_int_equal(places_taken(&p), PLACES_STRANGERS + 1);
    leave_all(&p);
}

static void one_host_leaves_others_their_places(void **state)
{
    (void)state;
    struct places p = {0};
    assert_int_equal(fill(&p, "192.0.2.1", "host1", "too many connections of host host1"), PLACES_OF_HOST);
    assert_int_equal(fill(&p, "192.0.2.2", "host2", "too many connections of hosts"),
                     PLACES_HOSTS - PLACES_OF_HOST);
    assert_int_equal(fill(&p, "192.0.2.3", "host3", "too many connections of hosts"), 0);
    leave_all(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(strangers_leave_hosts_their_places),
                                       cmocka_unit_test(one_host_leaves_others_their_places)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
