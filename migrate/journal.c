/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/journal.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <pthread.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <xxhash.h>

#define RECORD_MAGIC 0x314a4d56u /* "VMJ1", which also fixes the layout of a record */
#define RECORD_SIZE_MAX 512
#define FORMAT_VERSION 1
#define FORMAT_KEY "format"
#define SMALL_CHANGE 64 /* bytes by which a blob may grow without asking: flags */
#define RESERVE_PAGES 256 /* what changes of existing records may need at once, and plenty more */

struct journal {
    MDB_env *env;
    MDB_dbi records; /* attempt -> record */
    MDB_dbi blobs;   /* attempt -> blob, of unsettled attempts */
    int lock_fd;
    pthread_mutex_t mutex; /* one transaction at a time, of either kind */
    bool broken;           /* nobody knows what is on the disk */
    int64_t newest_ns;     /* the newest stamp that was given */
};

static int error_mdb(struct vm_error **err, int rc, const char *what)
{
    if (rc > 0)
        return error_errno(err, rc, "journal: cannot %s", what);
    enum vm_error_kind kind = rc == MDB_MAP_FULL           ? VM_ERROR_NO_SPACE
                              : rc == MDB_NOTFOUND         ? VM_ERROR_NOT_FOUND
                              : rc == MDB_VERSION_MISMATCH ? VM_ERROR_VERSION
                                                           : VM_ERROR_CORRUPT;
    return error_set(err, kind, "journal: cannot %s: %s", what, mdb_strerror(rc));
}

static int error_broken(struct vm_error **err)
{
    return error_set(err, VM_ERROR_IN_DOUBT,
                     "journal: its last write failed half-way, the agent must restart to read it");
}

/* ---- Records as bytes ---- */

static bool text_is_clean(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            return false;
    }
    return true;
}

static int check_record(const struct journal_record *r, struct vm_error **err)
{
    size_t vm = strnlen(r->vm, sizeof(r->vm));
    size_t peer = strnlen(r->peer, sizeof(r->peer));
    if (!handover_record_is_valid(r->record))
        return error_set(err, VM_ERROR_USAGE, "journal: no record has the number %d", r->record);
    if (vm == 0 || vm > JOURNAL_VM_NAME_MAX || !text_is_clean(r->vm, vm))
        return error_set(err, VM_ERROR_USAGE, "journal: the VM's name is empty, long or malformed");
    if (peer > JOURNAL_PEER_MAX || !text_is_clean(r->peer, peer))
        return error_set(err, VM_ERROR_USAGE, "journal: the peer's name is long or malformed");
    if (r->blob_len > JOURNAL_BLOB_MAX || (r->blob_len && !r->blob))
        return error_set(err, VM_ERROR_USAGE, "journal: %zu bytes of memory are too many",
                         r->blob_len);
    if (r->vmm.pid < 0 || uuid_is_nil(&r->attempt))
        return error_set(err, VM_ERROR_USAGE, "journal: the attempt or its VMM is not named");
    return 0;
}

static void put_text(struct buffer *b, const char *text)
{
    size_t len = strlen(text);
    buffer_put_u8(b, (uint8_t)len);
    buffer_put(b, text, len);
}

static int encode_record(struct buffer *b, const struct journal_record *r, uint64_t blob_hash,
                         struct vm_error **err)
{
    buffer_put_le32(b, RECORD_MAGIC);
    buffer_put_u8(b, (uint8_t)r->record);
    buffer_put(b, r->attempt.bytes, sizeof(r->attempt.bytes));
    buffer_put(b, r->vmm.boot.bytes, sizeof(r->vmm.boot.bytes));
    buffer_put_le32(b, (uint32_t)r->vmm.pid);
    buffer_put_le64(b, r->vmm.start);
    buffer_put_le64(b, (uint64_t)r->started_ns);
    buffer_put_le64(b, (uint64_t)r->changed_ns);
    put_text(b, r->vm);
    put_text(b, r->peer);
    buffer_put_le32(b, (uint32_t)r->blob_len);
    buffer_put_le64(b, blob_hash);
    if (b->failed)
        return error_nomem(err);
    buffer_put_le64(b, XXH3_64bits(b->data, b->len));
    return b->failed ? error_nomem(err) : 0;
}

static bool take_bytes(struct cursor *c, void *out, size_t n)
{
    const uint8_t *p = cursor_take(c, n);
    if (p)
        memcpy(out, p, n);
    return p != NULL;
}

