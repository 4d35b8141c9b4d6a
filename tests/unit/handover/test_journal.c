/* SPDX-License-Identifier: Apache-2.0 */
/* The journal: what it says is on the disk, what it reads is checked, and it keeps its room. */
#include "migrate/journal.h"

#include "base/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    /* In memory, where it can be: thousands of synchronous commits follow. */
    strcpy(folder, access("/dev/shm", W_OK) == 0 ? "/dev/shm/vmmig-journal-XXXXXX"
                                                 : "/tmp/vmmig-journal-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    static const char *const files[] = {"data.mdb", "agent.lock"};
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        char path[128];
        snprintf(path, sizeof(path), "%s/%s", folder, files[i]);
        unlink(path);
    }
    return rmdir(folder);
}

static struct journal *open_journal(void)
{
    cleanup_error struct vm_error *err = NULL;
    struct journal *j = journal_open(folder, &err);
    if (!j)
        fail_msg("%s", error_message(err));
    return j;
}

static char blob[] = "argv, disks, taps";

static struct journal_record a_record(enum handover_record record)
{
    struct journal_record r = {.attempt = uuid_new(),
                               .record = record,
                               .vm = "web1",
                               .peer = "host2:4720",
                               .vmm = {.boot = uuid_new(), .pid = 4711, .start = 98765},
                               .blob = blob,
                               .blob_len = sizeof(blob)};
    return r;
}

static void put(struct journal *j, const struct journal_record *r)
{
    cleanup_error struct vm_error *err = NULL;
    if (journal_put(j, r, &err) < 0)
        fail_msg("%s", error_message(err));
}

static void advance(struct journal *j, const struct uuid *attempt, enum handover_record record)
{
    cleanup_error struct vm_error *err = NULL;
    if (journal_advance(j, attempt, record, NULL, &err) < 0)
        fail_msg("%s", error_message(err));
}

static struct journal_record get(struct journal *j, const struct uuid *attempt)
{
    cleanup_error struct vm_error *err = NULL;
    struct journal_record r;
    if (journal_get(j, attempt, &r, &err) < 0)
        fail_msg("%s", error_message(err));
    return r;
}

static void assert_error(int rc, struct vm_error **err, enum vm_error_kind kind)
{
    assert_int_equal(rc, -1);
    if ((*err)->kind != kind)
        fail_msg("%s: %s", error_kind_name((*err)->kind), error_message(*err));
    error_clear(err);
}

static void what_was_put_is_read_back_by_the_next_agent(void **state)
{
    (void)state;
    struct journal_record in = a_record(HANDOVER_REC_SENDING);
    struct journal *j = open_journal();
    put(j, &in);
    journal_close(j);

    CLEANUP(journal) struct journal *again = open_journal();
    struct journal_record out = get(again, &in.attempt);
    assert_int_equal(out.record, HANDOVER_REC_SENDING);
    assert_string_equal(out.vm, "web1");
    assert_string_equal(out.peer, "host2:4720");
    assert_true(process_identity_equal(&out.vmm, &in.vmm));
    assert_int_equal(out.blob_len, sizeof(blob));
    assert_string_equal(out.blob, blob);
    assert_true(out.started_ns > 0 && out.changed_ns == out.started_ns);
    journal_record_finish(&out);
}

static void a_change_keeps_the_rest_and_a_settled_record_forgets_its_blob(void **state)
{
    (void)state;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record in = a_record(HANDOVER_REC_PREPARING);
    struct process_identity vmm = {.boot = uuid_new(), .pid = 12, .start = 34};
    put(j, &in);
    assert_int_equal(journal_advance(j, &in.attempt, HANDOVER_REC_LOADED, &vmm, NULL), 0);
    struct journal_record out = get(j, &in.attempt);
    assert_int_equal(out.record, HANDOVER_REC_LOADED);
    assert_true(process_identity_equal(&out.vmm, &vmm));
    assert_string_equal(out.blob, blob);
    journal_record_finish(&out);

    advance(j, &in.attempt, HANDOVER_REC_NEVER);
    out = get(j, &in.attempt);
    assert_int_equal(out.record, HANDOVER_REC_NEVER);
    assert_true(process_identity_equal(&out.vmm, &vmm));
    assert_null(out.blob);
}

