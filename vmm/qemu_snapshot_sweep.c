/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_snapshot_sweep.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_settings.h"
#include "vmm/qemu_snapshot.h"
#include "vmm/write_protection.h"

#include <string.h>

#define JOB_END_NS (30 * NSEC_PER_SEC)
#define TARGET_END_NS (500 * NSEC_PER_MSEC)
#define LOOK_AGAIN_NS (10 * NSEC_PER_MSEC)
#define FORMER_LOOK_NS (50 * NSEC_PER_MSEC)
#define BREAK_OFF_NS (2 * NSEC_PER_SEC)

static bool begins(const char *text, const char *prefix)
{
    return !strncmp(text, prefix, strlen(prefix));
}

int snapshot_set_drive(struct qemu *q, const char *device, const char *node, struct vm_error **err)
{
    return qemu_command(
        q, "qom-set",
        json_pack("{s:s, s:s, s:s}", "path", device, "property", "drive", "value", node), NULL, err);
}

/* ---- jobs ---- */

/* Cancel what runs, dismiss what ended; *ret_left of ours are there still. */
static int end_jobs_once(struct qemu *q, unsigned *ret_left, struct vm_error **err)
{
    CLEANUP(json) json_t *jobs = NULL;
    size_t i;
    json_t *job;
    *ret_left = 0;
    if (qemu_command(q, "query-jobs", NULL, &jobs, err) < 0)
        return -1;
    json_array_foreach(jobs, i, job)
    {
        const char *id = qmp_string(job, "id");
        if (!begins(id, SNAPSHOT_JOB))
            continue;
        bool ended = !strcmp(qmp_string(job, "status"), "concluded");
        *ret_left += !ended;
        /* Refused for one that ends just now: it is seen again. */
        qmp_execute(q->qmp, ended ? "job-dismiss" : "job-cancel", json_pack("{s:s}", "id", id),
                    QMP_TIMEOUT_MS, NULL, NULL);
    }
    return 0;
}

static int end_jobs(struct qemu *q, int64_t limit_ns, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + limit_ns;
    for (;;) {
        unsigned left;
        if (end_jobs_once(q, &left, err) < 0)
            return -1;
        if (!left)
            return 0;
        int64_t now = clock_mono_ns();
        if (now >= deadline)
            return error_set(err, VM_ERROR_TIMEOUT, "QEMU does not end a job that pushes a disk");
        SCOPE_LOCK(&q->lock);
        qemu_wait_changed(q, now + LOOK_AGAIN_NS);
    }
}

/* ---- nodes ---- */

static int delete_nodes(struct qemu *q, const json_t *nodes, const char *prefix,
                        struct vm_error **err)
{
    size_t i;
    json_t *node;
    json_array_foreach((json_t *)(uintptr_t)nodes, i, node)
    {
        const char *name = qmp_string(node, "node-name");
        if (begins(name, prefix) &&
            qemu_command(q, "blockdev-del", json_pack("{s:s}", "node-name", name), NULL, err) < 0)
            return -1;
    }
    return 0;
}

/* The name of a node's child `role`, or NULL. */
static const char *child_of(const json_t *graph, const char *name, const char *role)
{
    size_t i, k;
    json_t *node, *edge, *child;
    json_int_t id = -1;
    json_array_foreach(json_object_get(graph, "nodes"), i, node)
    {
        if (!strcmp(qmp_string(node, "name"), name))
            id = qmp_integer(node, "id");
    }
    json_array_foreach(json_object_get(graph, "edges"), i, edge)
    {
        if (qmp_integer(edge, "parent") != id || strcmp(qmp_string(edge, "name"), role) != 0)
            continue;
        json_array_foreach(json_object_get(graph, "nodes"), k, child)
        {
            if (qmp_integer(child, "id") == qmp_integer(edge, "child"))
                return qmp_string(child, "name");
        }
    }
    return NULL;
}

/* Every device above a filter goes back to what is below it. */
static int take_filters_out(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *backends = NULL;
    CLEANUP(json) json_t *graph = NULL;
    size_t i;
    json_t *b;
    if (qemu_command(q, "query-block", NULL, &backends, err) < 0 ||
        qemu_command(q, "x-debug-query-block-graph", NULL, &graph, err) < 0)
        return -1;
    json_array_foreach(backends, i, b)
    {
        const char *name = qmp_string(json_object_get(b, "inserted"), "node-name");
        if (!begins(name, SNAPSHOT_FILTER))
            continue;
        const char *below = child_of(graph, name, "file");
        if (!below)
            return error_set(err, VM_ERROR_FAILED, "QEMU does not say what is below %s", name);
        if (snapshot_set_drive(q, qmp_string(b, "qdev"), below, err) < 0)
            return -1;
    }
    return 0;
}