/* A text of at most max bytes (out has one more) without control characters. */
static bool take_text(struct cursor *c, char *out, size_t max)
{
    size_t len = cursor_u8(c);
    if (len > max || !take_bytes(c, out, len) || !text_is_clean(out, len))
        return false;
    out[len] = '\0';
    return true;
}

static int error_damaged(struct vm_error **err, const struct uuid *attempt, const char *what)
{
    return error_set(err, VM_ERROR_CORRUPT, "journal: the record of attempt %s is damaged: %s",
                     uuid_text(attempt), what);
}

/* Decode without the blob: its length and hash only. */
static int decode_record(const struct uuid *attempt, const MDB_val *value,
                         struct journal_record *ret, uint64_t *ret_blob_hash, struct vm_error **err)
{
    struct journal_record r = {0};
    if (value->mv_size < 8 || value->mv_size > RECORD_SIZE_MAX)
        return error_damaged(err, attempt, "its size is impossible");
    size_t hashed = value->mv_size - 8;
    if (get_le64((const uint8_t *)value->mv_data + hashed) != XXH3_64bits(value->mv_data, hashed))
        return error_damaged(err, attempt, "its checksum does not match");
    struct cursor c = cursor_init(value->mv_data, hashed);
    if (cursor_le32(&c) != RECORD_MAGIC)
        return error_damaged(err, attempt, "it is not a record of this version");
    unsigned number = cursor_u8(&c);
    take_bytes(&c, r.attempt.bytes, sizeof(r.attempt.bytes));
    take_bytes(&c, r.vmm.boot.bytes, sizeof(r.vmm.boot.bytes));
    r.vmm.pid = (int32_t)cursor_le32(&c);
    r.vmm.start = cursor_le64(&c);
    r.started_ns = (int64_t)cursor_le64(&c);
    r.changed_ns = (int64_t)cursor_le64(&c);
    bool texts =
        take_text(&c, r.vm, JOURNAL_VM_NAME_MAX) && take_text(&c, r.peer, JOURNAL_PEER_MAX);
    r.blob_len = cursor_le32(&c);
    *ret_blob_hash = cursor_le64(&c);
    if (c.failed || cursor_left(&c) || !texts)
        return error_damaged(err, attempt, "its fields do not fit");
    if (!uuid_equal(&r.attempt, attempt))
        return error_damaged(err, attempt, "it names another attempt");
    if (!handover_record_is_valid(number) || r.vmm.pid < 0 || r.blob_len > JOURNAL_BLOB_MAX ||
        r.vm[0] == '\0')
        return error_damaged(err, attempt, "a field has an impossible value");
    r.record = (enum handover_record)number;
    *ret = r;
    return 0;
}

/* ---- Transactions; the mutex is held ---- */

static MDB_val key_of(const struct uuid *attempt)
{
    return (MDB_val){sizeof(attempt->bytes), (void *)(uintptr_t)attempt->bytes};
}

static int begin(struct journal *j, unsigned flags, MDB_txn **ret_txn, struct vm_error **err)
{
    if (j->broken)
        return error_broken(err);
    int rc = mdb_txn_begin(j->env, NULL, flags, ret_txn);
    return rc ? error_mdb(err, rc, "begin") : 0;
}

/*
 * A mistake for tests: what is committed next is not synced, so that a host that loses its power
 * has what is kept aside here. Who ends the host puts it in its place.
 */
static void keep_synced(struct journal *j)
{
    const char *path;
    int fd;
    char name[4096];
    mdb_env_get_path(j->env, &path);
    mdb_env_get_fd(j->env, &fd);
    snprintf(name, sizeof(name), "%s/data.mdb.synced", path);
    cleanup_close int copy = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    off_t from = 0;
    while (copy >= 0 && sendfile(copy, fd, &from, JOURNAL_MAP_SIZE) > 0)
        ;
}

/*
 * Commit and sync. LMDB fails a commit before it has written the page that names it, and then
 * nothing has happened; or while it writes that page, and then it refuses to go on (MDB_PANIC).
 */
