/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver: the VMMs of this host as the agent starts and finds them: which binaries it may run, as
 * whom, where their sockets and logs are, and what differs between kinds of VMMs (enum vm_driver). Beyond
 * this module a VM is a struct guest and a definition (vmm/qemu_definition.h), whatever its kind.
 *
 *     driver_run(...), driver_adopt(...)           a VM for the registry (agent/vms.h)
 *     driver_connect(...)                          the registry's, after a restart of the agent
 *     driver_define(guest, ...)                    source: what its destination has to be, and may it move
 *     driver_sink_start(...), driver_sink_adopt(...)   destination: a VMM that waits for that guest
 *     driver_reconnect(...)                        destination, after a restart of the agent
 *
 * A kind is a `struct driver` below, one file each: driver_qemu.c, driver_attach.c. Everything may block for
 * seconds. Threads: any.
 */
#ifndef VMMIG_AGENT_DRIVER_H
#define VMMIG_AGENT_DRIVER_H

#include "agent/config.h"
#include "agent/vms.h"
#include "vmm/qemu_definition.h"

enum { DRIVER_ATTACH_TIMEOUT_MS = 5000 };

/* Where a VM's things are. */
struct driver_place {
    char *socket_path; /* RUNTIME_DIR/NAME. and the driver's suffix */
    char *log_path;    /* LOG_DIR/NAME.log */
    char *cgroup;      /* VM_CGROUP/NAME, or NULL */
};

void driver_place_finish(struct driver_place *p);
static inline void driver_place_cleanup(struct driver_place *p)
{
    driver_place_finish(p);
}
#define cleanup_driver_place __attribute__((cleanup(driver_place_cleanup)))

/* What a new VMM's process waits for before it becomes one (vmm/spawn.h). */
struct driver_birth {
    int (*born)(const struct process_identity *process, void *arg, struct vm_error **err);
    void *arg;
};

/* A VMM that is about to be started. */
struct driver_launch {
    const struct config *config;
    const char *vm;
    const char *binary; /* of the configuration's list */
    struct driver_place place;
    char *const *argv;  /* of `vmmig run`; NULL for a sink */
    const char *cwd;    /* NULL: the driver's choice */
    uint64_t promised;  /* bytes of memory that look available, but are others' */
    const struct driver_birth *birth; /* NULL: nobody takes note */
};

/* Names for people; "" where the driver knows none. */
struct driver_info {
    char vmm[VM_DETAIL_MAX];      /* what the VMM calls itself */
    char tracking[VM_DETAIL_MAX]; /* how it finds written pages */
};

/* A kind of VMM. Guests that these calls return are the caller's. */
struct driver {
    const char *guest_driver;  /* guest_ops.driver */
    const char *socket_suffix; /* "qmp" */
    const char *title;         /* "a QEMU" */
    /* The listed binary that argv0 means, or NULL. */
    const char *(*find_binary)(const struct config *config, const char *argv0);
    struct guest *(*start)(const struct driver_launch *launch, struct vm_error **err);
    /* expected: the process that must answer, or NULL for any; another's is left alone. */
    struct guest *(*adopt)(const char *path, const struct process_identity *expected,
                           struct vm_error **err);
    int (*define)(struct guest *g, bool prepared, struct qemu_definition *ret, struct vm_error **err);
    /* NULL: nothing of a definition can change while the guest is copied. */
    int (*check_kept)(struct guest *g, const struct qemu_definition *d, struct vm_error **err);
    bool (*defines)(const struct qemu_definition *d);
    /* May a destination of this definition be started by an agent? */
    int (*check_startable)(const struct qemu_definition *d, struct vm_error **err);
    struct guest *(*sink_start)(const struct driver_launch *launch, const struct qemu_definition *d,
                                bool assume_shared, struct vm_error **err);
    /* NULL: it has no disks that it could boot from. */
    struct guest *(*boot)(const struct driver_launch *launch, const struct qemu_definition *d, struct vm_error **err);
    struct guest *(*sink_adopt)(const struct qemu_definition *d, const char *path,
                                struct vm_error **err);
    /* NULL: it has no disks that the agent knows of. */
    int (*sink_disks)(struct guest *g, const struct qemu_definition *d, struct qemu_definition *ret_here,
                      struct vm_error **err);
    /* NULL: a VMM has nothing of a snapshot in it. See driver_clear. */
    int (*clear)(struct guest *g, struct vm_error **err);
    void (*sink_release)(struct guest *g);
    void (*source_release)(struct guest *g); /* NULL: nothing is kept of a copy */
    void (*info)(struct guest *g, struct driver_info *ret);
};

