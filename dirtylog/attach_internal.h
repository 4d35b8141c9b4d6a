/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach_internal: the parts of libvmmig-attach (dirtylog/vmmig-attach.h) and what they share.
 *
 *     attach_library.c    the public calls: life, run state, vCPUs
 *     attach_memory.c     slots: their checks, the shared bitmap, what devices marked, harvest and clear
 *     attach_callbacks.c  the VMM's callbacks, each with a deadline
 *     attach_throttle.c   taking time away from vCPUs
 *     attach_server.c     the thread that serves agents
 *
 * Locks. `memory_lock` guards the slots and every call of the dirty log but dirtylog_vcpu_exit; `marks_lock`,
 * taken after it, lets vmmig_mark_dirty see slots without waiting for a harvest. `state_lock`, `call_lock` and the
 * throttle's are taken alone.
 */
#ifndef VMMIG_DIRTYLOG_ATTACH_INTERNAL_H
#define VMMIG_DIRTYLOG_ATTACH_INTERNAL_H

#include "base/cond.h"
#include "base/error.h"
#include "dirtylog/dirtylog.h"
#include "dirtylog/vmmig-attach.h"
#include "proto/attach.h"

#include <stdatomic.h>

#define ATTACH_CONNECTIONS_MAX 4
#define ATTACH_DETAIL_MAX 64

struct attach_slot {
    struct vmmig_slot slot; /* memfd is our own descriptor */
    uint64_t page_size, bitmap_offset;
    atomic_uint_fast64_t *marks; /* a bit per page that vmmig_mark_dirty named; while tracking */
    atomic_bool marked;
    bool maps_file; /* `host` is a private mapping of a file of the agent's, and memfd is empty */
};

/* Where the library has put a template's file. It stays there whatever the VMM tells of its memory later. */
struct attach_file_mapping {
    void *host;
    uint64_t size;
};

struct attach_memory {
    pthread_mutex_t memory_lock;
    struct dirtylog *log;
    struct attach_slot slots[VMMIG_SLOTS_MAX];
    unsigned n_slots;
    int bitmap_fd;
    uint8_t *bitmap;
    size_t bitmap_size;
    bool first_harvest;
    uint64_t generation; /* of the tracking: another one with each start */
    uint64_t told;       /* of the slots: another one each time that the VMM told them */
    struct attach_file_mapping files[VMMIG_SLOTS_MAX];
    unsigned n_files;
    pthread_rwlock_t marks_lock;
    atomic_bool tracking;
};

struct attach_throttle {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned percent;
    unsigned sleepers; /* vCPUs' threads that sleep, or have not woken yet */
    pthread_t thread;
    bool started;
    atomic_int_fast64_t sleep_until_ns; /* vCPUs stay out of the guest until then; 0: they need not */
};

struct attach_connection {
    int fd; /* -1: free */
    bool greeted;
    uint64_t tracks; /* the generation of what it tracks; 0: nothing */
    unsigned request; /* that is being served: its type */
};

struct vmmig_attach {
    struct vmmig_config config; /* pointers are to copies of our own */
    struct attach_memory memory;
    struct attach_throttle throttle;
    atomic_bool *in_guest; /* one per vCPU */

    pthread_mutex_t state_lock; /* guards what follows */
    enum vmmig_run_state state;
    char detail[ATTACH_DETAIL_MAX];
    bool held; /* paused, or loaded, by an agent */
    enum vmmig_run_state before; /* of a guest that is held: what it did before that */
    bool pause_hangs;            /* it is held since a `pause` that has not returned: its vCPUs may run */
    bool releasing;              /* `release` has not returned: whether it is the VMM's again will be known then */

    pthread_mutex_t call_lock; /* guards what follows */
    pthread_cond_t call_changed;
    unsigned calls, abandoned; /* threads inside callbacks; those whose caller has gone */
    const char *abandoned_name;