static int commit(struct journal *j, MDB_txn *txn, struct vm_error **err)
{
    if (FAULT("mistake.journal-not-synced") == FAULT_MISTAKE)
        keep_synced(j);
    if (FAULT("journal.write") == FAULT_ERROR) {
        mdb_txn_abort(txn);
        return error_errno(err, fault_errno(), "journal: cannot write");
    }
    if (FAULT("journal.sync") == FAULT_ERROR) {
        mdb_txn_abort(txn);
        j->broken = true;
        return error_broken(err);
    }
    int rc = mdb_txn_commit(txn);
    if (rc) {
        MDB_txn *probe = NULL;
        if (mdb_txn_begin(j->env, NULL, 0, &probe) == MDB_PANIC) {
            j->broken = true;
            return error_broken(err);
        }
        if (probe)
            mdb_txn_abort(probe);
        return error_mdb(err, rc, "write");
    }
    (void)FAULT("journal.written");
    return 0;
}

static int find(struct journal *j, MDB_txn *txn, const struct uuid *attempt,
                struct journal_record *ret, uint64_t *ret_blob_hash, struct vm_error **err)
{
    MDB_val key = key_of(attempt), value;
    int rc = mdb_get(txn, j->records, &key, &value);
    if (rc == MDB_NOTFOUND)
        return error_set(err, VM_ERROR_NOT_FOUND, "journal: no attempt %s", uuid_text(attempt));
    if (rc)
        return error_mdb(err, rc, "read");
    return decode_record(attempt, &value, ret, ret_blob_hash, err);
}

/* Copy the blob of a record that was just found into it. */
static int load_blob(struct journal *j, MDB_txn *txn, struct journal_record *r, uint64_t hash,
                     struct vm_error **err)
{
    MDB_val key = key_of(&r->attempt), value;
    if (!r->blob_len)
        return 0;
    int rc = mdb_get(txn, j->blobs, &key, &value);
    if (rc && rc != MDB_NOTFOUND)
        return error_mdb(err, rc, "read");
    if (rc || value.mv_size != r->blob_len || XXH3_64bits(value.mv_data, value.mv_size) != hash)
        return error_damaged(err, &r->attempt, "what it must remember is missing or changed");
    r->blob = malloc(value.mv_size);
    if (!r->blob)
        return error_nomem(err);
    memcpy(r->blob, value.mv_data, value.mv_size);
    return 0;
}

static int put_encoded(struct journal *j, MDB_txn *txn, const struct journal_record *r,
                       uint64_t blob_hash, struct vm_error **err)
{
    cleanup_buffer struct buffer b = {.limit = RECORD_SIZE_MAX};
    if (encode_record(&b, r, blob_hash, err) < 0)
        return -1;
    if (FAULT("journal.record") == FAULT_CORRUPT)
        b.data[b.len / 2] ^= 1;
    MDB_val key = key_of(&r->attempt), value = {b.len, b.data};
    int rc = mdb_put(txn, j->records, &key, &value, 0);
    return rc ? error_mdb(err, rc, "write") : 0;
}

static int delete_key(MDB_txn *txn, MDB_dbi dbi, const struct uuid *attempt, struct vm_error **err)
{
    MDB_val key = key_of(attempt);
    int rc = mdb_del(txn, dbi, &key, NULL);
    return rc && rc != MDB_NOTFOUND ? error_mdb(err, rc, "forget") : 0;
}

/* ---- Room ---- */

/*
 * Pages that are free now: never used, or on LMDB's free list (database 0, lists of page numbers),
 * which only a read transaction may see.
 */
static int count_free_pages(struct journal *j, size_t *ret_pages, struct vm_error **err)
{
    MDB_envinfo info;
    MDB_stat stat;
    MDB_txn *txn;
    MDB_cursor *cursor;
    MDB_val key, value;
    mdb_env_info(j->env, &info);
    mdb_env_stat(j->env, &stat);
    size_t total = info.me_mapsize / stat.ms_psize;
    size_t pages = total > info.me_last_pgno ? total - info.me_last_pgno - 1 : 0;
    if (begin(j, MDB_RDONLY, &txn, err) < 0)
        return -1;
    int rc = mdb_cursor_open(txn, 0, &cursor);
    if (!rc) {
        while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0)
            pages += *(const size_t *)value.mv_data;
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    if (rc != MDB_NOTFOUND)
        return error_mdb(err, rc, "count free pages");
    *ret_pages = pages;
    return 0;
}

/* What a walk over the records learns, to keep their number bounded. */
struct census {
    size_t count, finished;
    struct uuid oldest_finished;
    int64_t oldest_changed_ns; /* of the finished ones */
    int64_t newest_ns;         /* of all */
};

