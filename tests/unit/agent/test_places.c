/* SPDX-License-Identifier: Apache-2.0 */
/* Strangers do not keep hosts out, nor does one host keep out the others. */
#include "agent/places.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
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
    while ((place = places_enter(p, address, -1, &err)) && places_know(p, place, host, &err) == 0)
        n++;
    places_leave(p, place);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(err), why);
    return n;
}

/* One who says nothing and stays, and the other end of his connection. */
static struct place *stay(struct places *p, const char *address, int *ret_end)
{
    int pair[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    struct place *place = places_enter(p, address, pair[0], NULL);
    assert_non_null(place);
    close(pair[0]); /* a place has a copy */
    *ret_end = pair[1];
    return place;
}

static bool was_dropped(int end)
{
    char byte;
    return recv(end, &byte, 1, MSG_DONTWAIT) == 0;
}

/* The one who has been a stranger for longest; at an address of which there are too many, one of these. */
static void strangers_give_way(void **state)
{
    (void)state;
    struct places p = {0};
    cleanup_error struct vm_error *err = NULL;
    char address[32];
    int ends[PLACES_STRANGERS], more[2], first;
    struct place *oldest = stay(&p, "192.0.2.250", &first);
    for (int i = 0; i < PLACES_STRANGERS - 1; i++) {
        snprintf(address, sizeof(address), "192.0.2.%d", i / (int)PLACES_STRANGERS_AT_ADDRESS);
        stay(&p, address, &ends[i]);
    }
    assert_false(was_dropped(first));
    stay(&p, "192.0.2.0", &more[0]); /* has as many as it may */
    assert_true(was_dropped(ends[0]) && !was_dropped(first));
    struct place *host = stay(&p, "192.0.2.251", &more[1]);
    assert_true(was_dropped(first) && !was_dropped(ends[1]));
    assert_int_equal(places_know(&p, host, "host2", NULL), 0);
    assert_int_equal(places_know(&p, oldest, "host3", &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    for (int i = 0; i < PLACES_STRANGERS - 1; i++)
        close(ends[i]);
    close(more[0]);
    close(more[1]);
    close(first);
    leave_all(&p);
}

/* Each has a thread until he has left. */
static void strangers_are_bounded(void **state)
{
    (void)state;
    struct places p = {0};
    cleanup_error struct vm_error *err = NULL;
    unsigned n = 0;
    while (places_enter(&p, "192.0.2.1", -1, &err))
        n++;
    assert_int_equal(n, PLACES_STRANGERS + PLACES_STRANGERS_AT_ADDRESS);
    assert_string_equal(error_message(err), "too many connections of strangers");
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
    const struct CMUnitTest tests[] = {cmocka_unit_test(strangers_give_way), cmocka_unit_test(strangers_are_bounded),
                                       cmocka_unit_test(one_host_leaves_others_their_places)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