    int listen_fd, stop;
    pthread_t server;
    bool server_started;
    struct attach_connection connections[ATTACH_CONNECTIONS_MAX];
    const struct attach_connection *throttles; /* whose the throttling is, if there is any */
};

/* attach_memory.c */
void attach_memory_init(struct attach_memory *m);
void attach_memory_finish(struct attach_memory *m);
int attach_memory_set(struct attach_memory *m, const struct vmmig_slot *slots, unsigned n,
                      struct vm_error **err);
int attach_memory_track(struct attach_memory *m, const char *record_path, uint64_t *ret_generation,
                        struct vm_error **err);
/* False: what is tracked now, if anything, is somebody else's. */
bool attach_memory_untrack(struct attach_memory *m, uint64_t generation);
/* CONFLICT, also of harvest and clear: the slots have changed since. */
int attach_memory_check(struct attach_memory *m, uint64_t generation, struct vm_error **err);
/* *ret_pages: bits found. */
int attach_memory_harvest(struct attach_memory *m, uint64_t generation, uint64_t *ret_pages,
                          uint64_t *ret_ring_full, struct vm_error **err);
int attach_memory_clear(struct attach_memory *m, uint64_t generation, unsigned slot, uint64_t first, uint64_t n,
                        struct vm_error **err);
/*
 * What an agent does to the memory of a guest that is waited for belongs to slots as it was told them: `told`, 0: an
 * agent that does not say. CONFLICT, also of the next two, if the VMM told others since.
 */
int attach_memory_check_told(struct attach_memory *m, uint64_t told, struct vm_error **err);
/* Put a private mapping of the file where the slot's memory is. */
int attach_memory_map_file(struct attach_memory *m, uint64_t told, unsigned slot, int fd, struct vm_error **err);
/*
 * Have memory behind these pages. This thread gets it, so it is charged to this process's cgroup, where a page that an
 * agent writes first is charged to the agent's.
 */
int attach_memory_populate(struct attach_memory *m, uint64_t told, unsigned slot, uint64_t first, uint64_t n,
                           struct vm_error **err);
void attach_memory_mark(struct attach_memory *m, uint64_t guest_address, uint64_t size);

/* attach_callbacks.c */
#define ATTACH_CALLS(X)                                                                            \
    X(PAUSE, pause) X(RESUME, resume) X(RELEASE, release) X(SAVE, save) X(LOAD, load) X(QUIT, quit)
#define X(id, name) ATTACH_CALL_##id,
enum attach_call { ATTACH_CALLS(X) };
#undef X
/* fd: for save and load; stays the caller's. TIMEOUT, CONFLICT while an abandoned one is under way, FAILED. */
int attach_call(struct vmmig_attach *a, enum attach_call which, int fd, struct vm_error **err);
/* Wait until no thread is inside a callback. */
void attach_call_drain(struct vmmig_attach *a);

/* attach_throttle.c */
void attach_throttle_init(struct attach_throttle *t);
void attach_throttle_finish(struct vmmig_attach *a);
int attach_throttle_set(struct vmmig_attach *a, unsigned percent, struct vm_error **err);
/* In a vCPU's thread. */
void attach_throttle_sleep(struct attach_throttle *t);

/* attach_server.c */
/* The socket is there, and nobody is answered yet. */
int attach_server_listen(struct vmmig_attach *a, struct vm_error **err);
/* Fine if it was started already. */
int attach_server_start(struct vmmig_attach *a, struct vm_error **err);
void attach_server_stop(struct vmmig_attach *a);

/* attach_library.c */
void attach_set_state(struct vmmig_attach *a, enum vmmig_run_state state, bool held);
/* The guest stands, and is the agent's. Called again it changes nothing. */
void attach_hold(struct vmmig_attach *a);
/* `release` returned, or was not called. */
void attach_released(struct vmmig_attach *a, bool done);
void attach_log(struct vmmig_attach *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