static bool is_finished(enum handover_record record)
{
    return record == HANDOVER_REC_DONE || record == HANDOVER_REC_SRC_CLOSED ||
           record == HANDOVER_REC_DST_CLOSED;
}

static int take_census(struct journal *j, MDB_txn *txn, struct census *ret, struct vm_error **err)
{
    MDB_cursor *cursor;
    MDB_val key, value;
    *ret = (struct census){0};
    int rc = mdb_cursor_open(txn, j->records, &cursor);
    if (rc)
        return error_mdb(err, rc, "read");
    while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        struct journal_record r;
        struct uuid attempt = {{0}};
        uint64_t hash;
        ret->count++;
        if (key.mv_size != sizeof(attempt.bytes))
            continue;
        memcpy(attempt.bytes, key.mv_data, sizeof(attempt.bytes));
        /* A damaged record counts, and stays: only an operator may forget it. */
        if (decode_record(&attempt, &value, &r, &hash, NULL) < 0)
            continue;
        if (r.changed_ns > ret->newest_ns)
            ret->newest_ns = r.changed_ns;
        if (!is_finished(r.record))
            continue;
        if (!ret->finished++ || r.changed_ns < ret->oldest_changed_ns) {
            ret->oldest_finished = attempt;
            ret->oldest_changed_ns = r.changed_ns;
        }
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? 0 : error_mdb(err, rc, "read");
}

static int demand_room(struct journal *j, size_t bytes, struct vm_error **err)
{
    size_t pages = 0;
    MDB_stat stat;
    if (count_free_pages(j, &pages, err) < 0)
        return -1;
    mdb_env_stat(j->env, &stat);
    if (pages < RESERVE_PAGES + bytes / stat.ms_psize)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "journal: no room for another attempt; see `vmmig doctor`");
    return 0;
}

/* A new attempt is about to be written: forget old history, and see that there is room. */
static int admit(struct journal *j, MDB_txn *txn, size_t blob_len, struct vm_error **err)
{
    struct census census;
    if (take_census(j, txn, &census, err) < 0)
        return -1;
    if (census.finished > JOURNAL_HISTORY_MAX) {
        if (delete_key(txn, j->records, &census.oldest_finished, err) < 0)
            return -1;
        census.count--;
    }
    if (census.count >= JOURNAL_RECORDS_MAX)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "journal: %zu attempts are unfinished; see `vmmig doctor`", census.count);
    return demand_room(j, blob_len, err);
}

/* ---- The interface ---- */

static int64_t stamp(struct journal *j)
{
    int64_t now = clock_wall_ns();
    if (now > j->newest_ns)
        j->newest_ns = now;
    else if (j->newest_ns < INT64_MAX)
        j->newest_ns++;
    return j->newest_ns;
}

/* mend: what stands there now may be damaged. */
static int put_in(struct journal *j, MDB_txn *txn, const struct journal_record *record, bool mend,
                  struct vm_error **err)
{
    cleanup_error struct vm_error *missing = NULL;
    struct journal_record old, r = *record;
    uint64_t hash;
    if (find(j, txn, &r.attempt, &old, &hash, &missing) == 0) {
        if (handover_record_role(old.record) != handover_record_role(r.record))
            return error_set(err, VM_ERROR_CONFLICT,
                             "journal: attempt %s has its other end here, too",
                             uuid_text(&r.attempt));
        r.started_ns = old.started_ns;
        if (r.blob_len > old.blob_len + SMALL_CHANGE && demand_room(j, r.blob_len, err) < 0)
            return -1;
    } else if (missing->kind == VM_ERROR_NOT_FOUND) {
        if (admit(j, txn, r.blob_len, err) < 0)
            return -1;
    } else if (missing->kind != VM_ERROR_CORRUPT || !mend) {
        return error_propagate(err, steal_ptr(&missing));
    }
    r.changed_ns = stamp(j);
    if (!r.started_ns)
        r.started_ns = r.changed_ns;
    if (handover_record_is_settled(r.record))
        r.blob_len = 0;
    hash = r.blob_len ? XXH3_64bits(r.blob, r.blob_len) : 0;
    if (put_encoded(j, txn, &r, hash, err) < 0)
        return -1;
    if (!r.blob_len)
        return delete_key(txn, j->blobs, &r.attempt, err);
    MDB_val key = key_of(&r.attempt), value = {r.blob_len, r.blob};
    int rc = mdb_put(txn, j->blobs, &key, &value, 0);
    return rc ? error_mdb(err, rc, "write") : 0;
}

