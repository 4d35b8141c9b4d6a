/* SPDX-License-Identifier: Apache-2.0 */
/*
 * acceptor: takes the connections that come to a listening socket, in the loop's thread.
 *
 * While the process or the system is out of descriptors or memory it does not look at the socket for
 * ACCEPTOR_REST_MS at a time: a connection that cannot be taken stays ready, and the loop would spin.
 */
#ifndef VMMIG_BASE_ACCEPTOR_H
#define VMMIG_BASE_ACCEPTOR_H

#include "base/cleanup.h"
#include "base/loop.h"

#define ACCEPTOR_REST_MS 200

struct acceptor;

/* Takes the connection over: a close-on-exec descriptor. */
typedef void acceptor_fn(int fd, void *arg);

/* `listener` stays the caller's and outlives the acceptor. */
struct acceptor *acceptor_create(struct loop *loop, int listener, acceptor_fn *fn, void *arg,
                                 struct vm_error **err);
/* In the loop's thread, or when nobody is in the loop. NULL is fine. */
void acceptor_destroy(struct acceptor *a);
DEFINE_CLEANUP(acceptor, struct acceptor *, acceptor_destroy)

#endif