static void an_attempt_has_one_role_here(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record r = a_record(HANDOVER_REC_SENDING);
    put(j, &r);
    assert_error(journal_advance(j, &r.attempt, HANDOVER_REC_RUN, NULL, &err), &err,
                 VM_ERROR_CONFLICT);
    r.record = HANDOVER_REC_PREPARING;
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_CONFLICT);
    struct journal_record out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_SENDING);
    journal_record_finish(&out);
}

static void bad_arguments_are_refused(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record r = a_record(HANDOVER_REC_SENDING), good = r;
    r.vm[0] = '\0';
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    r = good;
    r.vm[1] = '\n';
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    r = good;
    memset(r.peer, 'x', sizeof(r.peer)); /* no NUL */
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    r = good;
    r.blob_len = JOURNAL_BLOB_MAX + 1;
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    r = good;
    r.record = HANDOVER_REC_NONE;
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    r = good;
    memset(&r.attempt, 0, sizeof(r.attempt));
    assert_error(journal_put(j, &r, &err), &err, VM_ERROR_USAGE);
    assert_error(journal_advance(j, &good.attempt, HANDOVER_REC_COMMIT, NULL, &err), &err,
                 VM_ERROR_NOT_FOUND);
    assert_error(journal_remove(j, &good.attempt, &err), &err, VM_ERROR_NOT_FOUND);
    assert_error(journal_get(j, &good.attempt, &r, &err), &err, VM_ERROR_NOT_FOUND);
}

static void two_agents_cannot_share_a_journal(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    assert_non_null(j);
    assert_null(journal_open(folder, &err));
    assert_error(-1, &err, VM_ERROR_CONFLICT);
}

struct seen {
    int count, damaged;
    struct uuid attempts[8];
};

static int remember(const struct journal_record *record, const struct vm_error *damage, void *arg,
                    struct vm_error **err)
{
    struct seen *seen = arg;
    (void)err;
    seen->damaged += damage != NULL;
    seen->attempts[seen->count++] = record->attempt;
    return 0;
}

static void recovery_visits_every_record_oldest_first(void **state)
{
    (void)state;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record records[4];
    struct seen seen = {0};
    for (int i = 0; i < 4; i++) {
        records[i] = a_record(HANDOVER_REC_PREPARING);
        records[i].started_ns = 1000 - i;
        put(j, &records[i]);
    }
    assert_int_equal(journal_each(j, remember, &seen, NULL), 0);
    assert_int_equal(seen.count, 4);
    assert_int_equal(seen.damaged, 0);
    for (int i = 0; i < 4; i++)
        assert_true(uuid_equal(&seen.attempts[i], &records[3 - i].attempt));
}

#ifdef VMMIG_FAULTS
static int64_t put_now(struct journal *j, struct journal_record *ret)
{
    *ret = a_record(HANDOVER_REC_PREPARING);
    put(j, ret);
    struct journal_record out = get(j, &ret->attempt);
    journal_record_finish(&out);
    assert_true(out.started_ns == out.changed_ns);
    return out.changed_ns;
}

/* A clock that was a day ahead, and is set right: what comes after is newer all the same. */
static void what_comes_later_is_newer_whatever_the_clock_says(void **state)
{
    (void)state;
    struct journal_record records[4];
    struct seen seen = {0};
    int64_t stamps[4];
    CLEANUP(journal) struct journal *j = open_journal();
    stamps[0] = put_now(j, &records[0]);
    fault_arm("clock.wall=jump:86400000@*", NULL);
    stamps[1] = put_now(j, &records[1]);
    fault_arm("", NULL);
    stamps[2] = put_now(j, &records[2]);
    journal_close(steal_ptr(&j));
    j = open_journal();
    stamps[3] = put_now(j, &records[3]);
    advance(j, &records[0].attempt, HANDOVER_REC_NEVER);
    struct journal_record changed = get(j, &records[0].attempt);
    assert_true(changed.changed_ns > stamps[3]);
    journal_record_finish(&changed);
    assert_true(stamps[1] > stamps[0] + 80000 * NSEC_PER_SEC);
    assert_int_equal(journal_each(j, remember, &seen, NULL), 0);
    for (int i = 0; i < 4; i++)
        assert_true(uuid_equal(&seen.attempts[i], &records[i].attempt));
}
#endif

static int remove_each(const struct journal_record *record, const struct vm_error *damage,
                       void *arg, struct vm_error **err)
{
    (void)damage;
    return journal_remove(arg, &record->attempt, err);
}

