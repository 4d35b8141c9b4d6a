/* SPDX-License-Identifier: Apache-2.0 */
/* What an attempt leaves on the disk for the agent that is started next. */
#include "agent/attempt.h"

#include "base/log.h"

#include <string.h>

int attempt_remember(struct attempt *a, enum vm_driver driver, const char *socket_path,
                     char *const *argv, const char *peer_address, struct vm_error **err)
{
    Vmmig__Peer__Memory memory = VMMIG__PEER__MEMORY__INIT;
    memory.was_running = a->was_running;
    memory.driver = driver;
    memory.socket_path = (char *)(uintptr_t)(socket_path ? socket_path : "");
    memory.peer_address = (char *)(uintptr_t)(peer_address ? peer_address : "");
    memory.argv = (char **)(uintptr_t)argv;
    while (argv && argv[memory.n_argv])
        memory.n_argv++;
    cleanup_buffer struct buffer out = {.limit = JOURNAL_BLOB_MAX};
    peer_pack(&memory.base, &out);
    if (out.failed)
        return error_set(err, VM_ERROR_REFUSED, "the VM's command line is too long to remember");
    if (a->record.blob && a->record.blob_len == out.len &&
        !memcmp(a->record.blob, out.data, out.len))
        return 0;
    free(a->record.blob);
    a->record.blob = steal_ptr(&out.data);
    a->record.blob_len = out.len;
    a->blob_changed = true;
    return 0;
}

Vmmig__Peer__Memory *attempt_memory(const struct journal_record *record)
{
    return vmmig__peer__memory__unpack(NULL, record->blob_len, record->blob);
}

/* As the journal has stamped it; 0: it does not say. */
static int64_t started_ns_of(struct journal *journal, const struct uuid *attempt)
{
    struct journal_record r;
    if (journal_get(journal, attempt, &r, NULL) < 0)
        return 0;
    journal_record_finish(&r);
    return r.started_ns;
}

static int write_record(struct attempt *a, enum handover_record record, struct vm_error **err)
{
    struct journal *journal = a->transfer->journal;
    cleanup_error struct vm_error *damage = NULL;
    /* A record that may still be needed to recover carries the blob; a settled one need not. */
    bool settled = handover_record_is_settled(record);
    if (a->recorded && (settled || !a->blob_changed)) {
        if (journal_advance(journal, &a->id, record, &a->record.vmm, &damage) == 0)
            return 0;
        if (damage->kind != VM_ERROR_CORRUPT || !(settled || a->record.blob))
            return error_propagate(err, steal_ptr(&damage));
        log_error("what the disk made of a record is written anew", "attempt=%s error=%s",
                  uuid_text(&a->id), log_q(error_message(damage)));
    }
    a->record.record = record;
    if ((a->recorded ? journal_mend : journal_put)(journal, &a->record, err) < 0)
        return -1;
    a->blob_changed = false;
    if (!a->recorded) {
        int64_t started_ns = started_ns_of(journal, &a->id);
        SCOPE_LOCK(&a->lock);
        a->record.started_ns = started_ns;
    }
    a->recorded = true;
    return 0;
}

/* Fault points around every record: "handover.before.COMMIT", "handover.after.COMMIT" ... */
static enum fault_result fault_before(enum handover_record record)
{
    switch ((int)record) {
#define X(id, ...)                                                                                 \
    case HANDOVER_REC_##id:                                                                        \
        return FAULT("handover.before." #id);
        HANDOVER_RECORDS(X)
#undef X
    }
    return FAULT_NONE;
}

static void fault_after(enum handover_record record)
{
    switch ((int)record) {
#define X(id, ...)                                                                                 \
    case HANDOVER_REC_##id:                                                                        \
        (void)FAULT("handover.after." #id);                                                        \
        break;
        HANDOVER_RECORDS(X)
#undef X
    }
}

/* Nobody can tell whether it is on the disk: the next start of the agent reads what is. */
static void end_if_in_doubt(const struct vm_error *err)
{
    if (err->kind == VM_ERROR_IN_DOUBT)
        _exit(error_kind_status(VM_ERROR_IN_DOUBT));
}

int attempt_write_again(struct attempt *a, struct vm_error **err)
{
    struct vm_error *failed = NULL;
    if (write_record(a, a->record.record, &failed) == 0)
        return 0;
    end_if_in_doubt(failed);
    return error_propagate(err, failed);
}

enum handover_event attempt_journal(struct attempt *a, enum handover_record record)
{
    struct vm_error *err = NULL;
    a->is_unfit = false;
    if (fault_before(record) == FAULT_ERROR) {
        error_errno(&err, fault_errno(), "the record %s", handover_record_name(record));
    } else if (a->role->before_record(a, record, &err) < 0) {
        a->is_unfit = true;
    } else if (write_record(a, record, &err) == 0) {
        fault_after(record);
        log_info("journalled", "attempt=%s record=%s", uuid_text(&a->id),
                 handover_record_name(record));
        return HANDOVER_EV_JOURNALED;
    }
    log_error("not journalled", "attempt=%s record=%s error=%s", uuid_text(&a->id),
              handover_record_name(record), log_q(error_message(err)));
    end_if_in_doubt(err);
    pthread_mutex_lock(&a->lock);
    if (a->reason)
        error_free(err);
    else
        a->reason = err;
    pthread_mutex_unlock(&a->lock);
    return HANDOVER_EV_JOURNAL_FAILED;
}
