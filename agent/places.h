/* SPDX-License-Identifier: Apache-2.0 */
/*
 * places: how many connections others may have here at once; each takes a thread. Who has not shown a certificate
 * of the cluster yet is a stranger, and strangers cannot take the places of hosts; nor can one host take those of
 * all.
 *
 *     p = places_enter(&places, "192.0.2.7", &err)      a stranger's
 *     places_know(&places, p, "host2", &err)            that of a host, from now on
 *     places_leave(&places, p)                          always
 *
 * Threads: any, under a lock of the caller's. REFUSED: there is no place left.
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

struct place *places_enter(struct places *p, const char *address, struct vm_error **err);
/* On failure the place is a stranger's still. */
int places_know(struct places *p, struct place *place, const char *host, struct vm_error **err);
void places_leave(struct places *p, struct place *place);
unsigned places_taken(const struct places *p);

#endif