static int refuse(const struct journal_record *record, const struct vm_error *damage, void *arg,
                  struct vm_error **err)
{
    (void)record;
    (void)damage;
    ++*(int *)arg;
    return error_set(err, VM_ERROR_FAILED, "enough");
}

static void a_visitor_may_change_the_journal_and_end_the_walk(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    for (int i = 0; i < 3; i++) {
        struct journal_record r = a_record(HANDOVER_REC_PREPARING);
        put(j, &r);
    }
    int visits = 0;
    assert_error(journal_each(j, refuse, &visits, &err), &err, VM_ERROR_FAILED);
    assert_int_equal(visits, 1);
    assert_int_equal(journal_each(j, remove_each, j, NULL), 0);
    struct seen seen = {0};
    assert_int_equal(journal_each(j, remember, &seen, NULL), 0);
    assert_int_equal(seen.count, 0);
}

/* ---- Crashes ---- */

/* A child puts and advances, says so through a pipe, and is killed without closing anything. */
static void a_record_survives_kill_9_right_after_the_call(void **state)
{
    (void)state;
    int pipe_fds[2];
    char told;
    struct journal_record r = a_record(HANDOVER_REC_LOADED);
    assert_int_equal(pipe(pipe_fds), 0);
    pid_t child = fork();
    if (child == 0) {
        struct journal *j = journal_open(folder, NULL);
        if (!j || journal_put(j, &r, NULL) < 0 ||
            journal_advance(j, &r.attempt, HANDOVER_REC_RUN, NULL, NULL) < 0 ||
            write(pipe_fds[1], "x", 1) != 1)
            _exit(1);
        pause();
        _exit(2);
    }
    close(pipe_fds[1]);
    assert_int_equal(read(pipe_fds[0], &told, 1), 1);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    close(pipe_fds[0]);
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_RUN);
    assert_string_equal(out.blob, blob);
    journal_record_finish(&out);
}

/*
 * Power loss: a copy of the file taken through O_DIRECT would need a device that loses its cache.
 * What can be seen without one is that the file was opened for synchronous writes and nothing
 * turned it off.
 */
static void commits_are_synchronous(void **state)
{
    (void)state;
    CLEANUP(journal) struct journal *j = open_journal();
    bool found = false;
    assert_non_null(j);
    for (int fd = 0; fd < 256; fd++) {
        char link[64], target[256];
        snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof(target) - 1);
        if (n < 0)
            continue;
        target[n] = '\0';
        if (strncmp(target, folder, strlen(folder)) == 0 && strstr(target, "data.mdb"))
            found = found || (fcntl(fd, F_GETFL) & O_DSYNC);
    }
    assert_true(found);
}

#ifdef VMMIG_FAULTS
static void crash_at(const char *spec, struct journal_record *r)
{
    pid_t child = fork();
    if (child == 0) {
        struct journal *j = journal_open(folder, NULL);
        fault_arm(spec, NULL);
        journal_advance(j, &r->attempt, HANDOVER_REC_COMMIT, NULL, NULL);
        _exit(3);
    }
    int status;
    waitpid(child, &status, 0);
    assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 3);
}

static void a_crash_in_a_write_leaves_the_old_or_the_new_record(void **state)
{
    (void)state;
    struct journal_record r = a_record(HANDOVER_REC_SENDING);
    struct journal *j = open_journal();
    put(j, &r);
    journal_close(j);
    crash_at("journal.write=crash", &r);
    j = open_journal();
    struct journal_record out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_SENDING);
    journal_record_finish(&out);
    journal_close(j);
    crash_at("journal.written=crash", &r);
    j = open_journal();
    out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_COMMIT);
    journal_record_finish(&out);
    journal_close(j);
}

static void a_failed_write_changes_nothing_and_a_doubtful_one_ends_the_agent(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record r = a_record(HANDOVER_REC_SENDING), out;
    put(j, &r);
    fault_arm("journal.write=error:28", NULL);
    assert_error(journal_advance(j, &r.attempt, HANDOVER_REC_COMMIT, NULL, &err), &err,
                 VM_ERROR_NO_SPACE);
    fault_arm("", NULL);
    out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_SENDING);
    journal_record_finish(&out);
    fault_arm("journal.sync=error", NULL);
    assert_error(journal_advance(j, &r.attempt, HANDOVER_REC_COMMIT, NULL, &err), &err,
                 VM_ERROR_IN_DOUBT);
    fault_arm("", NULL);
    assert_error(journal_get(j, &r.attempt, &out, &err), &err, VM_ERROR_IN_DOUBT);
    assert_error(journal_advance(j, &r.attempt, HANDOVER_REC_COMMIT, NULL, &err), &err,
                 VM_ERROR_IN_DOUBT);
}
#endif

