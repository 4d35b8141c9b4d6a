/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver: the VMMs of this host as the agent starts and finds them: which binaries it may run, as
 * whom, where their sockets and logs are. Everything may block for seconds. Threads: any.
 */
#ifndef VMMIG_AGENT_DRIVER_H
#define VMMIG_AGENT_DRIVER_H

#include "agent/config.h"
#include "agent/vms.h"
#include "vmm/qemu_spawn.h"

/* Where a VM's things are; for qemu_launch, whose pointers are to this. */
struct driver_place {
    char *qmp_path; /* RUNTIME_DIR/NAME.qmp */
    char *log_path; /* LOG_DIR/NAME.log */
    char *cgroup;   /* VM_CGROUP/NAME, or NULL */
};

void driver_place_finish(struct driver_place *p);
static inline void driver_place_cleanup(struct driver_place *p)
{
    driver_place_finish(p);
}
#define cleanup_driver_place __attribute__((cleanup(driver_place_cleanup)))

/*
 * What every launch on this host has in common; argv, fds and cwd are the caller's to set. REFUSED
 * if argv0 is not among the binaries that the configuration lists. `place` outlives `launch`.
 */
int driver_prepare_launch(const struct config *config, const char *name, const char *argv0,
                          struct driver_place *ret_place, struct qemu_launch *ret_launch,
                          struct vm_error **err);

/* Where the socket of a VM of that name is when the agent starts it; allocated. NULL: no memory. */
char *driver_socket_path(const struct config *config, const char *name);

/* Start a VM from a user's command line. When it fails nothing is left. */
int driver_run(const struct config *config, const char *name, char *const *argv, const char *cwd,
               struct vm_definition *ret_definition, struct guest **ret_guest,
               struct vm_error **err);
/* Adopt one that runs. */
int driver_attach(const char *name, const char *qmp_path, struct vm_definition *ret_definition,
                  struct guest **ret_guest, struct vm_error **err);

/* For vms_params; arg is the configuration. */
struct guest *driver_connect(const struct vm_definition *d, void *arg, struct vm_error **err);
void driver_describe_end(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg);
/* Removes its cgroup, which cannot be removed while a process is in it. */
void driver_forget_dead(const struct vm_definition *d, void *arg);

#endif
