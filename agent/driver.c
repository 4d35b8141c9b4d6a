/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/driver.h"

#include "base/clock.h"
#include "vmm/spawn.h"

#include <string.h>
#include <unistd.h>

enum { KILL_TIMEOUT_MS = 10000 };

static const struct driver *const drivers[] = {[VM_DRIVER_QEMU] = &driver_qemu,
                                               [VM_DRIVER_ATTACH] = &driver_attach};
#define N_DRIVERS (sizeof(drivers) / sizeof(*drivers))

enum vm_driver driver_of(const struct guest *g)
{
    for (size_t i = 0; i < N_DRIVERS; i++)
        if (!strcmp(drivers[i]->guest_driver, g->ops->driver))
            return (enum vm_driver)i;
    return VM_DRIVER_QEMU;
}

enum vm_driver driver_of_definition(const struct qemu_definition *d)
{
    for (size_t i = 0; i < N_DRIVERS; i++)
        if (drivers[i]->defines(d))
            return (enum vm_driver)i;
    return VM_DRIVER_QEMU;
}

/* ---- Places ---- */

void driver_place_finish(struct driver_place *p)
{
    free(p->socket_path);
    free(p->log_path);
    free(p->cgroup);
    *p = (struct driver_place){0};
}

static char *join(const char *folder, const char *name, const char *suffix)
{
    char *path;
    return asprintf(&path, "%s/%s%s", folder, name, suffix) < 0 ? NULL : path;
}

char *driver_socket_path(const struct config *config, const char *name, enum vm_driver driver)
{
    char suffix[16];
    snprintf(suffix, sizeof(suffix), ".%s", drivers[driver]->socket_suffix);
    return join(config->runtime_dir, name, suffix);
}

static int make_place(const struct config *config, const char *name, enum vm_driver driver,
                      struct driver_place *ret, struct vm_error **err)
{
    cleanup_driver_place struct driver_place place = {0};
    place.socket_path = driver_socket_path(config, name, driver);
    place.log_path = join(config->log_dir, name, ".log");
    if (*config->vm_cgroup)
        place.cgroup = join(config->vm_cgroup, name, "");
    if (!place.socket_path || !place.log_path || (*config->vm_cgroup && !place.cgroup))
        return error_nomem(err);
    *ret = place;
    place = (struct driver_place){0};
    return 0;
}

static int not_allowed(const char *argv0, const char *keys, struct vm_error **err)
{
    return error_set(err, VM_ERROR_REFUSED,
                     "%.256s is not among the binaries that may be run as a VM (%s in the agent's "
                     "configuration)",
                     argv0, keys);
}

/* ---- VMs of this host ---- */

/* What is known of a guest that was just started or found. */
static int describe(const char *name, enum vm_origin origin, const struct guest *guest,
                    const char *socket_path, char *const *argv, struct vm_definition *ret,
                    struct vm_error **err)
{
    struct vm_definition d = {
        .origin = origin,
        .argv = (char **)(uintptr_t)argv,
        .driver = driver_of(guest),
        .socket_path = (char *)(uintptr_t)socket_path,
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
    struct driver_launch launch = {
        .config = config, .vm = name, .argv = argv, .cwd = cwd && *cwd ? cwd : NULL};
    size_t i = 0;
    while (i < N_DRIVERS && !(launch.binary = drivers[i]->find_binary(config, argv[0])))
        i++;
    if (i == N_DRIVERS)
        return not_allowed(argv[0], "`vmm` and `attach-vmm`", err);
    if (make_place(config, name, (enum vm_driver)i, &launch.place, err) < 0)
        return -1;
    cleanup_driver_place struct driver_place place __attribute__((unused)) = launch.place;
    CLEANUP(guest) struct guest *guest = drivers[i]->start(&launch, err);
    if (!guest)
        return -1;
    if (describe(name, VM_ORIGIN_RUN, guest, place.socket_path, argv, ret_definition, err) < 0) {
        guest_kill(guest, KILL_TIMEOUT_MS, NULL);
        return -1;
    }
    *ret_guest = steal_ptr(&guest);
    return 0;
}

int driver_adopt(enum vm_driver driver, const char *name, const char *path,
                 struct vm_definition *ret_definition, struct guest **ret_guest,
                 struct vm_error **err)
{
    cleanup_free char **argv = NULL;
    CLEANUP(guest) struct guest *guest = drivers[driver]->adopt(path, NULL, err);
    if (!guest || process_argv(guest->process.pid, &argv, err) < 0 ||
        describe(name, VM_ORIGIN_ATTACHED, guest, path, argv, ret_definition, err) < 0)
        return -1;
    *ret_guest = steal_ptr(&guest);
    return 0;
}

int driver_check_process(const struct guest *g, const struct process_identity *expected,
                         const char *path, struct vm_error **err)
{
    if (!expected || process_identity_equal(&g->process, expected))
        return 0;
    return error_set(err, VM_ERROR_REFUSED, "another process, %d, answers at %s", g->process.pid,
                     path);
}

struct guest *driver_reconnect(enum vm_driver driver, const char *path,
                               const struct process_identity *expected, struct vm_error **err)
{
    return drivers[driver]->adopt(path, expected, err);
}

void driver_sink_release(struct guest *g)
{
    drivers[driver_of(g)]->sink_release(g);
}

void driver_source_release(struct guest *g)
{
    const struct driver *d = drivers[driver_of(g)];
    if (d->source_release)
        d->source_release(g);
}

void driver_get_info(struct guest *g, struct driver_info *ret_info)
{
    *ret_info = (struct driver_info){.vmm = ""};
    const struct driver *d = drivers[driver_of(g)];
    if (d->info)
        d->info(g, ret_info);
}

/* ---- The two ends of a migration ---- */

int driver_define(struct guest *g, bool prepared, enum vm_driver prepared_driver,
                  struct qemu_definition *ret_definition, struct vm_error **err)
{
    const struct driver *d = drivers[driver_of(g)], *there = drivers[prepared_driver];
    if (prepared && d != there)
        return error_set(err, VM_ERROR_REFUSED, "the guest of %s can be taken in by %s only, not by %s",
                         d->title, d->title, there->title);
    cleanup_qemu_definition struct qemu_definition made = {0};
    if (d->define(g, prepared, &made, err) < 0)
        return -1;
    if (!prepared && d->check_startable && d->check_startable(&made, err) < 0)
        return -1;
    *ret_definition = made;
    made = (struct qemu_definition){0};
    return 0;
}

int driver_check_kept(struct guest *g, const struct qemu_definition *d, struct vm_error **err)
{
    const struct driver *driver = drivers[driver_of(g)];
    return driver->check_kept ? driver->check_kept(g, d, err) : 0;
}

int driver_clear(struct guest *g, struct vm_error **err)
{
    const struct driver *d = drivers[driver_of(g)];
    return d->clear ? d->clear(g, err) : 0;
}

/* A command line of QEMU's can name programs to run and files to write. */
static int check_user(const struct config *config, struct vm_error **err)
{
    if (geteuid() != 0 || *config->vm_user)
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "a command line of another host or out of the repository is not run by root: "
                     "set `vm-user` in the agent's configuration (to root, if that is meant)");
}