/* ---- Damage ---- */

/* Overwrite the stored record of an attempt behind the journal's back. */
static void tamper(const struct uuid *attempt, void (*change)(uint8_t *bytes, size_t *len),
                   const char *table)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    MDB_val key = {sizeof(attempt->bytes), (void *)(uintptr_t)attempt->bytes}, value;
    uint8_t bytes[1024];
    assert_int_equal(mdb_env_create(&env), 0);
    mdb_env_set_mapsize(env, JOURNAL_MAP_SIZE);
    mdb_env_set_maxdbs(env, 2);
    assert_int_equal(mdb_env_open(env, folder, MDB_NOLOCK, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, 0, &txn), 0);
    assert_int_equal(mdb_dbi_open(txn, table, 0, &dbi), 0);
    assert_int_equal(mdb_get(txn, dbi, &key, &value), 0);
    size_t len = value.mv_size;
    assert_true(len <= sizeof(bytes));
    memcpy(bytes, value.mv_data, len);
    change(bytes, &len);
    value = (MDB_val){len, bytes};
    assert_int_equal(mdb_put(txn, dbi, &key, &value, 0), 0);
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

static void flip(uint8_t *bytes, size_t *len)
{
    bytes[*len / 2] ^= 1;
}

static void cut(uint8_t *bytes, size_t *len)
{
    (void)bytes;
    *len -= 9;
}

static void empty(uint8_t *bytes, size_t *len)
{
    (void)bytes;
    *len = 0;
}

static void lengthen(uint8_t *bytes, size_t *len)
{
    memset(bytes + *len, 0, sizeof(uint8_t) * 16);
    *len += 16;
}

static void a_damaged_record_is_reported_and_never_returned(void **state)
{
    (void)state;
    void (*const changes[])(uint8_t *, size_t *) = {flip, cut, empty, lengthen};
    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++) {
        struct vm_error *err = NULL;
        struct journal_record r = a_record(HANDOVER_REC_COMMIT), out;
        struct journal_record good = a_record(HANDOVER_REC_RUN);
        struct journal *j = open_journal();
        put(j, &r);
        put(j, &good);
        journal_close(j);
        tamper(&r.attempt, changes[i], "records");
        j = open_journal();
        assert_error(journal_get(j, &r.attempt, &out, &err), &err, VM_ERROR_CORRUPT);
        assert_error(journal_advance(j, &r.attempt, HANDOVER_REC_DONE, NULL, &err), &err,
                     VM_ERROR_CORRUPT);
        assert_error(journal_put(j, &r, &err), &err, VM_ERROR_CORRUPT);
        struct seen seen = {0};
        assert_int_equal(journal_each(j, remember, &seen, NULL), 0);
        assert_int_equal(seen.count, 2);
        assert_int_equal(seen.damaged, 1);
        r.record = HANDOVER_REC_DONE;
        assert_int_equal(journal_mend(j, &r, NULL), 0);
        assert_int_equal(journal_get(j, &r.attempt, &out, NULL), 0);
        assert_int_equal(out.record, HANDOVER_REC_DONE);
        journal_record_finish(&out);
        assert_int_equal(journal_remove(j, &r.attempt, NULL), 0);
        assert_int_equal(journal_remove(j, &good.attempt, NULL), 0);
        journal_close(j);
    }
}

static void a_damaged_blob_is_reported(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    struct journal_record r = a_record(HANDOVER_REC_COMMIT), out;
    struct journal *j = open_journal();
    put(j, &r);
    journal_close(j);
    tamper(&r.attempt, flip, "blobs");
    j = open_journal();
    assert_error(journal_get(j, &r.attempt, &out, &err), &err, VM_ERROR_CORRUPT);
    /* The decision itself can still be recorded: it does not need the blob. */
    advance(j, &r.attempt, HANDOVER_REC_DONE);
    out = get(j, &r.attempt);
    assert_int_equal(out.record, HANDOVER_REC_DONE);
    journal_close(j);
}

