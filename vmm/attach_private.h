/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach_private: the parts of the attach driver (vmm/attach.h) and what they share.
 *
 *     attach_client.c   the connection: requests and their answers
 *     attach.c          guest_ops, definition
 *     attach_memory.c   the guest's memory and the dirty bitmap, mapped
 *     attach_source.c   the source
 *     attach_reader.c   memory that is private to the VMM's process
 *     attach_spawn.c    starting a VMM
 *     attach_sink.c     the sink
 *     attach_clone.c    a VMM whose guest's memory is a template's
 */
#ifndef VMMIG_VMM_ATTACH_PRIVATE_H
#define VMMIG_VMM_ATTACH_PRIVATE_H

#include "base/cond.h"
#include "proto/attach.h"
#include "vmm/attach.h"

#include <stdatomic.h>

/* ---- The connection ---- */

struct attach_client {
    char *path;
    pthread_mutex_t lock; /* one request at a time; guards what follows */
    int fd;               /* -1: not connected */
    bool pinned;          /* what was asked for belongs to this connection: do not connect anew */
    struct process_identity process;
    uid_t uid; /* of the process when it opened the socket */
    struct attach_info info;
    atomic_uint_fast64_t memory; /* of the guest, bytes, as last told */
};

/* An answer. Descriptors that are not taken (steal_fd) are closed by finish. */
struct attach_answer {
    struct attach_message message;
    int fds[ATTACH_FDS_MAX];
    int n_fds;
};

void attach_answer_finish(struct attach_answer *a);
static inline void attach_answer_cleanup(struct attach_answer *a)
{
    attach_answer_finish(a);
}
#define cleanup_attach_answer __attribute__((cleanup(attach_answer_cleanup)))

int attach_client_open(struct attach_client *c, const char *path, int timeout_ms,
                       struct vm_error **err);
void attach_client_finish(struct attach_client *c);
/*
 * One request and its answer, which must be of type `expected`. message NULL: empty; fd: goes along, -1: none. An ERROR
 * becomes our error, in the VMM's words. ret_answer NULL: its contents do not matter.
 */
int attach_request(struct attach_client *c, unsigned type, const ProtobufCMessage *message, int fd,
                   unsigned expected, struct attach_answer *ret_answer, struct vm_error **err);
/* A request whose answer is OK. */
int attach_order(struct attach_client *c, unsigned type, const ProtobufCMessage *message,
                 struct vm_error **err);
/*
 * Is that pid, which the kernel tells of a connection's other end, still the process that listened?
 * The number stays when that process has ended, and somebody else's process may have it. REFUSED if
 * not. Kernels before 6.5 say no more than whose the process was: then (and with fd -1) it has to
 * be that user's.
 */
int attach_check_listener(int fd, pid_t pid, uid_t uid, struct vm_error **err);
/* How long an answer to such a request is waited for. */
int attach_client_patience_ms(struct attach_client *c, unsigned type);
void attach_client_pin(struct attach_client *c, bool pinned);
bool attach_client_connected(struct attach_client *c);

/* ---- Memory ---- */

struct attach_region {
    struct guest_region region; /* base: mapped; NULL: it is private to the VMM's process, and read out of fd */
    uint64_t pages;
    int fd;                     /* a file position of our own */
    uint64_t offset;            /* of its first page in fd */
    const uint64_t *dirty;      /* the shared bitmap; written by the VMM at any time */
};

struct attach_memory_map {
    struct attach_region regions[ATTACH_SLOTS_MAX];
    struct guest_region list[ATTACH_SLOTS_MAX]; /* of the above, for the engine */
    unsigned n;
    void *bitmap;
    size_t bitmap_size;
    uint64_t generation; /* of the slots, as the VMM counts them; 0: it does not */
};

/*
 * Ask for the guest's memory slots. REFUSED if they are more than ATTACH_OVERCOMMIT times this host's memory together:
 * what the driver keeps per page is bounded by that, whatever a VMM says.
 */
int attach_memory_ask(struct attach_client *c, struct attach_answer *ret_answer, struct vm_error **err);
/* The same, and map it. On failure the map is empty. Writable: REFUSED if some is private. */
int attach_memory_map(struct attach_memory_map *m, struct attach_client *c, bool writable,
                      struct vm_error **err);
void attach_memory_unmap(struct attach_memory_map *m);

/*
 * Where memory has pages, walking upwards: for the first pass over it. What was found out is true for that instant
 * only: attach_holes_renew after each clearing of the log, or a page that the guest wrote between the two is taken
 * for a hole, and nothing remembers that it was written.
 */
struct attach_holes {
    const struct attach_region *region;
    uint64_t data_start, data_end; /* page numbers: the stretch of data at or behind the last question */
    uint8_t *probe;                /* hugetlb, which cannot be asked: one piece as read */
    uint64_t probe_start;
    bool probe_zero, dense;
};

int attach_holes_init(struct attach_holes *h, const struct attach_region *r, struct vm_error **err);
void attach_holes_finish(struct attach_holes *h);
/* From this page on. What was data is taken for data still, which is never wrong. */
void attach_holes_renew(struct attach_holes *h, uint64_t page);
/* Is there memory behind this page? Pages are asked for in ascending order. */
bool attach_holes_has(struct attach_holes *h, uint64_t page);

/* ---- The driver ---- */

struct attach_source;
struct attach_sink;

struct attach {
    struct guest guest; /* first */
    struct attach_client client;
    pthread_mutex_t lock; /* guards the next three pointers */
    struct attach_source *source;
    struct attach_source *spent; /* whose copy is complete: unmapping it would lengthen the pause */
    struct attach_sink *sink;
    atomic_bool tracking_left_on; /* by a complete copy */
    atomic_int_fast64_t resumed_ns;
};

int attach_source_start(struct guest *g, const struct guest_source_params *params,
                        const struct guest_source_events *events, void *arg, struct vm_error **err);
int attach_source_progress(struct guest *g, struct guest_source_progress *ret_progress,
                           struct vm_error **err);
int attach_source_stop(struct guest *g, struct vm_error **err);
/* The memory of a complete copy, which is mapped until here, or until the handle ends. */
void attach_source_release(struct attach *a);
/* The engine has paused the guest. */
void attach_source_paused(struct attach *a);

/* Is it the VMM of the definition, waiting? */
int attach_check_waits(struct attach *a, const struct qemu_definition *d, struct vm_error **err);
/* Are its memory slots those of the definition? The generation is that of the slots that were looked at. */
int attach_check_slots(struct attach *a, const struct qemu_definition *d, uint64_t *ret_generation,
                       struct vm_error **err);
/* Ask for the slots, and add them to a definition's `ram`. */
int attach_define_memory(struct attach *a, struct qemu_definition *d, uint64_t *ret_generation, struct vm_error **err);
/* Is it the VMM of the definition, and does it wait? Then it is a sink from now on. */
int attach_sink_make(struct attach *a, const struct qemu_definition *d, struct vm_error **err);
void attach_sink_destroy(struct attach_sink *s);
int attach_sink_regions(struct guest *g, const struct guest_region **ret_regions, unsigned *ret_n);
int attach_sink_populate(struct guest *g, const uint64_t *addrs, unsigned n, struct vm_error **err);
int attach_sink_bytes(struct guest *g, const void *data, size_t n, int64_t deadline_ns,
                      int cancel_fd, struct vm_error **err);
int attach_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd, struct vm_error **err);

/* What the VMM says of itself now. */
int attach_query_state(struct attach *a, Vmmig__Attach__RunState *ret_state,
                       struct guest_status *ret_status, struct vm_error **err);

#endif
