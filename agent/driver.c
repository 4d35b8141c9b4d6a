/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/driver.h"

#include "base/clock.h"
#include "vmm/qemu.h"

#include <string.h>

enum { ATTACH_TIMEOUT_MS = 5000, KILL_TIMEOUT_MS = 10000 };

void driver_place_finish(struct driver_place *p)
{
    free(p->qmp_path);
    free(p->log_path);
    free(p->cgroup);
    *p = (struct driver_place){0};
}

char *driver_socket_path(const struct config *config, const char *name)
{
    char *path;
    return asprintf(&path, "%s/%s.qmp", config->runtime_dir, name) < 0 ? NULL : path;
}

static int make_place(const struct config *config, const char *name, struct driver_place *place,
                      struct vm_error **err)
{
    place->qmp_path = driver_socket_path(config, name);
    if (!place->qmp_path)
        return error_nomem(err);
    if (asprintf(&place->log_path, "%s/%s.log", config->log_dir, name) < 0) {
        place->log_path = NULL;
        return error_nomem(err);
    }
    if (*config->vm_cgroup && asprintf(&place->cgroup, "%s/%s", config->vm_cgroup, name) < 0) {
        place->cgroup = NULL;
        return error_nomem(err);
    }
    return 0;
}

int driver_prepare_launch(const struct config *config, const char *name, const char *argv0,
                          struct driver_place *ret_place, struct qemu_launch *ret_launch,
                          struct vm_error **err)
{
    const char *binary = config_find_vmm(config, argv0);
    if (!binary)
        return error_set(err, VM_ERROR_REFUSED,
                         "%.256s is not among the binaries that may be run as a VM (`vmm` in the "
                         "agent's configuration)",
                         argv0);
    cleanup_driver_place struct driver_place place = {0};
    if (make_place(config, name, &place, err) < 0)
        return -1;
    *ret_launch = (struct qemu_launch){
        .binary = binary,
        .qmp_path = place.qmp_path,
        .log_path = place.log_path,
        .user = config->vm_user,
        .cgroup = place.cgroup,
    };
    *ret_place = place;
    place = (struct driver_place){0};
    return 0;
}

/* What is known of a guest that was just started or found. */
static int define(const char *name, enum vm_origin origin, const struct guest *guest,
                  const char *qmp_path, char *const *argv, struct vm_definition *ret,
                  struct vm_error **err)
{
    struct vm_definition d = {
        .origin = origin,
        .argv = (char **)(uintptr_t)argv,
        .qmp_path = (char *)(uintptr_t)qmp_path,
        .process = guest->process,
        .since_ns = clock_wall_ns(),
    };
    strcpy(d.name, name);
    return vm_definition_copy(&d, ret, err);
}

int driver_run(const struct config *config, const char *name, char *const *argv, const char *cwd,
               struct vm_definition *ret_definition, struct guest **ret_guest,
               struct vm_error **err)
{
    cleanup_driver_place struct driver_place place = {0};
    struct qemu_launch launch;
    if (driver_prepare_launch(config, name, argv[0], &place, &launch, err) < 0)
        return -1;
    launch.argv = argv;
    launch.cwd = cwd && *cwd ? cwd : NULL;
    struct qemu *q = qemu_spawn(&launch, err);
    if (!q)
        return -1;
    struct guest *guest = qemu_guest(q);
    if (define(name, VM_ORIGIN_RUN, guest, place.qmp_path, argv, ret_definition, err) < 0) {
        guest_kill(guest, KILL_TIMEOUT_MS, NULL);
        guest_destroy(guest);
        return -1;
    }
    *ret_guest = guest;
    return 0;
}

int driver_attach(const char *name, const char *qmp_path, struct vm_definition *ret_definition,
                  struct guest **ret_guest, struct vm_error **err)
{
    cleanup_free char **argv = NULL;
    struct qemu *q = qemu_attach(qmp_path, ATTACH_TIMEOUT_MS, err);
    if (!q)
        return -1;
    CLEANUP(guest) struct guest *guest = qemu_guest(q);
    if (process_argv(guest->process.pid, &argv, err) < 0 ||
        define(name, VM_ORIGIN_ATTACHED, guest, qmp_path, argv, ret_definition, err) < 0)
        return -1;
    *ret_guest = steal_ptr(&guest);
    return 0;
}

struct guest *driver_connect(const struct vm_definition *d, void *arg, struct vm_error **err)
{
    (void)arg;
    struct qemu *q = qemu_attach(d->qmp_path, ATTACH_TIMEOUT_MS, err);
    return q ? qemu_guest(q) : NULL;
}

void driver_describe_end(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg)
{
    const struct config *config = arg;
    cleanup_driver_place struct driver_place place = {0};
    char line[QEMU_SPAWN_MESSAGE_MAX] = "";
    out[0] = 0;
    /* The output of a VM that was attached goes elsewhere. */
    if (d->origin == VM_ORIGIN_ATTACHED || make_place(config, d->name, &place, NULL) < 0)
        return;
    qemu_log_last_line(place.log_path, 0, line);
    field_make_text(line, VM_DETAIL_MAX - 64);
    if (*line)
        snprintf(out, VM_DETAIL_MAX, "its process ended; the last it said was: %s", line);
}

void driver_forget_dead(const struct vm_definition *d, void *arg)
{
    const struct config *config = arg;
    cleanup_driver_place struct driver_place place = {0};
    if (d->origin != VM_ORIGIN_ATTACHED && make_place(config, d->name, &place, NULL) == 0 &&
        place.cgroup)
        rmdir(place.cgroup);
}
