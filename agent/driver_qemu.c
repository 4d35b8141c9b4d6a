/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU as the agent starts and finds it (vmm/qemu.h). */
#include "agent/driver.h"

#include "base/log.h"
#include "vmm/qemu.h"
#include "vmm/qemu_preflight.h"
#include "vmm/qemu_settings.h"
#include "vmm/qemu_snapshot.h"

static struct qemu_launch make_launch(const struct driver_launch *l)
{
    return (struct qemu_launch){.binary = l->binary,
                                .argv = l->argv,
                                .cwd = l->cwd,
                                .qmp_path = l->place.socket_path,
                                .log_path = l->place.log_path,
                                .user = l->config->vm_user,
                                .cgroup = l->place.cgroup,
                                .born = l->birth ? l->birth->born : NULL,
                                .born_arg = l->birth ? l->birth->arg : NULL};
}

static struct guest *guest_of(struct qemu *q)
{
    return q ? qemu_guest(q) : NULL;
}

static struct guest *start(const struct driver_launch *l, struct vm_error **err)
{
    struct qemu_launch launch = make_launch(l);
    return guest_of(qemu_spawn(&launch, err));
}

static struct guest *adopt(const char *path, const struct process_identity *expected,
                           struct vm_error **err)
{
    bool found = false;
    cleanup_error struct vm_error *failed = NULL;
    struct qemu *q = qemu_attach(path, DRIVER_ATTACH_TIMEOUT_MS, err);
    CLEANUP(guest) struct guest *guest = guest_of(q);
    if (!guest || driver_check_process(guest, expected, path, err) < 0)
        return NULL;
    /* A former agent may have ended while it took a snapshot. */
    if (qemu_snapshot_sweep(q, &found, &failed) < 0)
        log_warn("what a snapshot left in QEMU stays there", "qmp=%s error=%s", log_q(path),
                 log_q(error_message(failed)));
    else if (found)
        log_warn("a snapshot was cut short; it is taken out of QEMU", "qmp=%s", log_q(path));
    qemu_settings_recover(q);
    return steal_ptr(&guest);
}

static int clear(struct guest *g, struct vm_error **err)
{
    return qemu_snapshot_clear(qemu_from_guest(g), err);
}

static int define(struct guest *g, bool prepared, struct qemu_definition *ret, struct vm_error **err)
{
    return qemu_preflight(qemu_from_guest(g), prepared, ret, err);
}

static int check_kept(struct guest *g, const struct qemu_definition *d, struct vm_error **err)
{
    return qemu_check_kept(qemu_from_guest(g), d, err);
}

static bool defines(const struct qemu_definition *d)
{
    return !driver_attach.defines(d);
}

/* One that waits for its guest, or boots. */
static struct guest *start_defined(const struct driver_launch *l, const struct qemu_definition *d,
                                   bool assume_shared, bool boots, struct vm_error **err)
{
    const struct config *c = l->config;
    struct qemu_name_map maps[CONFIG_LIST_MAX];
    struct qemu_sink_params params = {
        .definition = d, .vm = l->vm, .launch = make_launch(l), .maps = maps, .n_maps = c->maps.n};
    struct qemu_host host = {.binary = l->binary,
                             .user = c->vm_user,
                             .assume_shared = assume_shared,
                             .promised = l->promised,
                             .scratch_dir = c->runtime_dir};
    for (unsigned i = 0; i < c->maps.n; i++)
        maps[i] = (struct qemu_name_map){c->maps.list[i].from, c->maps.list[i].to};
    if (qemu_dest_check(d, &host, err) < 0)
        return NULL;
    struct vm_error *failed = NULL;
    struct qemu *q = (boots ? qemu_boot_spawn : qemu_sink_spawn)(&params, &failed);
    if (!q)
        qemu_dest_explain(d, &host, failed, err);
    return guest_of(q);
}

static struct guest *sink_start(const struct driver_launch *l, const struct qemu_definition *d,
                                bool assume_shared, struct vm_error **err)
{
    return start_defined(l, d, assume_shared, false, err);
}

static struct guest *boot(const struct driver_launch *l, const struct qemu_definition *d, struct vm_error **err)
{
    return start_defined(l, d, true, true, err);
}

static struct guest *sink_adopt(const struct qemu_definition *d, const char *path,
                                struct vm_error **err)
{
    return guest_of(qemu_sink_attach(d, path, DRIVER_ATTACH_TIMEOUT_MS, err));
}

static int sink_disks(struct guest *g, const struct qemu_definition *d, struct qemu_definition *ret_here,
                      struct vm_error **err)
{
    return qemu_prepared_disks(qemu_from_guest(g), d, ret_here, err);
}

static void sink_release(struct guest *g)
{
    qemu_sink_release(qemu_from_guest(g));
}

const struct driver driver_qemu = {.guest_driver = "qemu",
                                   .socket_suffix = "qmp",
                                   .title = "a QEMU",
                                   .find_binary = config_find_vmm,
                                   .start = start,
                                   .adopt = adopt,
                                   .define = define,
                                   .check_kept = check_kept,
                                   .defines = defines,
                                   .sink_start = sink_start,
                                   .boot = boot,
                                   .sink_adopt = sink_adopt,
                                   .sink_disks = sink_disks,
                                   .clear = clear,
                                   .sink_release = sink_release};
