/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/take_attach.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "snapshot/chain.h"
#include "snapshot/taking.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

#define LOOK_NS (2 * NSEC_PER_MSEC)
#define RESUME_NS (30 * NSEC_PER_SEC)

/* The guest is paused when that little is left, or when it will not become less. */
enum { REST = 2 << 20, ROUNDS = 20, RESUME_AGAIN_MS = 100 };

/* What the guest does but for this snapshot. */
enum whose {
    RUNS,
    ITS_VMMS, /* it stands, and that is its VMM's doing: it is the agent's for the snapshot only */
    AN_AGENTS /* it stands, and was an agent's before: it stays so */
};

struct take {
    struct taking s;
    struct attach *attach;
    struct guard *guard;
    enum whose whose;
    bool taken;  /* from here on the snapshot may have it stand: it is to be given back */
    bool paused; /* while it ran */
    int64_t paused_at_ns;
};

/* ---- before the instant ---- */

static int check_request(const struct take *t, struct vm_error **err)
{
    if (t->s.p->disk_only)
        return error_set(err, VM_ERROR_REFUSED,
                         "--disk-only: nothing is known of disks of %s", attach_info(t->attach)->vmm);
    if (t->s.p->guest_agent)
        return error_set(err, VM_ERROR_REFUSED,
                         "--guest-agent: nothing is known of disks of %s whose file systems could hold still",
                         attach_info(t->attach)->vmm);
    return 0;
}

static int look_at_vm(struct take *t, struct vm_error **err)
{
    struct qemu_definition *d = &t->s.vm.definition;
    enum attach_stands stands;
    if (check_request(t, err) < 0 || attach_define(t->attach, d, err) < 0 ||
        qemu_json_name_files(&t->s.vm, err) < 0 || attach_query_stands(t->attach, &stands, err) < 0)
        return -1;
    snprintf(t->s.vm.name, sizeof(t->s.vm.name), "%s", t->s.p->vm);
    if (!strcmp(d->binary, ATTACH_NO_BINARY))
        return error_set(err, VM_ERROR_REFUSED,
                         "%s does not say how one is started that waits for its guest: nothing could be restored",
                         d->cpu_model);
    t->whose = stands == ATTACH_STANDS_NOT ? RUNS : stands == ATTACH_STANDS_VMMS ? ITS_VMMS : AN_AGENTS;
    d->state = t->whose == RUNS ? GUEST_RUNNING : GUEST_PAUSED;
    t->s.was_running = t->whose == RUNS;
    return 0;
}

static int begin_image(struct take *t, struct vm_error **err)
{
    cleanup_free struct image *parent = calloc(1, sizeof(*parent));
    if (!parent)
        return error_nomem(err);
    if (snapshot_newest(t->s.p->repo, t->s.p->vm, parent, err) < 0)
        return -1;
    return taking_begin(&t->s, parent, err);
}

static int open_image(struct take *t, struct vm_error **err)
{
    struct guard_params guard = t->s.p->guard;
    guard.attach = true;
    if (begin_image(t, err) < 0)
        return -1;
    /* One that was an agent's before is nobody's to set going. */
    if (t->whose != AN_AGENTS && !(t->guard = guard_start(&guard, err)))
        return -1;
    struct memory_image_setup memory = {.vm = &t->s.vm,
                                        .session = t->s.session,
                                        .gather = t->s.gather,
                                        .scratch_dir = t->s.p->scratch_dir,
                                        .repeats = true};
    t->s.report->memory_bytes = t->s.vm.definition.memory;
    t->s.memory = memory_image_create(&memory, err);
    return t->s.memory ? 0 : -1;
}

/* ---- the instant ---- */

/* Its user may have had it stand, or go on, since it was looked at: so it is restored, and so it stays. */
static int look_again(struct take *t, struct vm_error **err)
{
    enum attach_stands stands;
    if (t->whose == AN_AGENTS)
        return 0;
    if (attach_query_stands(t->attach, &stands, err) < 0)
        return -1;
    enum whose now = stands == ATTACH_STANDS_BORROWED ? ITS_VMMS : stands == ATTACH_STANDS_PAUSED ? RUNS : t->whose;
    if (now == t->whose)
        return 0;
    log_info("the guest's user changed its run state", "runs=%d", now == RUNS);
    t->whose = now;
    t->s.was_running = now == RUNS;
    t->s.vm.definition.state = now == RUNS ? GUEST_RUNNING : GUEST_PAUSED;
    return 0;
}

