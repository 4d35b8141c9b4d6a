/* SPDX-License-Identifier: Apache-2.0 */
/* VMMs that link libvmmig-attach, as the agent starts and finds them (vmm/attach.h). */
#include "agent/driver.h"

#include "vmm/attach.h"

#include <string.h>

static struct attach_launch make_launch(const struct driver_launch *l)
{
    return (struct attach_launch){.spawn = {.binary = l->binary,
                                            .argv = l->argv,
                                            .cwd = l->cwd,
                                            .log_path = l->place.log_path,
                                            .user = l->config->vm_user,
                                            .cgroup = l->place.cgroup,
                                            .born = l->birth ? l->birth->born : NULL,
                                            .born_arg = l->birth ? l->birth->arg : NULL},
                                  .socket_path = l->place.socket_path,
                                  .name = l->vm};
}

static struct guest *guest_of(struct attach *a)
{
    return a ? attach_guest(a) : NULL;
}

static struct guest *start(const struct driver_launch *l, struct vm_error **err)
{
    struct attach_launch launch = make_launch(l);
    return guest_of(attach_spawn(&launch, err));
}

static struct guest *adopt(const char *path, const struct process_identity *expected,
                           struct vm_error **err)
{
    CLEANUP(guest) struct guest *guest =
        guest_of(attach_connect(path, DRIVER_ATTACH_TIMEOUT_MS, err));
    if (!guest || driver_check_process(guest, expected, path, err) < 0)
        return NULL;
    return steal_ptr(&guest);
}

static int define(struct guest *g, bool prepared, struct qemu_definition *ret, struct vm_error **err)
{
    (void)prepared;
    return attach_define(attach_from_guest(g), ret, err);
}

static int check_startable(const struct qemu_definition *d, struct vm_error **err)
{
    if (strcmp(d->binary, ATTACH_NO_BINARY))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "%s does not say how a destination is started: start one there and name it with "
                     "--dest-socket",
                     d->cpu_model);
}

static struct guest *sink_start(const struct driver_launch *l, const struct qemu_definition *d,
                                bool assume_shared, struct vm_error **err)
{
    struct attach_launch launch = make_launch(l);
    (void)assume_shared; /* it has no disks that the agent knows of */
    return guest_of(attach_sink_spawn(d, &launch, err));
}

static struct guest *sink_adopt(const struct qemu_definition *d, const char *path,
                                struct vm_error **err)
{
    return guest_of(attach_sink_connect(d, path, DRIVER_ATTACH_TIMEOUT_MS, err));
}

static void sink_release(struct guest *g)
{
    attach_sink_release(attach_from_guest(g));
}

static void source_release(struct guest *g)
{
    attach_end_copy(attach_from_guest(g));
}

static void info(struct guest *g, struct driver_info *ret)
{
    const struct attach_info *i = attach_info(attach_from_guest(g));
    snprintf(ret->vmm, sizeof(ret->vmm), "%s", i->vmm);
    snprintf(ret->tracking, sizeof(ret->tracking), "%s", i->tracking);
}

const struct driver driver_attach = {.guest_driver = "attach",
                                     .socket_suffix = "vmm",
                                     .title = "a VMM that links libvmmig-attach",
                                     .find_binary = config_find_attach_vmm,
                                     .start = start,
                                     .adopt = adopt,
                                     .define = define,
                                     .defines = attach_is_definition,
                                     .check_startable = check_startable,
                                     .sink_start = sink_start,
                                     .sink_adopt = sink_adopt,
                                     .sink_release = sink_release,
                                     .source_release = source_release,
                                     .info = info};
