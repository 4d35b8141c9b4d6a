/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/places.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct place {
    struct place *next;
    bool known;
    char name[PLACES_NAME_MAX + 1]; /* the host's, or a stranger's address */
};

/* Of the kind; `name`: only his. */
static unsigned count(const struct places *p, bool known, const char *name)
{
    unsigned n = 0;
    for (const struct place *i = p->list; i; i = i->next)
        n += i->known == known && (!name || !strcmp(i->name, name));
    return n;
}

static int check(const struct places *p, bool known, const char *name, struct vm_error **err)
{
    if (count(p, known, NULL) >= (known ? PLACES_HOSTS : PLACES_STRANGERS))
        return error_set(err, VM_ERROR_REFUSED, "too many connections of %s",
                         known ? "hosts" : "strangers");
    if (count(p, known, name) >= (known ? PLACES_OF_HOST : PLACES_STRANGERS_AT_ADDRESS))
        return error_set(err, VM_ERROR_REFUSED, "too many connections of %s%s",
                         known ? "host " : "strangers at ", name);
    return 0;
}

struct place *places_enter(struct places *p, const char *address, struct vm_error **err)
{
    if (check(p, false, address, err) < 0)
        return NULL;
    struct place *place = calloc(1, sizeof(*place));
    if (!place) {
        error_nomem(err);
        return NULL;
    }
    snprintf(place->name, sizeof(place->name), "%s", address);
    place->next = p->list;
    p->list = place;
    return place;
}

int places_know(struct places *p, struct place *place, const char *host, struct vm_error **err)
{
    if (check(p, true, host, err) < 0)
        return -1;
    place->known = true;
    snprintf(place->name, sizeof(place->name), "%s", host);
    return 0;
}

void places_leave(struct places *p, struct place *place)
{
    for (struct place **i = &p->list; *i; i = &(*i)->next) {
        if (*i != place)
            continue;
        *i = place->next;
        free(place);
        return;
    }
}

unsigned places_taken(const struct places *p)
{
    return count(p, false, NULL) + count(p, true, NULL);
}