static void garbage_is_not_opened(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    char path[128];
    snprintf(path, sizeof(path), "%s/data.mdb", folder);
    FILE *f = fopen(path, "w");
    for (int i = 0; i < 20000; i++)
        fputc(i * 7, f);
    fclose(f);
    assert_null(journal_open(folder, &err));
    assert_error(-1, &err, VM_ERROR_CORRUPT);
}

/* ---- Room ---- */

static void history_is_pruned_and_open_attempts_are_kept(void **state)
{
    (void)state;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record open = a_record(HANDOVER_REC_NEVER);
    put(j, &open);
    struct uuid first = {{0}};
    for (int i = 0; i < JOURNAL_HISTORY_MAX + 20; i++) {
        struct journal_record r = a_record(HANDOVER_REC_DONE);
        if (i == 0)
            first = r.attempt;
        put(j, &r);
    }
    struct journal_record out;
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(journal_get(j, &first, &out, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    out = get(j, &open.attempt);
    assert_int_equal(out.record, HANDOVER_REC_NEVER);
}

/* Fill it with the largest attempts until it refuses; each of them can still come to its end. */
static void a_full_journal_refuses_new_attempts_and_finishes_the_old_ones(void **state)
{
    (void)state;
    enum { MOST = 256 };
    static struct uuid attempts[MOST];
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    cleanup_free char *big = calloc(1, JOURNAL_BLOB_MAX);
    int n = 0;
    for (; n < MOST; n++) {
        struct journal_record r = a_record(HANDOVER_REC_SENDING);
        r.blob = big;
        r.blob_len = JOURNAL_BLOB_MAX;
        memset(r.vm, 'v', JOURNAL_VM_NAME_MAX);
        memset(r.peer, 'p', JOURNAL_PEER_MAX);
        if (journal_put(j, &r, &err) < 0)
            break;
        attempts[n] = r.attempt;
    }
    assert_in_range(n, 64, MOST - 1);
    assert_error(-1, &err, VM_ERROR_NO_SPACE);
    for (int i = 0; i < n; i++)
        advance(j, &attempts[i], HANDOVER_REC_COMMIT);
    for (int i = 0; i < n; i++) {
        struct journal_record out = get(j, &attempts[i]);
        assert_int_equal(out.record, HANDOVER_REC_COMMIT);
        assert_int_equal(out.blob_len, JOURNAL_BLOB_MAX);
        journal_record_finish(&out);
    }
    for (int i = 0; i < n; i++)
        advance(j, &attempts[i], HANDOVER_REC_DONE);
    struct journal_record r = a_record(HANDOVER_REC_SENDING);
    put(j, &r);
}

/* An attempt is put before its VM's command line is known. */
static void what_grows_later_is_refused_as_soon(void **state)
{
    (void)state;
    enum { MOST = 256 };
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    cleanup_free char *big = calloc(1, JOURNAL_BLOB_MAX);
    static struct uuid attempts[MOST];
    for (int i = 0; i < MOST; i++) {
        struct journal_record r = a_record(HANDOVER_REC_PREPARING);
        r.blob = big;
        r.blob_len = 100;
        put(j, &r);
        attempts[i] = r.attempt;
    }
    int n = 0;
    for (; n < MOST; n++) {
        struct journal_record r = get(j, &attempts[n]);
        free(r.blob);
        r.blob = big;
        r.blob_len = JOURNAL_BLOB_MAX;
        int rc = journal_put(j, &r, &err);
        r.blob = NULL;
        journal_record_finish(&r);
        if (rc < 0)
            break;
    }
    assert_in_range(n, 64, MOST - 1);
    assert_error(-1, &err, VM_ERROR_NO_SPACE);
    for (int i = 0; i < MOST; i++)
        advance(j, &attempts[i], HANDOVER_REC_LOADED);
    for (int i = 0; i < MOST; i++)
        advance(j, &attempts[i], HANDOVER_REC_RUN);
}

static void the_number_of_records_is_bounded(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    CLEANUP(journal) struct journal *j = open_journal();
    struct journal_record r = {0};
    int n = 0;
    for (; n <= JOURNAL_RECORDS_MAX; n++) {
        r = a_record(HANDOVER_REC_NEVER);
        if (journal_put(j, &r, &err) < 0)
            break;
    }
    assert_int_equal(n, JOURNAL_RECORDS_MAX);
    assert_error(-1, &err, VM_ERROR_NO_SPACE);
}

/*
 * A disk that is full: a tmpfs of 40 MiB that is filled to the brim beside an open journal, which
 * does not notice; and one too small for a journal, which is refused at once.
 */
static int on_a_full_disk(void)
{
    char filler[128];
    static char zeros[65536];
    struct journal *j = journal_open(folder, NULL);
    if (!j)
        return 10;
    snprintf(filler, sizeof(filler), "%s/filler", folder);
    int fd = open(filler, O_WRONLY | O_CREAT, 0600);
    while (write(fd, zeros, sizeof(zeros)) > 0)
        ;
    if (errno != ENOSPC)
        return 11;
    struct journal_record r = a_record(HANDOVER_REC_SENDING);
    if (journal_put(j, &r, NULL) < 0 ||
        journal_advance(j, &r.attempt, HANDOVER_REC_COMMIT, NULL, NULL) < 0)
        return 12;
    journal_close(j);
    return 0;
}

static int on_a_small_disk(void)
{
    struct vm_error *err = NULL;
    struct journal *j = journal_open(folder, &err);
    if (j)
        return 20;
    return err->kind == VM_ERROR_NO_SPACE ? 0 : 21;
}

static void run_on_tmpfs(const char *options, int (*body)(void))
{
    pid_t child = fork();
    if (child == 0) {
        if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
            mount("tmpfs", folder, "tmpfs", 0, options) < 0)
            _exit(77);
        _exit(body());
    }
    int status;
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) {
        print_message("SKIPPED: no right to mount a tmpfs\n");
        skip();
    }
    assert_int_equal(WEXITSTATUS(status), 0);
}

