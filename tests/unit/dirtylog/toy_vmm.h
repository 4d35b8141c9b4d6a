/* SPDX-License-Identifier: Apache-2.0 */
/*
 * toy_vmm: a VMM around tiny_vm that links libvmmig-attach, in the test's own process; and one without KVM
 * that waits for a guest. It does what it is told, misbehaving included.
 *
 *     struct toy_vmm *vmm = toy_vmm_create(&(struct toy_params){.kind = DIRTYLOG_RING, ...});
 *     toy_vmm_run(vmm)                       vCPUs write, each a range of its own and all a shared one
 *     struct toy_vmm *other = toy_vmm_create_incoming(vmm)
 *
 * Its device writes guest memory by itself, page by page in its own range, and marks what it wrote, unless
 * told to forget that. Its state is TOY_STATE bytes and the device's counter.
 */
#ifndef VMMIG_TESTS_TOY_VMM_H
#define VMMIG_TESTS_TOY_VMM_H

#include "dirtylog/vmmig-attach.h"
#include "tests/unit/dirtylog/tiny_vm.h"

#include <stdatomic.h>

#define TOY_PAGES 4096u            /* of data, unless there shall be more */
#define TOY_DEVICE_FIRST 3072u     /* pages that only the device writes */
#define TOY_DEVICE_PAGES 1000u
#define TOY_SAVE_PAGE 4090u        /* written while the state is saved */
#define TOY_QUIET_PAGE 4093u       /* written before tracking begins, and never after */
#define TOY_STATE 300000u

enum toy_step { TOY_PAUSE, TOY_RESUME, TOY_RELEASE, TOY_SAVE, TOY_LOAD, TOY_STEPS };

struct toy_params {
    enum dirtylog_kind kind;
    unsigned ring_entries, vcpus;
    uint64_t pages; /* of data; 0: TOY_PAGES */
    unsigned callback_timeout_ms;
    bool device, forget_marks; /* let the device run; without marking */
    bool write_on_save, forget_mark_on_save;
    bool takes_no_files;
    bool pauses_first; /* a `pause` that fails or hangs has stopped the guest before */
    const char *socket; /* instead of a path of its own */
    uid_t agent_uid;    /* 0: nobody's but root's */
};

struct toy_vmm {
    struct toy_params params;
    char path[64];
    struct vmmig_attach *attach;
    struct tiny_vm *vm; /* NULL: incoming, without KVM */
    uint8_t *memory[2];
    int memfds[2];
    uint64_t sizes[2];
    struct vmmig_slot slots[2];
    atomic_bool running;
    /* Misbehaviour: what a callback returns, and whether it waits until `release`. */
    int fail[TOY_STEPS];
    atomic_bool hang[TOY_STEPS];
    atomic_uint calls[TOY_STEPS];
    atomic_bool quit, released;
    pthread_t device;
    bool device_started;
    atomic_bool device_stop;
    atomic_uint_fast64_t device_writes;
    uint8_t *loaded; /* what `load` was given */
    size_t n_loaded;
};

struct toy_vmm *toy_vmm_create(const struct toy_params *params);
/* A VMM of the same machine that waits for a guest. */
struct toy_vmm *toy_vmm_create_incoming(const struct toy_vmm *like);
void toy_vmm_destroy(struct toy_vmm *vmm);
void toy_vmm_run(struct toy_vmm *vmm);
/* Passes of vCPU 0 until something was written anew. */
void toy_vmm_wait_progress(struct toy_vmm *vmm);
/* The state that `save` writes, TOY_STATE bytes. */
const uint8_t *toy_vmm_state(void);

#endif
