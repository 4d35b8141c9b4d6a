/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vms: the VMs of this agent, by name. Each has a durable record, so that a new agent finds them
 * again: the process by its identity, the VMM by its control socket.
 *
 *     CLEANUP(vms) struct vms *vms = vms_open(&params, &err);     reads records, adopts what runs
 *     vms_add(vms, &definition, &guest, &err);                    record on disk before it returns
 *     CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", &err);
 *     CLEANUP(guest) struct guest *guest = vm_guest(vm);
 *     guest_pause(guest, &err);
 *     vms_remove(vms, "web1", &err);                              the VMM runs on, nobody's
 *
 * Presence of a VM:
 *     PRESENT      its process runs and its VMM answered when it was adopted, and since
 *     UNREACHABLE  the process runs, but the VMM did not answer yet, or its connection has ended:
 *                  tried again every few seconds
 *     ENDED        the process is gone; the record stays until `detach`, or until the name is
 *                  used again
 *
 * Records: STATE_DIR/vms/NAME.vm, replaced durably (base/io.h), with a checksum. One that is
 * damaged, or whose name does not fit, is reported in the log, kept aside (".damaged" is
 * appended), and does not keep the agent from starting. After a crash at any instant a VM is in
 * the records or not, as the last call that returned says.
 *
 * Threads: any. A `struct vm` is reference counted, and so is its guest: a new connection brings a
 * new one, and the former ends with whoever still uses it. A thread of the registry notices deaths,
 * and has a thread connect to each VM that does not answer, so that a silent one delays no other.
 * Bound: params.max VMs.
 */
#ifndef VMMIG_AGENT_VMS_H
#define VMMIG_AGENT_VMS_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/process.h"
#include "proto/fields.h"
#include "vmm/guest.h"

#include <stdbool.h>
#include <stdint.h>

/* How the VM came to this agent. X(id, number on disk, stable name) */
#define VM_ORIGINS(X)                                                                              \
    X(RUN, 1, "run")                                                                               \
    X(ATTACHED, 2, "attached")                                                                     \
    X(RECEIVED, 3, "received")                                                                     \
    X(RESTORED, 4, "restored")

#define X(id, number, name) VM_ORIGIN_##id = number,
enum vm_origin { VM_ORIGINS(X) };
#undef X

/* What kind of VMM it is (agent/driver.h). X(id, number on disk, stable name) */
#define VM_DRIVERS(X)                                                                              \
    X(QEMU, 0, "qemu")                                                                             \
    X(ATTACH, 1, "attach")

#define X(id, number, name) VM_DRIVER_##id = number,
enum vm_driver { VM_DRIVERS(X) };
#undef X

#define VM_DETAIL_MAX 256 /* with the NUL */

enum vm_presence { VM_PRESENT, VM_UNREACHABLE, VM_ENDED };

struct vm_definition {
    char name[VM_NAME_MAX + 1];
    enum vm_origin origin;
    char **argv;    /* how it was started, ended by NULL; one allocation (base/process.h) */
    enum vm_driver driver;
    char *socket_path; /* the VMM's control socket */
    struct process_identity process;
    int64_t since_ns; /* wall clock; shown only */
};

void vm_definition_finish(struct vm_definition *d);
int vm_definition_copy(const struct vm_definition *d, struct vm_definition *ret_copy,
                       struct vm_error **err);
static inline void vm_definition_cleanup(struct vm_definition *d)
{
    vm_definition_finish(d);
}
#define cleanup_vm_definition __attribute__((cleanup(vm_definition_cleanup)))

/* Connect to the VMM of a definition (vmm/qemu.h); may take seconds. Called for several VMs at
 * once, for each by one. */
typedef struct guest *vm_connect_fn(const struct vm_definition *d, void *arg,
                                    struct vm_error **err);

