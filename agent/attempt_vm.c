/* SPDX-License-Identifier: Apache-2.0 */
/* Starting, asking and ending an attempt's VM, at either end. */
#include "agent/attempt.h"

#include "base/cond.h"
#include "base/log.h"

/* How long, and how often, a VMM is asked anew at once whether its guest runs. */
enum { RESUME_RETRY_MS = 200, RESUME_TRIES = 5 };
enum { QUIT_TIMEOUT_MS = 2000 };

void attempt_blame_death(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    if (!a->reason)
        error_set(&a->reason, VM_ERROR_VMM_DIED, "the VM's process %d ended", a->record.vmm.pid);
}

/*
 * If it died between the agent's look and the record RUN, or while that was written, it was not
 * started: the source has a copy that is as good. So has the destination of one that died before
 * its source, which undoes, let it run on.
 */
enum handover_event attempt_judge_death(struct attempt *a)
{
    if (handover_takes(&a->machine, HANDOVER_EV_DIED_STANDING) && a->stands)
        return HANDOVER_EV_DIED_STANDING;
    if (a->cont_sent || a->machine.state != HANDOVER_DST_STARTING)
        return HANDOVER_EV_VM_GONE;
    attempt_blame_death(a);
    return HANDOVER_EV_RESUME_FAILED;
}

/*
 * What the VMM does now; -1 while it does not say. A connection that ended is made anew for the
 * next try.
 */
static int ask_status(struct attempt *a, struct guest_status *ret_status)
{
    cleanup_error struct vm_error *err = NULL;
    if (!a->guest)
        a->role->reconnect(a);
    if (!a->guest)
        return -1;
    if (guest_status(a->guest, ret_status, &err) == 0)
        return 0;
    log_warn("the VMM does not say what it does", "error=%s", log_q(error_message(err)));
    if (err->kind != VM_ERROR_TIMEOUT && err->kind != VM_ERROR_REFUSED &&
        process_alive(&a->record.vmm))
        a->role->reconnect(a);
    return -1;
}

static int send_cont(struct attempt *a, struct vm_error **err)
{
    a->cont_sent = true;
    a->stands = false;
    return guest_resume(a->guest, err);
}

/* False: the agent stops. */
static bool wait_for_next_try(struct attempt *a, unsigned tries)
{
    int64_t due = clock_mono_ns() +
                  PATIENCE(tries < RESUME_TRIES ? RESUME_RETRY_MS : ATTEMPT_TIMER_MS);
    SCOPE_LOCK(&a->lock);
    while (!a->stop && cond_wait_until(&a->changed, &a->lock, due))
        ;
    return !a->stop;
}

/*
 * A guest that is to stand is its VMM's again. A VMM that did not take it is told again, a few
 * times; if it does not take it then, it stands all the same. False: the agent stops, and the next
 * one tells it.
 */
static bool give_back(struct attempt *a)
{
    for (unsigned tries = 1; process_alive(&a->record.vmm); tries++) {
        cleanup_error struct vm_error *err = NULL;
        if (!a->guest)
            a->role->reconnect(a);
        if (a->guest && guest_release(a->guest, &err) == 0)
            return true;
        log_warn("the VMM does not take its guest back", "tries=%u error=%s", tries,
                 log_q(a->guest ? error_message(err) : "it cannot be reached"));
        if (tries == RESUME_TRIES)
            return true;
        if (!wait_for_next_try(a, tries))
            return false;
    }
    return true;
}