static bool any_node(const json_t *nodes)
{
    size_t i;
    json_t *node;
    json_array_foreach((json_t *)(uintptr_t)nodes, i, node)
    {
        if (begins(qmp_string(node, "node-name"), "vmmig-"))
            return true;
    }
    return false;
}

static int list_nodes(struct qemu *q, json_t **ret, struct vm_error **err)
{
    return qemu_command(q, "query-named-block-nodes", json_pack("{s:b}", "flat", 1), ret, err);
}

static int sweep_nodes(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    if (list_nodes(q, &nodes, err) < 0)
        return -1;
    /* A filter that is read through lets nobody else write below it: so readers go first. */
    return end_jobs(q, JOB_END_NS, err) < 0 || delete_nodes(q, nodes, SNAPSHOT_ACCESS, err) < 0 ||
                   take_filters_out(q, err) < 0 ||
                   delete_nodes(q, nodes, SNAPSHOT_FILTER, err) < 0 ||
                   delete_nodes(q, nodes, SNAPSHOT_SCRATCH, err) < 0 ||
                   delete_nodes(q, nodes, SNAPSHOT_TARGET, err) < 0
               ? -1
               : 0;
}

/*
 * A target whose server is gone is connected again by QEMU (7.2), after 0, 1, 3 ... seconds. One that was given as a
 * descriptor is at the number of that, whatever QEMU has there by then: it would close that. So targets go at once, and
 * what hinders that is met again by sweep_nodes.
 */
static void end_targets(struct qemu *q, const json_t *nodes)
{
    if (end_jobs(q, TARGET_END_NS, NULL) == 0)
        delete_nodes(q, nodes, SNAPSHOT_TARGET, NULL);
}

/* Exports by which disks were to be activated, and their server. */
static int end_exports(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *exports = NULL;
    size_t i;
    json_t *e;
    bool ours = false;
    if (qemu_command(q, "query-block-exports", NULL, &exports, err) < 0)
        return -1;
    json_array_foreach(exports, i, e)
    {
        ours |= begins(qmp_string(e, "id"), SNAPSHOT_EXPORT);
    }
    return ours ? qemu_command(q, "nbd-server-stop", NULL, NULL, err) : 0;
}

/* ---- the guest ---- */

static int has_marker(struct qemu *q, bool *ret_has, struct vm_error **err)
{
    CLEANUP(json) json_t *objects = NULL;
    size_t i;
    json_t *object;
    *ret_has = false;
    if (qemu_command(q, "qom-list", json_pack("{s:s}", "path", "/objects"), &objects, err) < 0)
        return -1;
    json_array_foreach(objects, i, object)
    {
        *ret_has |= !strcmp(qmp_string(object, "name"), SNAPSHOT_MARKER);
    }
    return 0;
}

int snapshot_drop_marker(struct qemu *q, struct vm_error **err)
{
    return qemu_command(q, "object-del", json_pack("{s:s}", "id", SNAPSHOT_MARKER), NULL, err);
}

static int let_go_on(struct qemu *q, struct vm_error **err)
{
    struct guest_status status;
    if (guest_status(&q->guest, &status, err) < 0)
        return -1;
    return status.state == GUEST_PAUSED || status.state == GUEST_POSTMIGRATE
               ? guest_resume(&q->guest, err)
               : 0;
}

/* ---- memory ---- */

static int is_background(struct qemu *q, bool *ret_is, struct vm_error **err)
{
    CLEANUP(json) json_t *list = NULL;
    size_t i;
    json_t *c;
    if (qemu_command(q, "query-migrate-capabilities", NULL, &list, err) < 0)
        return -1;
    *ret_is = false;
    json_array_foreach(list, i, c)
    {
        *ret_is |= !strcmp(qmp_string(c, "capability"), "background-snapshot") && qmp_bool(c, "state");
    }
    return 0;
}

/* Status of QEMU's migration, after a background snapshot whose stream broke off had time to notice that. */
static int settled_status(struct qemu *q, char ret_status[32], struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + BREAK_OFF_NS;
    bool background = false;
    if (qemu_query_migration(q, ret_status, NULL, err) < 0)
        return -1;
    if (qemu_migration_is_under_way(ret_status) && is_background(q, &background, err) < 0)
        return -1;
    while (background && qemu_migration_is_under_way(ret_status) && clock_mono_ns() < deadline) {
        {
            SCOPE_LOCK(&q->lock);
            qemu_wait_changed(q, clock_mono_ns() + LOOK_AGAIN_NS);
        }
        if (qemu_query_migration(q, ret_status, NULL, err) < 0)
            return -1;
    }
    return 0;
}

/*
 * A background snapshot that failed leaves memory write-protected. One whose stream nobody reads any more fails within
 * an instant; one that is under way for longer has its reader, and lifts the protection by itself at its end.
 */