/* Whatever happens from here on, clean_up gives it back. */
static int pause_guest(struct take *t, struct vm_error **err)
{
    t->paused_at_ns = clock_mono_ns();
    t->taken = t->paused = true;
    if (guest_pause(t->s.p->guest, err) < 0)
        return -1;
    FAULT("snapshot.paused");
    return look_again(t, err);
}

static bool is_enough(const struct take *t)
{
    struct guest_source_progress p;
    return guest_source_progress(t->s.p->guest, &p, NULL) == 0 && p.round > 1 &&
           (p.remaining <= REST || p.round > ROUNDS);
}

/* Until all of it is there, of the instant at which the guest stands. */
static int copy_memory(struct take *t, struct vm_error **err)
{
    for (;;) {
        int r = memory_image_wait(t->s.memory, clock_mono_ns() + LOOK_NS, t->s.p->cancel_fd, err);
        if (r)
            return r < 0 ? -1 : 0;
        if (t->whose != AN_AGENTS && !t->paused && is_enough(t) && pause_guest(t, err) < 0)
            return -1;
        taking_tell(&t->s, SNAPSHOT_SWITCHING);
    }
}

/*
 * A callback of the VMM may fail once, or hang: the guest must not stand because of a snapshot.
 * That the VMM died is for its job to tell, not for this.
 */
static int give_back(struct take *t, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + RESUME_NS;
    while (t->taken) {
        cleanup_error struct vm_error *failed = NULL;
        if (attach_let_go(t->attach, &failed) == 0 || failed->kind == VM_ERROR_VMM_DIED)
            break;
        if (clock_mono_ns() > deadline)
            return error_set(err, failed->kind, "the guest stands, its VMM does not %s: %s",
                             t->whose == ITS_VMMS ? "take it back" : "let it go on", error_message(failed));
        poll(NULL, 0, RESUME_AGAIN_MS);
    }
    t->taken = false;
    return 0;
}

static int go_on(struct take *t, struct vm_error **err)
{
    if (give_back(t, err) < 0)
        return -1;
    attach_end_copy(t->attach); /* of one that was not resumed */
    int64_t pause = t->whose == RUNS && t->paused ? attach_resumed_ns(t->attach) - t->paused_at_ns : 0;
    t->s.report->pause_ns = t->s.progress.pause_ns = pause > 0 ? pause : 0;
    return 0;
}

/* The source holds a guest that stands when it begins, be it that its user was faster. */
static int start(struct take *t, struct vm_error **err)
{
    if (t->whose == ITS_VMMS)
        return pause_guest(t, err) < 0 ? -1 : taking_start_memory(&t->s, false, err);
    t->taken = t->whose == RUNS;
    return taking_start_memory(&t->s, false, err) < 0 ? -1 : look_again(t, err);
}

static int switch_over(struct take *t, struct vm_error **err)
{
    taking_tell(&t->s, SNAPSHOT_SWITCHING);
    if (start(t, err) < 0 || copy_memory(t, err) < 0 || taking_stop_memory(&t->s, err) < 0)
        return -1;
    FAULT("snapshot.switched");
    taking_date(&t->s);
    return go_on(t, err);
}

/* ---- after ---- */

static int store(struct take *t, struct vm_error **err)
{
    taking_tell(&t->s, SNAPSHOT_COPYING);
    if (memory_image_store_pages(t->s.memory, t->s.p->cancel_fd, err) < 0)
        return -1;
    FAULT("snapshot.copied");
    return 0;
}

static int run(struct take *t, struct vm_error **err)
{
    taking_tell(&t->s, SNAPSHOT_PREPARING);
    return look_at_vm(t, err) < 0 || open_image(t, err) < 0 || switch_over(t, err) < 0 ||
                   store(t, err) < 0
               ? -1
               : taking_commit(&t->s, err);
}

/* The guest is as it was, whatever happened. That it does not is told before what else went wrong. */
static void clean_up(struct take *t, struct vm_error **err)
{
    cleanup_error struct vm_error *stands = NULL;
    taking_stop_memory(&t->s, NULL);
    if (give_back(t, &stands) < 0)
        error_wrap(err, "%s, after", error_message(stands));
    guard_end(t->guard);
    taking_finish(&t->s);
}

int take_attach(struct attach *a, const struct snapshot_params *params, struct snapshot_report *ret_report,
                struct vm_error **err)
{
    struct snapshot_report report = {.pause_ns = -1};
    struct take t = {.s = {.p = params, .report = &report, .progress = {.pause_ns = -1}}, .attach = a};
    struct vm_error *failed = NULL;
    int r = run(&t, &failed);
    clean_up(&t, &failed);
    if (r < 0)
        return error_propagate(err, failed);
    *ret_report = report;
    return 0;
}