/* On a file system that can tell, no commit has to find out that a block is written for the first time. */
static void its_first_blocks_are_written_when_it_is_opened(void **state)
{
    (void)state;
    char path[128];
    struct journal_record r = a_record(HANDOVER_REC_SENDING), read;
    struct journal *j = open_journal();
    put(j, &r);
    for (int again = 0; again < 2; again++) { /* also when another version of the agent made it */
        snprintf(path, sizeof(path), "%s/data.mdb", folder);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        off_t hole = lseek(fd, 0, SEEK_HOLE);
        assert_true(hole >= JOURNAL_WRITTEN_SIZE);
        journal_close(j);
        assert_return_code(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 512 << 10), errno);
        assert_int_equal(lseek(fd, 0, SEEK_HOLE), 1 << 20);
        close(fd);
        j = open_journal();
        read = get(j, &r.attempt);
        assert_int_equal(read.record, HANDOVER_REC_SENDING);
        journal_record_finish(&read);
    }
    journal_close(j);
}

static void a_disk_that_fills_up_does_not_hurt(void **state)
{
    (void)state;
    run_on_tmpfs("size=40m", on_a_full_disk);
}

static void a_disk_without_room_is_refused_at_once(void **state)
{
    (void)state;
    run_on_tmpfs("size=8m", on_a_small_disk);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        TEST(what_was_put_is_read_back_by_the_next_agent),
        TEST(a_change_keeps_the_rest_and_a_settled_record_forgets_its_blob),
        TEST(an_attempt_has_one_role_here),
        TEST(bad_arguments_are_refused),
        TEST(two_agents_cannot_share_a_journal),
        TEST(recovery_visits_every_record_oldest_first),
        TEST(a_visitor_may_change_the_journal_and_end_the_walk),
        TEST(a_record_survives_kill_9_right_after_the_call),
        TEST(commits_are_synchronous),
#ifdef VMMIG_FAULTS
        TEST(what_comes_later_is_newer_whatever_the_clock_says),
        TEST(a_crash_in_a_write_leaves_the_old_or_the_new_record),
        TEST(a_failed_write_changes_nothing_and_a_doubtful_one_ends_the_agent),
#endif
        TEST(a_damaged_record_is_reported_and_never_returned),
        TEST(a_damaged_blob_is_reported),
        TEST(garbage_is_not_opened),
        TEST(history_is_pruned_and_open_attempts_are_kept),
        TEST(a_full_journal_refuses_new_attempts_and_finishes_the_old_ones),
        TEST(what_grows_later_is_refused_as_soon),
        TEST(the_number_of_records_is_bounded),
        TEST(its_first_blocks_are_written_when_it_is_opened),
        TEST(a_disk_that_fills_up_does_not_hurt),
        TEST(a_disk_without_room_is_refused_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