static int free_memory(struct qemu *q, struct vm_error **err)
{
    char status[32];
    bool found = false;
    if (settled_status(q, status, err) < 0)
        return -1;
    if (strcmp(status, "failed") != 0 && strcmp(status, "cancelled") != 0)
        return 0;
    if (write_protection_lift(&q->guest.process, &found, err) < 0)
        return -1;
    if (found)
        log_warn("QEMU left the guest's memory write-protected; it is free again", "pid=%d",
                 q->guest.process.pid);
    return 0;
}

int qemu_snapshot_sweep(struct qemu *q, bool *ret_found, struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    bool marker, found;
    if (has_marker(q, &marker, err) < 0 || list_nodes(q, &nodes, err) < 0)
        return -1;
    found = any_node(nodes);
    if (marker || found)
        qemu_forget_fd(q, QEMU_STREAM_FD); /* one that was not written to yet */
    /* The guest first: it waits. */
    if (marker && let_go_on(q, err) < 0)
        return -1;
    if (found)
        end_targets(q, nodes);
    if (free_memory(q, err) < 0 || end_exports(q, err) < 0 ||
        (found && sweep_nodes(q, err) < 0) || (marker && snapshot_drop_marker(q, err) < 0))
        return -1;
    *ret_found = found || marker;
    return 0;
}

bool snapshot_relieve(struct qemu *q)
{
    CLEANUP(json) json_t *nodes = NULL;
    struct guest_status status;
    bool marker;
    if (has_marker(q, &marker, NULL) < 0 || list_nodes(q, &nodes, NULL) < 0)
        return false;
    if (marker)
        let_go_on(q, NULL);
    if (any_node(nodes))
        end_targets(q, nodes);
    return guest_status(&q->guest, &status, NULL) == 0 && status.state == GUEST_RUNNING;
}

int qemu_snapshot_clear(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    bool marker, found;
    if (has_marker(q, &marker, err) < 0 || list_nodes(q, &nodes, err) < 0)
        return -1;
    if (!marker && !any_node(nodes))
        return 0;
    log_warn("a snapshot was cut short; it is taken out of QEMU", "pid=%d", q->guest.process.pid);
    if (qemu_snapshot_sweep(q, &found, err) < 0)
        return error_wrap(err, "what a snapshot that was cut short left in QEMU");
    return 0;
}

int qemu_snapshot_wait_former(struct qemu *q, int64_t deadline_ns, int cancel_fd,
                              struct vm_error **err)
{
    for (;;) {
        char status[32];
        bool background;
        if (qemu_query_migration(q, status, NULL, err) < 0)
            return -1;
        if (!qemu_migration_is_under_way(status))
            return 0;
        if (is_background(q, &background, err) < 0)
            return -1;
        if (!background)
            return error_set(err, VM_ERROR_CONFLICT, "QEMU is migrating this VM elsewhere");
        if (io_latch_is_set(cancel_fd))
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
        int64_t now = clock_mono_ns();
        if (now >= deadline_ns)
            return error_set(err, VM_ERROR_TIMEOUT,
                             "QEMU still gives away memory for a snapshot that was cut short");
        SCOPE_LOCK(&q->lock);
        qemu_wait_changed(q, now + FORMER_LOOK_NS);
    }
}

int64_t qemu_snapshot_pause_ns(struct qemu *q)
{
    SCOPE_LOCK(&q->lock);
    return q->last_pause_ns;
}

int qemu_snapshot_can_protect(struct qemu *q, struct vm_error **err)
{
    static const char *const on[] = {"events", "background-snapshot", NULL};
    json_t *values = json_pack("{s:i, s:s, s:s}", "max-bandwidth", 0, "tls-creds", "",
                               "tls-hostname", "");
    return qemu_settings_use(q, on, values, err);
}

int qemu_snapshot_wait_resumed(struct qemu *q, int64_t deadline_ns, struct vm_error **err)
{
    for (;;) {
        char status[32], state[32];
        CLEANUP(json) json_t *info = NULL;
        if (qemu_query_run_state(q, state, err) < 0 ||
            qemu_query_migration(q, status, &info, err) < 0)
            return -1;
        if (!strcmp(state, "running"))
            return 0;
        if (!qemu_migration_is_under_way(status) && strcmp(status, "completed") != 0)
            return error_set(err, VM_ERROR_FAILED, "QEMU's snapshot of memory ended as '%s': %.300s",
                             status, qmp_string(info, "error-desc"));
        int64_t now = clock_mono_ns();
        if (now >= deadline_ns)
            return error_set(err, VM_ERROR_TIMEOUT, "QEMU does not let the guest go on");
        SCOPE_LOCK(&q->lock);
        qemu_wait_changed(q, now + LOOK_AGAIN_NS);
    }
}
