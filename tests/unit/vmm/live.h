/* SPDX-License-Identifier: Apache-2.0 */
/*
 * live: what tests with a real QEMU share. Guests here are stopped at reset unless a test says
 * otherwise, with random data in memory (-device loader); accelerator TCG, so that nothing depends
 * on the host.
 */
#ifndef VMMIG_TESTS_LIVE_H
#define VMMIG_TESTS_LIVE_H

#include "vmm/qemu.h"
#include "vmm/qemu_preflight.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define LIVE_BINARY "/usr/bin/qemu-system-x86_64"
#define LIVE_ARGS_MAX 64

extern char live_dir[64]; /* scratch, made by live_setup, with random.bin of 8 MiB in it */

/* For cmocka's group. Without a QEMU the tests are skipped, and say so. */
int live_setup(void **state);
int live_teardown(void **state);
/* For one that a test started itself: killed when the test ends. Returns q, which may be NULL. */
struct qemu *live_note(struct qemu *q);
/* Teardown of each test. */
int live_kill_all(void **state);
#define live_test(f) cmocka_unit_test_teardown(f, live_kill_all)

/* Call it, with `why` for its error, and fail the test with the message if it returns -1. */
#define assert_ok(call)                                                                            \
    do {                                                                                           \
        struct vm_error *live_err_ = NULL;                                                         \
        struct vm_error **why = &live_err_;                                                        \
        if ((call) < 0)                                                                            \
            fail_msg("%s: %s", #call, error_message(live_err_));                                   \
    } while (0)

/* `err` has that kind and contains the text; it is cleared. */
void assert_error(struct vm_error **err, enum vm_error_kind kind, const char *text);

/* "live_dir/NAME" with a suffix; static, valid for a few calls. */
const char *live_path(const char *name, const char *suffix);
/* Start a QEMU: LIVE_BINARY, common arguments, then those (ended by NULL). The test owns it. */
struct qemu *live_spawn(const char *name, struct vm_error **err, ...) __attribute__((sentinel));
/* Kill and destroy. NULL is fine. */
void live_end(struct qemu *q);
/* Run a QMP command given as JSON arguments, "" for none; the reply belongs to the caller. */
json_t *live_qmp(struct qemu *q, const char *command, const char *arguments);

/* Everything there is to know of one migration from q to a new QEMU `name`. */
struct live_move {
    struct qemu_definition definition;
    struct qemu *from, *to;
    const struct guest_region *regions;
    unsigned n_regions;
    const char *dest_qmp; /* instead of starting one: attach to this */
    bool by_loader;       /* no page goes as a page: QEMU loads them all */
    bool populate;        /* as the engine does */
    const char *cgroup;   /* of the destination; NULL: none */
    const char *user;     /* of the destination; NULL: this one */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done, memory_done;
    unsigned rounds;
    uint64_t pages, bytes;
    struct vm_error *error, *callback_error;
    /* Called in the callback of the nth page batch; may be NULL. */
    void (*on_batch)(struct live_move *m);
    unsigned batches;
    bool block; /* pages wait until this is false again */
};
/* Preflight, checks, and a destination that waits. */
int live_prepare(struct live_move *m, struct qemu *from, const char *name, struct vm_error **err);
/* Start the source. */
int live_start(struct live_move *m, struct vm_error **err);
int live_start_with(struct live_move *m, const struct guest_source_params *params,
                    struct vm_error **err);
/* Wait for `done`; the error of the migration. */
int live_wait(struct live_move *m, struct vm_error **err);
/* prepare, start, pause, wait, stop, finish the sink. */
int live_move(struct live_move *m, struct qemu *from, const char *name, struct vm_error **err);
void live_move_finish(struct live_move *m);

/* Guest-physical memory of both is alike, and not all zero. */
void assert_same_memory(struct qemu *a, struct qemu *b, uint64_t from, uint64_t size);
void assert_run_state(struct qemu *q, enum guest_run_state state);

#endif
