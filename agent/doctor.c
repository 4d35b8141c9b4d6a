/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/doctor.h"

#include "agent/attempt.h"
#include "agent/snapshots.h"
#include "agent/transfer.h"
#include "base/clock.h"

#include <string.h>

enum { WHY_MAX = 1024 };

#define ASK_TIMEOUT_NS (2 * NSEC_PER_SEC)

struct finding {
    Vmmig__Control__Finding message;
    char vm[VM_NAME_MAX + 1];
    char peer[JOURNAL_PEER_MAX + 1];
    char peer_host[ENDPOINT_TEXT_MAX + 1];
    char why[WHY_MAX], advice[WHY_MAX];
    struct uuid attempt;
    bool unsettled;     /* a hand-over of it is under way */
    bool damaged;
    struct process_identity vmm; /* of the record */
    enum handover_record record;
};

enum owner { UNKNOWN, HERE, PEER, UNDECIDED, NOBODY };

/*
 * What a record says about the owner. X(record, owner while its VMM lives, once it is dead, why
 * while it lives, why once it is dead)
 */
#define VERDICTS(X)                                                                                \
    X(SENDING, HERE, UNDECIDED,                                                                    \
      "it is being sent and is not committed: until then it is owned here",                        \
      "its VMM died while it was being sent: the peer owns it if it had loaded all of it")         \
    X(ABORTING, HERE, NOBODY, "the hand-over was undone: it is being started here again",          \
      "the hand-over was undone, and its VMM here is gone")                                        \
    X(ABORTED, HERE, NOBODY, "the hand-over was undone; the peer has not confirmed it yet",        \
      "the hand-over was undone, or an operator gave it up, and its VMM here is gone")             \
    X(COMMIT, UNDECIDED, UNDECIDED,                                                                \
      "committed: the peer owns it once it has recorded RUN, and this host again if it says "      \
      "NEVER",                                                                                     \
      "committed, and the VMM here is gone: the peer has the only copy")                           \
    X(DONE, PEER, PEER,                                                                            \
      "the peer confirmed that it started it, or an operator gave up the copy here",               \
      "the peer confirmed that it started it, or an operator gave up the copy here")               \
    X(SRC_CLOSED, HERE, NOBODY, "the hand-over is over, and it stayed here",                       \
      "the hand-over is over, it did not move, and its VMM here is gone")                          \
    X(PREPARING, PEER, PEER, "it is being received: until it is committed the source owns it",     \
      "it was being received and is being discarded: the source owns it")                          \
    X(LOADED, UNDECIDED, PEER, "loaded completely: the source is to commit it or to undo",         \
      "it was loaded, but never started, and its VMM is gone: the source owns it")                 \
    X(RUN, HERE, NOBODY, "recorded RUN, the point of no return: it is being started here",         \
      "it was started here, and its VMM is gone")                                                  \
    X(RUNNING, HERE, NOBODY, "received and started here; the source has not confirmed it yet",     \
      "it was received and started here, and ended here")                                          \
    X(ENDED, NOBODY, NOBODY, "it was received and started here, and ended here",                   \
      "it was received and started here, and ended here")                                          \
    X(REVOKED, PEER, PEER, "it could not be started here: the source gets it back",                \
      "it could not be started here: the source gets it back")                                     \
    X(NEVER, PEER, PEER, "it never ran here: the source owns it",                                  \
      "it never ran here: the source owns it")                                                     \
    X(DST_CLOSED, HERE, UNKNOWN, "received and started here, which the source knows",              \
      "a hand-over from the peer is finished, and it is not here")