static int put(struct journal *j, const struct journal_record *record, bool mend,
               struct vm_error **err)
{
    SCOPE_LOCK(&j->mutex);
    MDB_txn *txn;
    if (check_record(record, err) < 0 || begin(j, 0, &txn, err) < 0)
        return -1;
    if (put_in(j, txn, record, mend, err) < 0) {
        mdb_txn_abort(txn);
        return -1;
    }
    return commit(j, txn, err);
}

int journal_put(struct journal *j, const struct journal_record *record, struct vm_error **err)
{
    return put(j, record, false, err);
}

int journal_mend(struct journal *j, const struct journal_record *record, struct vm_error **err)
{
    return put(j, record, true, err);
}

static int advance_in(struct journal *j, MDB_txn *txn, const struct uuid *attempt,
                      enum handover_record record, const struct process_identity *vmm,
                      struct vm_error **err)
{
    struct journal_record r;
    uint64_t hash;
    if (find(j, txn, attempt, &r, &hash, err) < 0)
        return -1;
    if (handover_record_role(r.record) != handover_record_role(record))
        return error_set(err, VM_ERROR_CONFLICT, "journal: attempt %s cannot become %s",
                         uuid_text(attempt), handover_record_name(record));
    if (handover_record_is_settled(record)) {
        if (delete_key(txn, j->blobs, attempt, err) < 0)
            return -1;
        r.blob_len = 0;
        hash = 0;
    }
    r.record = record;
    r.changed_ns = stamp(j);
    if (vmm && vmm->pid < 0)
        return error_set(err, VM_ERROR_USAGE, "journal: the VMM is not named");
    if (vmm)
        r.vmm = *vmm;
    return put_encoded(j, txn, &r, hash, err);
}

int journal_advance(struct journal *j, const struct uuid *attempt, enum handover_record record,
                    const struct process_identity *vmm, struct vm_error **err)
{
    SCOPE_LOCK(&j->mutex);
    MDB_txn *txn;
    if (!handover_record_is_valid(record))
        return error_set(err, VM_ERROR_USAGE, "journal: no record has the number %d", record);
    if (begin(j, 0, &txn, err) < 0)
        return -1;
    if (advance_in(j, txn, attempt, record, vmm, err) < 0) {
        mdb_txn_abort(txn);
        return -1;
    }
    return commit(j, txn, err);
}

int journal_get(struct journal *j, const struct uuid *attempt, struct journal_record *ret_record,
                struct vm_error **err)
{
    SCOPE_LOCK(&j->mutex);
    MDB_txn *txn;
    struct journal_record r;
    uint64_t hash;
    if (begin(j, MDB_RDONLY, &txn, err) < 0)
        return -1;
    int rc = find(j, txn, attempt, &r, &hash, err);
    if (rc == 0)
        rc = load_blob(j, txn, &r, hash, err);
    mdb_txn_abort(txn);
    if (rc == 0)
        *ret_record = r;
    return rc;
}

int journal_remove(struct journal *j, const struct uuid *attempt, struct vm_error **err)
{
    SCOPE_LOCK(&j->mutex);
    MDB_txn *txn;
    MDB_val key = key_of(attempt);
    if (begin(j, 0, &txn, err) < 0)
        return -1;
    int rc = mdb_del(txn, j->records, &key, NULL);
    if (rc) {
        mdb_txn_abort(txn);
        return rc == MDB_NOTFOUND ? error_set(err, VM_ERROR_NOT_FOUND, "journal: no attempt %s",
                                              uuid_text(attempt))
                                  : error_mdb(err, rc, "forget");
    }
    if (delete_key(txn, j->blobs, attempt, err) < 0) {
        mdb_txn_abort(txn);
        return -1;
    }
    return commit(j, txn, err);
}

struct listed {
    struct uuid attempt;
    int64_t started_ns;
};

static int compare_listed(const void *a, const void *b)
{
    const struct listed *x = a, *y = b;
    if (x->started_ns != y->started_ns)
        return x->started_ns < y->started_ns ? -1 : 1;
    return memcmp(x->attempt.bytes, y->attempt.bytes, sizeof(x->attempt.bytes));
}

