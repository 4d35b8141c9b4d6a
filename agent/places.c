/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/places.h"

#include "base/cleanup.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct place { /* the list has the newest first */
    struct place *next;
    bool known, gone; /* gone: he gave way */
    int fd;           /* a stranger's connection, a copy; -1 */
    char name[PLACES_NAME_MAX + 1]; /* the host's, or a stranger's address */
};

enum kind { STRANGERS, HOSTS, GONE };

static enum kind kind_of(const struct place *i)
{
    return i->known ? HOSTS : i->gone ? GONE : STRANGERS;
}

/* Of the kind; `name`: only his. *ret_oldest, if not NULL: of them. */
static unsigned count(const struct places *p, enum kind kind, const char *name, struct place **ret_oldest)
{
    unsigned n = 0;
    for (struct place *i = p->list; i; i = i->next) {
        if (kind_of(i) != kind || (name && strcmp(i->name, name)))
            continue;
        n++;
        if (ret_oldest)
            *ret_oldest = i;
    }
    return n;
}

static void give_way(struct place *place)
{
    place->gone = true;
    if (place->fd >= 0)
        shutdown(place->fd, SHUT_RDWR);
}

static int make_room(const struct places *p, const char *address, struct vm_error **err)
{
    struct place *oldest = NULL;
    if (count(p, GONE, NULL, NULL) >= PLACES_STRANGERS)
        return error_set(err, VM_ERROR_REFUSED, "too many connections of strangers");
    if (count(p, STRANGERS, address, &oldest) >= PLACES_STRANGERS_AT_ADDRESS ||
        count(p, STRANGERS, NULL, &oldest) >= PLACES_STRANGERS)
        give_way(oldest);
    return 0;
}

struct place *places_enter(struct places *p, const char *address, int fd, struct vm_error **err)
{
    if (make_room(p, address, err) < 0)
        return NULL;
    struct place *place = calloc(1, sizeof(*place));
    if (!place) {
        error_nomem(err);
        return NULL;
    }
    place->fd = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    snprintf(place->name, sizeof(place->name), "%s", address);
    place->next = p->list;
    p->list = place;
    return place;
}

int places_know(struct places *p, struct place *place, const char *host, struct vm_error **err)
{
    if (place->gone)
        return error_set(err, VM_ERROR_REFUSED, "too many connections of strangers");
    if (count(p, HOSTS, NULL, NULL) >= PLACES_HOSTS)
        return error_set(err, VM_ERROR_REFUSED, "too many connections of hosts");
    if (count(p, HOSTS, host, NULL) >= PLACES_OF_HOST)
        return error_set(err, VM_ERROR_REFUSED, "too many connections of host %s", host);
    place->known = true;
    close_fd(&place->fd);
    snprintf(place->name, sizeof(place->name), "%s", host);
    return 0;
}

void places_leave(struct places *p, struct place *place)
{
    for (struct place **i = &p->list; *i; i = &(*i)->next) {
        if (*i != place)
            continue;
        *i = place->next;
        close_fd(&place->fd);
        free(place);
        return;
    }
}

unsigned places_taken(const struct places *p)
{
    unsigned n = 0;
    for (const struct place *i = p->list; i; i = i->next)
        n++;
    return n;
}
