/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control: the messages between the agent and its clients (proto/control.proto), checked before
 * anybody looks at them.
 *
 *     struct control_message m;
 *     if (control_unpack(frame.type, frame.data, frame.len, &m, &err) < 0) ...
 *     ... m.send->vm ...
 *     control_message_finish(&m);
 *
 * A message that control_unpack returns needs no further check: names and addresses are well
 * formed, strings have their maximum and no control characters, bytes their exact size, counts and
 * enums are in range, sub-messages are checked too. What a message means to the agent (does the VM
 * exist?) is not checked here. Threads: any.
 */
#ifndef VMMIG_PROTO_CONTROL_H
#define VMMIG_PROTO_CONTROL_H

#include "base/error.h"
#include "proto/control.pb-c.h"
#include "proto/fields.h"

#include <stdbool.h>
#include <stddef.h>

#define CONTROL_VERSION_MIN 1
#define CONTROL_VERSION_MAX 1
#define CONTROL_WORD_MAX 255  /* bytes of names, states, software */
#define CONTROL_TEXT_MAX 2048 /* bytes of messages; a longer one is cut by its sender */
#define CONTROL_VMS_MAX 512
#define CONTROL_JOBS_MAX 320
#define CONTROL_FINDINGS_MAX 640 /* what a frame holds */
#define CONTROL_FAULTS_MAX 1024
#define CONTROL_DOWNTIME_MS_MIN 1
#define CONTROL_DOWNTIME_MS_MAX 3600000
#define CONTROL_BANDWIDTH_MIN (64ULL << 10)
#define CONTROL_BANDWIDTH_MAX (1ULL << 50)
#define CONTROL_CONNECTIONS_MAX 8
#define CONTROL_TEMPLATES_MAX 1024
#define CONTROL_CLONES_MAX 64      /* of one request */
#define CONTROL_SETTINGS_MAX 64
#define CONTROL_SNAPSHOTS_MAX 1024 /* of one answer: the newest */
#define CONTROL_KEEP_MAX 100000
#define CONTROL_FENCE_MS_MAX 86400000
#define CONTROL_PARTS_MAX 1024 /* images, stretches, findings... of one REPO_RESULT */
#define CONTROL_INTERVAL_MS_MIN 50
#define CONTROL_INTERVAL_MS_MAX 60000

/* X(type, member, message, does a client send it) */
#define CONTROL_MESSAGES(X)                                                                        \
    X(HELLO, hello, Hello, true)                                                                   \
    X(WELCOME, welcome, Welcome, false)                                                            \
    X(ERROR, error, Error, false)                                                                  \
    X(RUN, run, Run, true)                                                                         \
    X(ATTACH, attach, Attach, true)                                                                \
    X(LIST, list, List, true)                                                                      \
    X(STATUS, status, Status, true)                                                                \
    X(DETACH, detach, Detach, true)                                                                \
    X(INFO, info, Info, true)                                                                      \
    X(SEND, send, Send, true)                                                                      \
    X(CANCEL, cancel, Cancel, true)                                                                \
    X(RESOLVE, resolve, Resolve, true)                                                             \
    X(JOBS, jobs, Jobs, true)                                                                      \
    X(WATCH, watch, Watch, true)                                                                   \
    X(DOCTOR, doctor, Doctor, true)                                                                \
    X(FAULTS, faults, Faults, true)                                                                \
    X(VM, vm, Vm, false)                                                                           \
    X(VMS, vms, Vms, false)                                                                        \
    X(AGENT, agent, Agent, false)                                                                  \
    X(JOB, job, Job, false)                                                                        \
    X(JOB_LIST, job_list, JobList, false)                                                          \
    X(SNAPSHOT, snapshot, Snapshot, true)                                                          \
    X(SNAPSHOT_LIST, snapshot_list, SnapshotList, true)                                            \
    X(SNAPSHOT_DELETE, snapshot_delete, SnapshotDelete, true)                                      \
    X(SNAPSHOT_PRUNE, snapshot_prune, SnapshotPrune, true)                                         \
    X(RESTORE, restore, Restore, true)                                                             \
    X(TEMPLATE_PUBLISH, template_publish, TemplatePublish, true)                                   \
    X(TEMPLATE_LIST, template_list, TemplateList, true)                                            \
    X(TEMPLATE_SHOW, template_show, TemplateShow, true)                                            \
    X(TEMPLATE_DELETE, template_delete, TemplateDelete, true)                                      \
    X(CLONE, clone, Clone, true)                                                                   \
    X(MOUNT, mount, Mount, true)                                                                   \
    X(UNMOUNT, unmount, Unmount, true)                                                             \
    X(TEMPLATES, templates, Templates, false)                                                      \
    X(CLONES, clones, Clones, false)                                                               \
    X(MOUNTED, mounted, Mounted, false)                                                            \
    X(SNAPSHOTS, snapshots, Snapshots, false)                                                      \
    X(OK, ok, Ok, false)                                                                           \
    X(DIAGNOSIS, diagnosis, Diagnosis, false)                                                      \
    X(FAULT_POINTS, fault_points, FaultPoints, false)                                            \
    X(REPO, repo, Repo, true)                                                                      \
    X(REPO_RESULT, repo_result, RepoResult, false)

struct control_message {
    Vmmig__Control__Type type;
    union {
        ProtobufCMessage *any;
#define X(id, member, Name, request) Vmmig__Control__##Name *member;
        CONTROL_MESSAGES(X)
#undef X
    };
};

/*
 * PROTOCOL, with the name of the first field that is wrong; VERSION for a type that this version
 * does not know.
 */
int control_unpack(unsigned type, const void *data, size_t len, struct control_message *ret_message,
                   struct vm_error **err);
void control_message_finish(struct control_message *m);
/* The same checks on a message that was built here, before it is sent. */
int control_check(unsigned type, const ProtobufCMessage *message, struct vm_error **err);
/* "SEND", or "?" */
const char *control_type_name(unsigned type);
/* Does a client send it? */
bool control_type_is_request(unsigned type);
/* The highest version that both speak, 0 if there is none. */
unsigned control_version_choose(const Vmmig__Control__Hello *hello);

static inline void control_message_cleanup(struct control_message *m)
{
    control_message_finish(m);
}
#define cleanup_control_message __attribute__((cleanup(control_message_cleanup)))

#endif