struct vms_params {
    const char *state_dir;
    unsigned max;
    vm_connect_fn *connect;
    /* Say in `out` how the VMM of that definition ended ("" if nothing is known). May be NULL. */
    void (*describe_end)(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg);
    /* A VM's process was found dead; in the registry's own thread. May be NULL. */
    void (*died)(const struct vm_definition *d, void *arg);
    void *arg; /* of all three */
};

struct vms;
struct vm;

/*
 * Read the records. Adoption goes on in a thread of its own; vms_settle waits for its first pass.
 */
struct vms *vms_open(const struct vms_params *params, struct vm_error **err);
/* Not in a callback; ends the thread. References that are still held stay valid. */
void vms_close(struct vms *vms);
DEFINE_CLEANUP(vms, struct vms *, vms_close)
/* Wait until every VM of the records was tried once; false if that takes longer. */
bool vms_settle(struct vms *vms, int timeout_ms);
/* The same of the VM of that name, if there is one: others do not matter. */
bool vms_settle_one(struct vms *vms, const char *name, int timeout_ms);

/*
 * Add a VM whose process lives; takes *guest over (sets it to NULL) on success. With no guest it is
 * UNREACHABLE until it answers, as one of the records. CONFLICT if the name is taken by a VM that
 * has not ended, or if the process is already here under another name.
 */
int vms_add(struct vms *vms, const struct vm_definition *d, struct guest **guest,
            struct vm_error **err);
/*
 * Keep room on the disk for the record of a VM that vms_add will add; NO_SPACE now rather than
 * then. vms_release if it will not. An agent's end forgets it.
 */
int vms_reserve(struct vms *vms, const struct vm_definition *d, struct vm_error **err);
void vms_release(struct vms *vms, const char *name);
/* Forget it. The VMM is not touched. */
int vms_remove(struct vms *vms, const char *name, struct vm_error **err);
/* Is the name free for vms_add? CONFLICT, or NO_SPACE when the table is full. */
int vms_check_free(struct vms *vms, const char *name, struct vm_error **err);

/* NOT_FOUND if there is none. Release with vm_put. */
struct vm *vms_get(struct vms *vms, const char *name, struct vm_error **err);
/* As vms_get; UNREACHABLE or VMM_DIED unless it is PRESENT, so vm_guest() is not NULL. */
struct vm *vms_get_present(struct vms *vms, const char *name, struct vm_error **err);
/* All, sorted by name: an allocated array (free it) of references (vm_put each). */
int vms_list(struct vms *vms, struct vm ***ret_vms, unsigned *ret_n, struct vm_error **err);
void vm_put(struct vm *vm);
DEFINE_CLEANUP(vm, struct vm *, vm_put)

/*
 * The connection of `lost`, a guest of that VM, has ended, though its process lives: connect again,
 * now, unless somebody has. vm_guest() is the new one, or still `lost` if the VMM does not answer. The caller's
 * reference to `lost` stays the caller's.
 */
void vms_reconnect(struct vms *vms, struct vm *vm, struct guest *lost);

const struct vm_definition *vm_definition(const struct vm *vm);
enum vm_presence vm_presence(const struct vm *vm);
/*
 * A reference to the guest of the last connection, for guest_unref; NULL unless the VM was adopted, and once it was,
 * never again. Any thread; see vmm/guest.h.
 */
struct guest *vm_guest(const struct vm *vm);
/* Why it is not PRESENT ("exited with status 1"), in `out`. */
const char *vm_detail(const struct vm *vm, char out[VM_DETAIL_MAX]);

/*
 * What the guest does now (guest_status), waiting for the VMM until the deadline only: TIMEOUT
 * then. A VMM that hangs is asked once, however often this is called. vm_ask begins without
 * waiting, so that many can be asked at once. Only for a VM with a guest.
 */
int vm_status(struct vm *vm, int64_t deadline_ns, struct guest_status *ret_status,
              struct vm_error **err);
void vm_ask(struct vm *vm);

const char *vm_origin_name(enum vm_origin origin);
const char *vm_driver_name(enum vm_driver driver);

#endif