extern const struct driver driver_qemu, driver_attach;

enum vm_driver driver_of(const struct guest *g);

/*
 * Start a VM from a user's command line; its kind is that of the list on which the binary is. When it fails
 * nothing is left.
 */
int driver_run(const struct config *config, const char *name, char *const *argv, const char *cwd,
               struct vm_definition *ret_definition, struct guest **ret_guest,
               struct vm_error **err);
/* Adopt one that runs. */
int driver_adopt(enum vm_driver driver, const char *name, const char *path,
                 struct vm_definition *ret_definition, struct guest **ret_guest,
                 struct vm_error **err);

/*
 * What a destination for this guest has to be; REFUSED by name when it cannot move. `prepared`: the user names
 * a VMM of kind `prepared_driver` that waits there; else the agent there is to start one.
 */
int driver_define(struct guest *g, bool prepared, enum vm_driver prepared_driver,
                  struct qemu_definition *ret_definition, struct vm_error **err);

/*
 * The guest was copied: does it stand as it was sent, and is it still what its definition says, by
 * which the destination was made? REFUSED, by name, if a disk of it was changed meanwhile.
 */
int driver_check_kept(struct guest *g, const struct qemu_definition *d, struct vm_error **err);

/* Take out what a snapshot that was cut short left in the VMM: -1 if some of it may let the guest go on later. */
int driver_clear(struct guest *g, struct vm_error **err);

enum vm_driver driver_of_definition(const struct qemu_definition *d);
/*
 * The binary of the configuration's lists that a VM is started with whose definition comes from another host or out
 * of the repository. REFUSED: there is none, or it would be run as root though nobody said that it may.
 */
const char *driver_find_binary(const struct config *config, const struct qemu_definition *d,
                               struct vm_error **err);
/*
 * Where the socket of a VM of that name is when the agent starts it; allocated. NULL: no memory.
 */
char *driver_socket_path(const struct config *config, const char *name, enum vm_driver driver);
/*
 * Start a VMM that waits for the guest of a validated definition, from an allowed binary, checked against the
 * definition; at driver_socket_path. promised: bytes of memory that are not taken yet, but will be by others.
 */
struct guest *driver_sink_start(const struct config *config, const char *name,
                                const struct qemu_definition *d, bool assume_shared, uint64_t promised,
                                const struct driver_birth *birth, struct vm_error **err);
/* Likewise, one that starts anew: it stands before its first instruction. */
struct guest *driver_boot(const struct config *config, const char *name, const struct qemu_definition *d,
                          const struct driver_birth *birth, struct vm_error **err);
/* One that waits there already; REFUSED if it is not what the definition says. */
struct guest *driver_sink_adopt(const struct qemu_definition *d, const char *path,
                                struct vm_error **err);
/*
 * Of one that was adopted: ret_here->disks[i] is what it has open as the writable d->disks[i]; ret_here->cwd is what
 * relative names refer to. REFUSED, by name, unless it writes the VM's disks and no other.
 */
int driver_sink_disks(struct guest *g, const struct qemu_definition *d, struct qemu_definition *ret_here,
                      struct vm_error **err);
/* The VMM at that socket, if it is that process; another's is left alone (REFUSED). */
struct guest *driver_reconnect(enum vm_driver driver, const char *path,
                               const struct process_identity *expected, struct vm_error **err);
/* For the drivers: is the guest that of `expected`, which may be NULL for any? */
int driver_check_process(const struct guest *g, const struct process_identity *expected,
                         const char *path, struct vm_error **err);

/*
 * The guest of a sink runs, and nothing will be written into it from here any more: unmap its memory, so
 * that it is the VMM's alone and ends with it. Nothing for a guest that is no sink.
 */
void driver_sink_release(struct guest *g);
/*
 * The guest stays, whose copy was complete: what was kept of it, so that the guest goes on the sooner, goes. Resuming
 * it does the same, but for one that its user has stopped, or whose answer was lost.
 */
void driver_source_release(struct guest *g);

void driver_get_info(struct guest *g, struct driver_info *ret_info);

/* For vms_params; arg is the configuration. */
struct guest *driver_connect(const struct vm_definition *d, void *arg, struct vm_error **err);
void driver_describe_end(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg);
/* Removes its cgroup, which cannot be removed while a process is in it. */
void driver_forget_dead(const struct vm_definition *d, void *arg);
/* The VMM ended and its name is still ours: remove the socket, unless the VM's user made it. */
void driver_remove_socket(const struct vm_definition *d);

#endif
