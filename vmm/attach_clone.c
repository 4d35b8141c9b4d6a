/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/attach_clone.h"

#include "base/clock.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KILL_TIMEOUT_MS = 5000 };

static int check(struct attach *a, const struct qemu_definition *d, uint64_t *ret_memory, struct vm_error **err)
{
    if (attach_check_waits(a, d, err) < 0)
        return -1;
    if (!attach_info(a)->takes_files)
        return error_set(err, VM_ERROR_REFUSED,
                         "%s cannot run on a template's memory: restore the snapshot instead",
                         attach_info(a)->vmm);
    return attach_check_slots(a, d, ret_memory, err);
}

static int map_files(struct attach *a, const struct attach_clone_params *p, uint64_t memory, struct vm_error **err)
{
    Vmmig__Attach__MapFile m = VMMIG__ATTACH__MAP_FILE__INIT;
    m.memory = memory;
    for (unsigned i = 0; i < p->definition->n_ram; i++) {
        m.slot = i;
        if (attach_request(&a->client, VMMIG__ATTACH__TYPE__MAP_FILE, &m.base, p->ram_fds[i],
                           VMMIG__ATTACH__TYPE__OK, NULL, err) < 0)
            return -1;
    }
    return 0;
}

static int load(struct attach *a, int state_fd, uint64_t memory, struct vm_error **err)
{
    struct stat st;
    Vmmig__Attach__Load m = VMMIG__ATTACH__LOAD__INIT;
    if (fstat(state_fd, &st) < 0)
        return error_errno(err, errno, "the template's device state");
    m.size = (uint64_t)st.st_size;
    m.memory = memory;
    return attach_request(&a->client, VMMIG__ATTACH__TYPE__LOAD, &m.base, state_fd,
                          VMMIG__ATTACH__TYPE__OK, NULL, err);
}

static int fill(struct attach *a, const struct attach_clone_params *p, struct vm_error **err)
{
    uint64_t memory;
    if (check(a, p->definition, &memory, err) < 0 || map_files(a, p, memory, err) < 0 ||
        load(a, p->state_fd, memory, err) < 0)
        return -1;
    return p->definition->state == GUEST_RUNNING ? guest_resume(&a->guest, err) : guest_release(&a->guest, err);
}

struct attach *attach_clone_spawn(const struct attach_clone_params *params,
                                  struct clone_timing *ret_timing, struct vm_error **err)
{
    struct attach_launch launch = params->launch;
    struct clone_timing timing = {.spawned_ns = clock_mono_ns()};
    launch.spawn.argv = params->definition->argv;
    launch.spawn.cwd = params->definition->cwd;
    CLEANUP(attach) struct attach *a = attach_spawn(&launch, err);
    if (!a)
        return NULL;
    if (fill(a, params, err) < 0) {
        guest_kill(&a->guest, KILL_TIMEOUT_MS, NULL);
        unlink(launch.socket_path);
        return NULL;
    }
    timing.running_ns = clock_mono_ns();
    *ret_timing = timing;
    return steal_ptr(&a);
}