/* The attempts by age, damaged ones first; *ret_list is the caller's. Returns how many, or -1. */
static ssize_t list_attempts(struct journal *j, struct listed **ret_list, struct vm_error **err)
{
    SCOPE_LOCK(&j->mutex);
    MDB_txn *txn;
    MDB_cursor *cursor = NULL;
    MDB_stat stat;
    MDB_val key, value;
    size_t n = 0;
    if (begin(j, MDB_RDONLY, &txn, err) < 0)
        return -1;
    int rc = mdb_stat(txn, j->records, &stat);
    /* The tree's own count is data from the disk, too. */
    size_t max =
        rc || stat.ms_entries > JOURNAL_RECORDS_MAX ? JOURNAL_RECORDS_MAX : stat.ms_entries;
    cleanup_free struct listed *list = calloc(max + 1, sizeof(*list));
    if (!rc)
        rc = list ? mdb_cursor_open(txn, j->records, &cursor) : ENOMEM;
    while (!rc && n < max && (rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        struct journal_record r;
        uint64_t hash;
        if (key.mv_size != sizeof(list[n].attempt.bytes))
            continue;
        memcpy(list[n].attempt.bytes, key.mv_data, key.mv_size);
        if (decode_record(&list[n].attempt, &value, &r, &hash, NULL) == 0)
            list[n].started_ns = r.started_ns;
        n++;
    }
    if (cursor)
        mdb_cursor_close(cursor);
    mdb_txn_abort(txn);
    if (rc && rc != MDB_NOTFOUND)
        return error_mdb(err, rc, "list");
    qsort(list, n, sizeof(*list), compare_listed);
    *ret_list = steal_ptr(&list);
    return (ssize_t)n;
}

int journal_each(struct journal *j, journal_visit *visit, void *arg, struct vm_error **err)
{
    cleanup_free struct listed *list = NULL;
    ssize_t n = list_attempts(j, &list, err);
    if (n < 0)
        return -1;
    for (ssize_t i = 0; i < n; i++) {
        cleanup_error struct vm_error *damage = NULL;
        struct journal_record r = {.attempt = list[i].attempt};
        if (journal_get(j, &list[i].attempt, &r, &damage) < 0) {
            if (damage->kind == VM_ERROR_NOT_FOUND)
                continue; /* the visitor removed it */
            if (damage->kind != VM_ERROR_CORRUPT)
                return error_propagate(err, steal_ptr(&damage));
        }
        int rc = visit(&r, damage, arg, err);
        journal_record_finish(&r);
        if (rc < 0)
            return -1;
    }
    return 0;
}

void journal_record_finish(struct journal_record *record)
{
    free(record->blob);
    record->blob = NULL;
    record->blob_len = 0;
}

/* ---- Opening ---- */

static int open_lock(const char *path, struct vm_error **err)
{
    char name[4096];
    if ((size_t)snprintf(name, sizeof(name), "%s/agent.lock", path) >= sizeof(name))
        return error_set(err, VM_ERROR_USAGE, "journal: the path %s is too long", path);
    cleanup_close int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, errno, "journal: cannot open %s", name);
    if (flock(fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK
                   ? error_set(err, VM_ERROR_CONFLICT, "another agent uses the journal %s", path)
                   : error_errno(err, errno, "journal: cannot lock %s", name);
    return steal_fd(&fd);
}

enum { ZEROS = 64 << 10 };

/* Writes up to ZEROS zeros over what is read as zeros. */
static int write_zeros(int fd, off_t at, size_t n)
{
    static const uint8_t zeros[ZEROS];
    uint8_t found[sizeof(zeros)];
    ssize_t r = pread(fd, found, n, at);
    if (r < 0)
        return errno;
    if ((size_t)r != n || memcmp(found, zeros, n) != 0)
        return 0; /* the file system's word was not true */
    r = pwrite(fd, zeros, n, at);
    return r < 0 ? errno : (size_t)r == n ? 0 : EIO;
}

/*
 * A block that was allocated and never written makes a commit wait for the file system's own journal, and so for what
 * others write to that disk at the time, while the guest stands. So the blocks that commits use first are written
 * once: with the zeros that are read from them anyway.
 */
static int write_holes(int fd)
{
    bool wrote = false;
    off_t at = 0, end;
    while ((at = lseek(fd, at, SEEK_HOLE)) >= 0 && at < JOURNAL_WRITTEN_SIZE) {
        end = lseek(fd, at, SEEK_DATA);
        if (end < 0 || end > JOURNAL_WRITTEN_SIZE)
            end = JOURNAL_WRITTEN_SIZE;
        for (off_t n; at < end; at += n) {
            n = end - at < ZEROS ? end - at : ZEROS;
            int rc = write_zeros(fd, at, (size_t)n);
            if (rc)
                return rc;
        }
        wrote = true;
    }
    return wrote && fsync(fd) < 0 ? errno : 0;
}

/* The file gets its final size, and blocks for all of it, now rather than in a hand-over. */
static int reserve_file(struct journal *j, struct vm_error **err)
{
    int fd;
    int rc = mdb_env_get_fd(j->env, &fd);
    if (!rc)
        rc = posix_fallocate(fd, 0, JOURNAL_MAP_SIZE);
    if (!rc)
        rc = write_holes(fd);
    return rc ? error_mdb(err, rc, "reserve its room on the disk") : 0;
}

/* A new file's name is on the disk, too. */
static int sync_folder(const char *path, struct vm_error **err)
{
    cleanup_close int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 || fsync(fd) < 0 ? error_errno(err, errno, "journal: cannot sync its folder") : 0;
}

static int open_databases(struct journal *j, struct vm_error **err)
{
    MDB_txn *txn;
    MDB_dbi meta;
    uint8_t version[4];
    if (begin(j, 0, &txn, err) < 0)
        return -1;
    int rc = mdb_dbi_open(txn, NULL, 0, &meta);
    if (!rc)
        rc = mdb_dbi_open(txn, "records", MDB_CREATE, &j->records);
    if (!rc)
        rc = mdb_dbi_open(txn, "blobs", MDB_CREATE, &j->blobs);
    if (rc) {
        mdb_txn_abort(txn);
        return error_mdb(err, rc, "open its tables");
    }
    MDB_val key = {strlen(FORMAT_KEY), (void *)(uintptr_t)FORMAT_KEY}, value;
    rc = mdb_get(txn, meta, &key, &value);
    if (rc == MDB_NOTFOUND) {
        put_le32(version, FORMAT_VERSION);
        value = (MDB_val){sizeof(version), version};
        rc = mdb_put(txn, meta, &key, &value, 0);
    } else if (!rc && (value.mv_size != 4 || get_le32(value.mv_data) != FORMAT_VERSION)) {
        mdb_txn_abort(txn);
        return error_set(err, VM_ERROR_VERSION,
                         "journal: its format is of another version of vmmig");
    }
    if (rc) {
        mdb_txn_abort(txn);
        return error_mdb(err, rc, "read its format");
    }
    return commit(j, txn, err);
}

static int learn_newest(struct journal *j, struct vm_error **err)
{
    struct census census;
    MDB_txn *txn;
    if (begin(j, MDB_RDONLY, &txn, err) < 0)
        return -1;
    int taken = take_census(j, txn, &census, err);
    mdb_txn_abort(txn);
    j->newest_ns = census.newest_ns;
    return taken;
}

struct journal *journal_open(const char *path, struct vm_error **err)
{
    CLEANUP(journal) struct journal *j = calloc(1, sizeof(*j));
    if (!j) {
        error_nomem(err);
        return NULL;
    }
    j->lock_fd = -1;
    pthread_mutex_init(&j->mutex, NULL);
    if (io_make_folders(path, 0700, err) < 0)
        return NULL;
    j->lock_fd = open_lock(path, err);
    if (j->lock_fd < 0)
        return NULL;
    int rc = mdb_env_create(&j->env);
    if (!rc)
        rc = mdb_env_set_mapsize(j->env, JOURNAL_MAP_SIZE);
    if (!rc)
        rc = mdb_env_set_maxdbs(j->env, 2);
    /* One process (the lock above), one transaction at a time (the mutex): no lock file needed. */
    if (!rc)
        rc = mdb_env_open(j->env, path, MDB_NOLOCK | MDB_NOTLS, 0600);
    if (rc) {
        error_mdb(err, rc, "open it");
        error_wrap(err, "%s", path);
        return NULL;
    }
    if (reserve_file(j, err) < 0 || sync_folder(path, err) < 0 || open_databases(j, err) < 0 ||
        learn_newest(j, err) < 0) {
        error_wrap(err, "%s", path);
        return NULL;
    }
    return steal_ptr(&j);
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    if (j->env)
        mdb_env_close(j->env);
    close_fd(&j->lock_fd);
    pthread_mutex_destroy(&j->mutex);
    free(j);
}