static const struct {
    enum owner alive, dead;
    const char *why_alive, *why_dead;
} verdicts[HANDOVER_REC_COUNT] = {
#define X(id, alive, dead, why_alive, why_dead)                                                    \
    [HANDOVER_REC_##id] = {alive, dead, why_alive, why_dead},
    VERDICTS(X)
#undef X
};

static char *word(const char *text)
{
    return (char *)(uintptr_t)text;
}

static void finding_free(struct finding *f)
{
    free(f);
}
DEFINE_CLEANUP(finding, struct finding *, finding_free)

static struct finding *new_finding(const char *vm, struct vm_error **err)
{
    struct finding *f = calloc(1, sizeof(*f));
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    vmmig__control__finding__init(&f->message);
    snprintf(f->vm, sizeof(f->vm), "%s", vm);
    f->message.vm = f->vm;
    f->message.why = f->why;
    f->message.advice = f->advice;
    f->message.peer = f->peer;
    return f;
}

static void set_owner(struct finding *f, const struct agent *agent, enum owner owner)
{
    f->message.owner = (Vmmig__Control__Owner)owner;
    f->message.host = owner == HERE ? word(agent->config->host) : owner == PEER ? f->peer_host
                                                                                : word("");
}

/* The host of a peer, without the port. */
static void set_peer(struct finding *f, const char *peer)
{
    struct endpoint e;
    snprintf(f->peer, sizeof(f->peer), "%s", peer);
    field_make_text(f->peer, sizeof(f->peer) - 1);
    if (endpoint_parse(f->peer, DEFAULT_PEER_PORT, &e, NULL) == 0)
        snprintf(f->peer_host, sizeof(f->peer_host), "%s", e.host);
    else
        snprintf(f->peer_host, sizeof(f->peer_host), "%s", f->peer);
}

/* What an operator can decide, as far as it means something to the hand-over; what `here` takes. */
static void advise(struct finding *f)
{
    struct handover h;
    const char *peer = f->peer_host, *vm = f->vm;
    handover_recover(&h, f->record, f->message.vmm_runs);
    if (!handover_is_in_doubt(&h) || !f->unsettled)
        return;
    if (!handover_takes(&h, HANDOVER_EV_RESOLVE_HERE))
        snprintf(f->advice, sizeof(f->advice),
                 "bring %s back: if there is a copy, it is there. If that host is lost, so is the "
                 "VM: `vmmig resolve %s --gone`",
                 peer, vm);
    else
        snprintf(f->advice, sizeof(f->advice),
                 "%s%s back: it resolves itself. If that host never comes back, fence it, then "
                 "`vmmig resolve %s --here --i-fenced %s`",
                 h.state == HANDOVER_SRC_REVERTING
                     ? "see that the journal here can be written, or bring "
                     : "bring ",
                 peer, vm, peer);
}

/* What the record of an attempt says. */
static void judge_record(struct finding *f, const struct agent *agent,
                         const struct journal_record *r)
{
    Vmmig__Control__Finding *m = &f->message;
    f->attempt = r->attempt;
    f->record = r->record;
    f->vmm = r->vmm;
    f->unsettled = !handover_record_is_settled(r->record);
    m->attempt = (ProtobufCBinaryData){sizeof(f->attempt.bytes), f->attempt.bytes};
    m->role = word(handover_record_role(r->record) == HANDOVER_SOURCE ? "source" : "destination");
    m->record = word(handover_record_name(r->record));
    m->changed_ns = r->changed_ns;
    m->pid = r->vmm.pid;
    m->vmm_runs = r->vmm.pid && process_alive(&r->vmm);
    set_peer(f, r->peer);
    bool alive = m->vmm_runs;
    set_owner(f, agent, alive ? verdicts[r->record].alive : verdicts[r->record].dead);
    strcpy(f->why, alive ? verdicts[r->record].why_alive : verdicts[r->record].why_dead);
    advise(f);
}

struct walk {
    struct agent *agent;
    const char *only; /* a name; "": all */
    struct diagnosis *d;
    bool damaged; /* a record of the journal is */
};

/* A new finding in the list: *ret is NULL when that is full. */
static int add_finding(struct diagnosis *d, const char *vm, struct finding **ret,
                       struct vm_error **err)
{
    *ret = NULL;
    if (d->n == CONTROL_FINDINGS_MAX)
        return 0;
    struct finding **grown = realloc(d->list, (d->n + 1) * sizeof(*grown));
    if (!grown)
        return error_nomem(err);
    d->list = grown;
    CLEANUP(finding) struct finding *f = new_finding(vm, err);
    if (!f)
        return -1;
    *ret = d->list[d->n++] = steal_ptr(&f);
    return 0;
}

static struct finding *find_vm(const struct diagnosis *d, const char *vm)
{
    for (size_t i = 0; i < d->n; i++)
        if (!d->list[i]->damaged && !strcmp(d->list[i]->vm, vm))
            return d->list[i];
    return NULL;
}

static int add_damaged(struct walk *w, const struct journal_record *record,
                       const struct vm_error *damage, struct vm_error **err)
{
    struct finding *f;
    if (add_finding(w->d, "", &f, err) < 0)
        return -1;
    if (!f)
        return 0;
    f->damaged = true;
    f->attempt = record->attempt;
    f->message.attempt = (ProtobufCBinaryData){sizeof(f->attempt.bytes), f->attempt.bytes};
    snprintf(f->why, sizeof(f->why), "%.400s", error_message(damage));
    field_make_text(f->why, sizeof(f->why) - 1);
    strcpy(f->advice, "ask the doctor of the other hosts about their VMs; the agent leaves this "
                      "record, and the VM that it was about, alone, and answers no question about "
                      "it. `vmmig resolve` of that VM decides");
    return 0;
}

/*
 * Attempts come oldest first: a later one of the same VM takes the place of an earlier one that is settled, also where
 * that one's last word was written later: that a VM ended here which a later attempt had sent away.
 */
static int visit(const struct journal_record *record, const struct vm_error *damage, void *arg,
                 struct vm_error **err)
{
    struct walk *w = arg;
    w->damaged |= damage != NULL;
    if (damage)
        return *w->only ? 0 : add_damaged(w, record, damage, err);
    if (*w->only && strcmp(w->only, record->vm))
        return 0;
    struct finding *f = find_vm(w->d, record->vm);
    if (f && f->unsettled)
        return 0;
    if (!f && add_finding(w->d, record->vm, &f, err) < 0)
        return -1;
    if (!f)
        return 0;
    judge_record(f, w->agent, record);
    return 0;
}

/* Of the attempt of which the finding speaks. */
static const char *state_of(struct agent *agent, const struct finding *f)
{
    CLEANUP(attempt)
    struct attempt *a = f->message.attempt.len ? attempt_find(agent->transfer, &f->attempt) : NULL;
    if (!a)
        return "";
    SCOPE_LOCK(&a->lock);
    return handover_state_name(a->state);
}

/*
 * A VM that stands, while a record of the journal is damaged, may have been sent, and run at the
 * peer: only there, and by an operator, can that be known.
 */
static bool may_have_been_sent(struct finding *f, struct vm *vm)
{
    struct guest_status status;
    int64_t deadline = clock_mono_ns() + ASK_TIMEOUT_NS;
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    bool asked = guest && vm_status(vm, deadline, &status, NULL) == 0;
    if (asked && status.state == GUEST_RUNNING)
        return false;
    snprintf(f->why, sizeof(f->why),
             "it %s here, and a record of the journal is damaged, which may be of its hand-over",
             asked ? "stands" : "does not answer");
    snprintf(f->advice, sizeof(f->advice),
             "ask the doctor of the host to which it was sent, if it was. If it runs there: `vmmig "
             "resolve %s --gone`. If it does not run anywhere, fence that host, then `vmmig "
             "resolve %s --here --i-fenced HOST`",
             f->vm, f->vm);
    return true;
}

/* The registry's own VM, which no hand-over is about, or one that is settled. */
static void judge_vm(struct finding *f, const struct walk *w, struct vm *vm)
{
    const struct agent *agent = w->agent;
    const struct vm_definition *d = vm_definition(vm);
    Vmmig__Control__Finding *m = &f->message;
    char detail[VM_DETAIL_MAX];
    bool same = m->attempt.len && process_identity_equal(&f->vmm, &d->process);
    m->pid = d->process.pid;
    m->vmm_runs = process_alive(&d->process);
    if (m->vmm_runs && w->damaged && may_have_been_sent(f, vm)) {
        set_owner(f, agent, UNDECIDED);
        return;
    }
    if (same)
        return; /* the record's own words */
    if (m->vmm_runs) {
        set_owner(f, agent, HERE);
        strcpy(f->why, d->origin == VM_ORIGIN_RUN        ? "it was started here"
                       : d->origin == VM_ORIGIN_ATTACHED ? "it was attached here"
                       : d->origin == VM_ORIGIN_RESTORED ? "it was restored here"
                                                         : "it was received and started here");
    } else {
        set_owner(f, agent, NOBODY);
        snprintf(f->why, sizeof(f->why), "it ended here: %s", vm_detail(vm, detail));
        field_make_text(f->why, sizeof(f->why) - 1);
    }
    f->advice[0] = 0;
}

/* A guest that hangs since a snapshot, or is being snapshotted at this instant. */
static void mention_frozen(struct finding *f, const struct agent *agent, const struct vm_definition *d)
{
    if (!f->message.vmm_runs || !snapshots_is_frozen(agent->config, &d->process))
        return;
    size_t n = strlen(f->why);
    snprintf(f->why + n, sizeof(f->why) - n,
             "; its file systems are frozen for a snapshot, and have not been thawed yet");
    if (!*f->advice)
        snprintf(f->advice, sizeof(f->advice),
                 "if this stays so, see why its agent (qemu-ga) does not answer: it is asked again "
                 "and again to thaw them");
}

/* Somebody set it going behind the hand-over's back. */
static void mention_woken(struct finding *f, const struct agent *agent)
{
    CLEANUP(attempt)
    struct attempt *a = f->unsettled ? attempt_find(agent->transfer, &f->attempt) : NULL;
    if (!a || a->role != &attempt_source_role || !a->source.woken)
        return;
    size_t n = strlen(f->why);
    snprintf(f->why + n, sizeof(f->why) - n,
             "; somebody set it going here meanwhile, and the agent stopped it: what it wrote then is on its "
             "disks, and the peer's copy does not know of it");
}

static int add_registered(struct walk *w, struct vm *vm, struct vm_error **err)
{
    const char *name = vm_definition(vm)->name;
    if (*w->only && strcmp(w->only, name))
        return 0;
    struct finding *f = find_vm(w->d, name);
    if (!f && add_finding(w->d, name, &f, err) < 0)
        return -1;
    if (f && !f->unsettled)
        judge_vm(f, w, vm);
    if (f)
        mention_frozen(f, w->agent, vm_definition(vm));
    return 0;
}

static int by_name(const void *a, const void *b)
{
    const struct finding *x = *(struct finding *const *)a, *y = *(struct finding *const *)b;
    return strcmp(x->vm, y->vm);
}

static int collect(struct walk *w, struct vm_error **err)
{
    struct vm **vms;
    unsigned n;
    if (journal_each(w->agent->transfer->journal, visit, w, err) < 0 ||
        vms_list(w->agent->vms, &vms, &n, err) < 0)
        return -1;
    int r = 0;
    for (unsigned i = 0; i < n; i++) {
        if (r == 0)
            r = add_registered(w, vms[i], err);
        vm_put(vms[i]);
    }
    free(vms);
    return r;
}

int doctor_examine(struct agent *agent, const char *vm, struct diagnosis *ret_diagnosis,
                   struct vm_error **err)
{
    cleanup_diagnosis struct diagnosis d = {0};
    struct walk w = {.agent = agent, .only = vm, .d = &d};
    if (collect(&w, err) < 0)
        return -1;
    if (*vm && !d.n)
        return error_set(err, VM_ERROR_NOT_FOUND,
                         "there is no VM named %s here, and none in the journal", vm);
    if (d.n)
        qsort(d.list, d.n, sizeof(*d.list), by_name);
    vmmig__control__diagnosis__init(&d.message);
    int64_t end;
    d.message.host = word(agent->config->host);
    transfer_complain(agent->transfer, d.certificate, &end);
    d.message.findings = calloc(d.n + 1, sizeof(*d.message.findings));
    if (!d.message.findings)
        return error_nomem(err);
    for (size_t i = 0; i < d.n; i++) {
        mention_woken(d.list[i], agent);
        if (!d.list[i]->damaged)
            d.list[i]->message.state = word(state_of(agent, d.list[i]));
        d.message.findings[i] = &d.list[i]->message;
    }
    d.message.n_findings = d.n;
    *ret_diagnosis = d;
    ret_diagnosis->message.certificate = ret_diagnosis->certificate;
    d = (struct diagnosis){0};
    return 0;
}

void diagnosis_finish(struct diagnosis *d)
{
    for (size_t i = 0; i < d->n; i++)
        finding_free(d->list[i]);
    free(d->list);
    free(d->message.findings);
    *d = (struct diagnosis){0};
}
