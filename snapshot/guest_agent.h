/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest_agent: the agent within a guest (qemu-ga), reached through a socket of QEMU's, and what
 * snapshots and clones need of it.
 *
 *     path = guest_agent_find(argv, cwd)                of the command line, NULL if it has none;
 * free it ga = guest_agent_open(path, &process, deadline, &err) guest_agent_freeze(ga, deadline,
 * &n, &err)        n file systems hold still from here on guest_agent_thaw(ga, deadline, &err)
 *     guest_agent_close(ga)
 *
 * What it says comes from the guest: lines of at most GUEST_AGENT_LINE bytes, of which nothing is
 * believed, but repeated to the user: how many file systems it froze, and that an interface has a
 * MAC address. TIMEOUT if nobody in the guest answers, or if others have the socket, which is one's
 * at a time: they wait in a queue. Whoever freezes notes it before (snapshot/frozen.h). Threads:
 * one.
 */
#ifndef VMMIG_SNAPSHOT_GUEST_AGENT_H
#define VMMIG_SNAPSHOT_GUEST_AGENT_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/process.h"

#include <stdbool.h>
#include <stdint.h>

enum { GUEST_AGENT_LINE = 65536 };

struct guest_agent;

char *guest_agent_find(char *const *argv, const char *cwd);
/*
 * vmm: whose guest it is to be, of a path that a snapshot or a template names: REFUSED if a process
 * listens there that is neither that one nor its user's. NULL: whoever's.
 */
struct guest_agent *guest_agent_open(const char *path, const struct process_identity *vmm, int64_t deadline_ns,
                                     struct vm_error **err);
int guest_agent_freeze(struct guest_agent *ga, int64_t deadline_ns, unsigned *ret_n,
                       struct vm_error **err);
int guest_agent_thaw(struct guest_agent *ga, int64_t deadline_ns, struct vm_error **err);
/* They were frozen through it and not thawed, or nobody knows, since no answer came. One that
 * refused to freeze has not. */
bool guest_agent_is_frozen(const struct guest_agent *ga);
/*
 * Every interface of the guest that has the MAC address `from` gets `to` (the agent runs `ip link set`), and says so.
 * NOT_FOUND: none has it. FAILED: the agent may not run programs, or the guest does not take it.
 */
int guest_agent_set_mac(struct guest_agent *ga, const char *from, const char *to, int64_t deadline_ns,
                        struct vm_error **err);
void guest_agent_close(struct guest_agent *ga);
DEFINE_CLEANUP(guest_agent, struct guest_agent *, guest_agent_close)

#endif
