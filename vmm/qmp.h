/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qmp: a client of one QMP connection (QEMU's JSON control protocol over a Unix socket).
 *
 *     CLEANUP(qmp) struct qmp *q = qmp_connect("/run/web1.qmp", 5000, on_event, arg, &err);
 *     CLEANUP(json) json_t *status = NULL;
 *     if (qmp_execute(q, "query-status", NULL, QMP_TIMEOUT_MS, &status, &err) < 0) ...
 *
 * Opening reads the greeting (version) and negotiates; both are bounded by timeout_ms, so that a peer
 * which says nothing, or a monitor that another client holds, becomes a TIMEOUT. A peer that does not
 * speak QMP is PROTOCOL.
 *
 * One thread per connection reads. It hands replies to the callers that wait for them and calls
 * `on_event` for events, in their order; the callback must not block and must not call qmp_execute.
 * A line is at most QMP_LINE_MAX bytes. Anything malformed ends the connection with PROTOCOL.
 *
 * Errors of qmp_execute: REFUSED with QEMU's class and text when QEMU refuses; TIMEOUT when it did not
 * answer in time (the command may still take effect; a late answer is dropped); VMM_DIED when the
 * connection ended, for every waiting call and every later one. Threads: any number of calls at once;
 * qmp_destroy when none is under way.
 */
#ifndef VMMIG_VMM_QMP_H
#define VMMIG_VMM_QMP_H

#include "base/cleanup.h"
#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define QMP_LINE_MAX (16u << 20)
#define QMP_EVENT_AGE_MAX_NS 10000000000LL
#define QMP_TIMEOUT_MS 30000 /* for commands that QEMU answers at once unless it is in trouble */

struct qmp;

struct qmp_version {
    int major, minor, micro;
    char package[64]; /* the distribution's name of the build; may be empty */
};

/*
 * `event` is NULL, once and last, when the connection ends. `data` is borrowed; NULL if there is
 * none. at_ns: when it was (monotonic), as QEMU's stamp says, which is of the wall clock; one of
 * the future, or of more than QMP_EVENT_AGE_MAX_NS ago, is not believed: then it is now.
 */
typedef void qmp_event_fn(const char *event, json_t *data, int64_t at_ns, void *arg);

/* A path of any length. UNREACHABLE or NOT_FOUND if nobody listens there. on_event may be NULL. */
struct qmp *qmp_connect(const char *path, int timeout_ms, qmp_event_fn *on_event, void *arg,
                        struct vm_error **err);
/* Over a connected socket, which the call takes over also when it fails. `name` stands in errors. */
struct qmp *qmp_open(int fd, const char *name, int timeout_ms, qmp_event_fn *on_event, void *arg,
                     struct vm_error **err);
void qmp_destroy(struct qmp *q);
DEFINE_CLEANUP(qmp, struct qmp *, qmp_destroy)

const struct qmp_version *qmp_version(const struct qmp *q);
/* The process at the other end as the kernel knows it (SO_PEERCRED): who called listen. */
int qmp_peer_pid(const struct qmp *q, pid_t *ret_pid, struct vm_error **err);
bool qmp_is_closed(struct qmp *q);

/*
 * Run a command. `args` (may be NULL) is taken over. *ret (may be NULL) gets what the command returned;
 * json_decref it.
 */
int qmp_execute(struct qmp *q, const char *command, json_t *args, int timeout_ms, json_t **ret,
                struct vm_error **err);
/* As qmp_execute, with a descriptor attached ("getfd", "add-fd"); fd stays the caller's. */
int qmp_execute_fd(struct qmp *q, const char *command, json_t *args, int fd, int timeout_ms,
                   json_t **ret, struct vm_error **err);

static inline void qmp_json_decref(json_t *j)
{
    json_decref(j);
}
DEFINE_CLEANUP(json, json_t *, qmp_json_decref)

/* A member of an object; "" / 0 / false when it is missing or of another type. j may be NULL. */
const char *qmp_string(const json_t *j, const char *key);
json_int_t qmp_integer(const json_t *j, const char *key);
bool qmp_bool(const json_t *j, const char *key);

#endif
