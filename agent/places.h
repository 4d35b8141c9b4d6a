/* SPDX-License-Identifier: Apache-2.0 */
/*
 * places: how many connections others may have here at once; each takes a thread. Who has not shown a certificate
 * of the cluster yet is a stranger, and strangers cannot take the places of hosts; nor can one host take those of
 * all. Where no place is left for a stranger, the one who has been one for longest (at that address, if it is that one
 * which has too many) gives way: his connection is shut down. A host is none for longer than its handshake takes, so
 * those who connect and say nothing do not keep hosts out.
 *
 *     p = places_enter(&places, "192.0.2.7", fd, &err)  a stranger's; fd stays the caller's
 *     places_know(&places, p, "host2", &err)            that of a host, from now on
 *     places_leave(&places, p)                          always
 *
 * Threads: any, under a lock of the caller's. REFUSED: there is no place left; of a stranger, when PLACES_STRANGERS
 * of those who gave way have not left yet.
 */
#ifndef VMMIG_AGENT_PLACES_H
#define VMMIG_AGENT_PLACES_H

#include "base/error.h"

#define PLACES_STRANGERS 128           /* at once, until their handshake is done or has failed */
#define PLACES_STRANGERS_AT_ADDRESS 32
#define PLACES_HOSTS 512
#define PLACES_OF_HOST 256
#define PLACES_NAME_MAX 255

struct place;

struct places {
    struct place *list;
};

struct place *places_enter(struct places *p, const char *address, int fd, struct vm_error **err);
/* On failure the place is a stranger's still. REFUSED, too, if he had to give way. */
int places_know(struct places *p, struct place *place, const char *host, struct vm_error **err);
void places_leave(struct places *p, struct place *place);
unsigned places_taken(const struct places *p);

#endif