const char *driver_find_binary(const struct config *config, const struct qemu_definition *d,
                               struct vm_error **err)
{
    if (check_user(config, err) < 0)
        return NULL;
    enum vm_driver kind = driver_of_definition(d);
    const char *binary = drivers[kind]->find_binary(config, d->binary);
    if (!binary)
        not_allowed(d->binary, kind == VM_DRIVER_QEMU ? "`vmm`" : "`attach-vmm`", err);
    return binary;
}

/* How a VMM of this definition is started here. */
static int make_launch(const struct config *config, const char *name, const struct qemu_definition *d,
                       const struct driver_birth *birth, struct driver_launch *ret, struct vm_error **err)
{
    *ret = (struct driver_launch){
        .config = config, .vm = name, .binary = driver_find_binary(config, d, err), .birth = birth};
    return ret->binary ? make_place(config, name, driver_of_definition(d), &ret->place, err) : -1;
}

struct guest *driver_sink_start(const struct config *config, const char *name,
                                const struct qemu_definition *d, bool assume_shared, uint64_t promised,
                                const struct driver_birth *birth, struct vm_error **err)
{
    struct driver_launch launch;
    if (make_launch(config, name, d, birth, &launch, err) < 0)
        return NULL;
    cleanup_driver_place struct driver_place place __attribute__((unused)) = launch.place;
    launch.promised = promised;
    return drivers[driver_of_definition(d)]->sink_start(&launch, d, assume_shared, err);
}

struct guest *driver_boot(const struct config *config, const char *name, const struct qemu_definition *d,
                          const struct driver_birth *birth, struct vm_error **err)
{
    const struct driver *driver = drivers[driver_of_definition(d)];
    struct driver_launch launch;
    if (!driver->boot) {
        error_set(err, VM_ERROR_REFUSED, "%s cannot be started anew from its disks", driver->title);
        return NULL;
    }
    if (make_launch(config, name, d, birth, &launch, err) < 0)
        return NULL;
    cleanup_driver_place struct driver_place place __attribute__((unused)) = launch.place;
    return driver->boot(&launch, d, err);
}

struct guest *driver_sink_adopt(const struct qemu_definition *d, const char *path,
                                struct vm_error **err)
{
    return drivers[driver_of_definition(d)]->sink_adopt(d, path, err);
}

int driver_sink_disks(struct guest *g, const struct qemu_definition *d,
                      struct qemu_definition *ret_here, struct vm_error **err)
{
    const struct driver *driver = drivers[driver_of(g)];
    if (driver->sink_disks)
        return driver->sink_disks(g, d, ret_here, err);
    *ret_here = (struct qemu_definition){0};
    return 0;
}

/* ---- The registry's ---- */

struct guest *driver_connect(const struct vm_definition *d, void *arg, struct vm_error **err)
{
    (void)arg;
    return driver_reconnect(d->driver, d->socket_path, &d->process, err);
}

void driver_describe_end(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg)
{
    const struct config *config = arg;
    cleanup_driver_place struct driver_place place = {0};
    char line[SPAWN_MESSAGE_MAX] = "";
    out[0] = 0;
    /* The output of a VM that was attached goes elsewhere. */
    if (d->origin == VM_ORIGIN_ATTACHED || make_place(config, d->name, d->driver, &place, NULL) < 0)
        return;
    spawn_log_last_line(place.log_path, 0, line);
    field_make_text(line, VM_DETAIL_MAX - 64);
    if (*line)
        snprintf(out, VM_DETAIL_MAX, "its process ended; the last it said was: %s", line);
}

void driver_forget_dead(const struct vm_definition *d, void *arg)
{
    const struct config *config = arg;
    cleanup_driver_place struct driver_place place = {0};
    if (d->origin != VM_ORIGIN_ATTACHED &&
        make_place(config, d->name, d->driver, &place, NULL) == 0 && place.cgroup)
        rmdir(place.cgroup);
}

void driver_remove_socket(const struct vm_definition *d)
{
    if (d->origin != VM_ORIGIN_ATTACHED)
        unlink(d->socket_path);
}