/* One try: an event, or TIMER while nobody can tell. */
static enum handover_event try_resume(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    struct guest_status status;
    bool stood = a->stands, may_have_run = a->cont_sent || a->machine.state != HANDOVER_DST_STARTING;
    if (!process_alive(&a->record.vmm))
        return attempt_judge_death(a);
    /* A VMM that does not answer any more runs its guest on: there is nothing to ask for. */
    if (!a->was_running && !give_back(a))
        return HANDOVER_EV_TIMER;
    if (!a->was_running || a->role->never_paused(a))
        return HANDOVER_EV_RESUMED;
    if (ask_status(a, &status) < 0)
        return HANDOVER_EV_TIMER;
    if (status.state == GUEST_RUNNING) {
        a->cont_sent = true; /* by whomever */
        a->stands = false;
        return HANDOVER_EV_RESUMED;
    }
    if (FAULT("attempt.resume") == FAULT_ERROR) {
        error_set(&err, VM_ERROR_REFUSED, "attempt.resume: %s", strerror(fault_errno()));
    } else if (send_cont(a, &err) == 0 && FAULT("attempt.resumed") != FAULT_ERROR) {
        cleanup_error struct vm_error *quiet = NULL;
        if (guest_announce(a->guest, &quiet) < 0)
            log_warn("cannot announce the guest", "error=%s", log_q(error_message(quiet)));
        return HANDOVER_EV_RESUMED;
    }
    if (!err)
        error_set(&err, VM_ERROR_TIMEOUT, "attempt.resumed: %s", strerror(fault_errno()));
    log_error("cannot start the guest", "error=%s", log_q(error_message(err)));
    if (err->kind != VM_ERROR_REFUSED) {
        a->resume_unsure = true;
        return HANDOVER_EV_TIMER;
    }
    /* It ended of itself, here: for this there is nothing to be asked again. */
    if (status.state == GUEST_BROKEN && may_have_run)
        return HANDOVER_EV_RESUMED;
    /* After an answer was lost, a later refusal proves nothing: a vCPU may have run in between. */
    if (a->resume_unsure)
        return HANDOVER_EV_RESUME_UNSURE;
    a->stands = stood;
    SCOPE_LOCK(&a->lock);
    if (!a->reason)
        a->reason = steal_ptr(&err);
    return HANDOVER_EV_RESUME_FAILED;
}

/*
 * The next try, within the action: while an answer may only be late, and for as long as the VMM's
 * death would mean that no vCPU started.
 */
static bool is_worth_a_wait(const struct attempt *a, unsigned tries)
{
    if (!a->cont_sent)
        return a->machine.state == HANDOVER_DST_STARTING;
    return tries < RESUME_TRIES;
}

static int64_t resumed_at_ns(const struct attempt *a)
{
    int64_t now = clock_mono_ns(), said = a->guest ? guest_resumed_at_ns(a->guest) : 0;
    return said > a->commit_at_ns && said < now ? said : now;
}

/* What cannot be told is left to the machine, which asks for another start, and hears what else happens. */
bool attempt_resume_vm(struct attempt *a, enum handover_event *ret_event)
{
    enum handover_event event = try_resume(a);
    for (unsigned tries = 1; event == HANDOVER_EV_TIMER && is_worth_a_wait(a, tries); tries++) {
        if (!wait_for_next_try(a, tries))
            return false;
        event = try_resume(a);
    }
    if (event == HANDOVER_EV_RESUMED && a->commit_at_ns)
        a->resume_took_ns = resumed_at_ns(a) - a->commit_at_ns;
    *ret_event = event == HANDOVER_EV_TIMER ? HANDOVER_EV_RESUME_UNSURE : event;
    return true;
}

/*
 * The guest stands and will not run here (again): let the VMM clear up after itself, if it does so
 * at once.
 */
static void quit_vmm(struct attempt *a)
{
    int64_t deadline = clock_mono_ns() + PATIENCE(QUIT_TIMEOUT_MS);
    if (!a->guest)
        a->role->reconnect(a);
    if (!a->guest || guest_quit(a->guest, NULL) < 0)
        return;
    while (process_alive(&a->record.vmm) && clock_mono_ns() < deadline)
        usleep(1000);
}

bool attempt_kill_vm(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    a->role->stop_transfer(a);
    if (FAULT("attempt.kill") == FAULT_ERROR)
        return false;
    if (process_alive(&a->record.vmm))
        quit_vmm(a);
    if (a->record.vmm.pid && process_kill(&a->record.vmm, ATTEMPT_KILL_TIMEOUT_MS, &err) < 0) {
        log_error("cannot end the VMM", "pid=%d error=%s", a->record.vmm.pid,
                  log_q(error_message(err)));
        return false;
    }
    (void)FAULT("attempt.killed");
    return true;
}
