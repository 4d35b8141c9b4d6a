/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/vm_record.h"

#include "base/bytes.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "proto/record.pb-c.h"
#include "proto/unpack.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <xxhash.h>

enum { MAGIC_SIZE = sizeof(VM_RECORD_MAGIC) - 1, HEADER_SIZE = MAGIC_SIZE + 8 };

/* A record that is written later may be longer by this: its numbers have grown. */
#define ROOM_SLACK 64
static const char room_suffix[] = VM_RECORD_SUFFIX ".room";

static char *path_of(const char *folder, const char *name, const char *suffix,
                     struct vm_error **err)
{
    char *path;
    if (asprintf(&path, "%s/%s%s", folder, name, suffix) >= 0)
        return path;
    error_nomem(err);
    return NULL;
}

static char *record_path(const char *folder, const char *name, struct vm_error **err)
{
    return path_of(folder, name, VM_RECORD_SUFFIX, err);
}

static size_t count(char *const *argv)
{
    size_t n = 0;
    while (argv && argv[n])
        n++;
    return n;
}

static int pack(const struct vm_definition *d, struct buffer *out, struct vm_error **err)
{
    Vmmig__Record__Vm m = VMMIG__RECORD__VM__INIT;
    m.name = (char *)(uintptr_t)d->name;
    m.origin = d->origin;
    m.argv = d->argv;
    m.n_argv = count(d->argv);
    m.socket_path = d->socket_path;
    m.boot = (ProtobufCBinaryData){sizeof(d->process.boot.bytes),
                                   (uint8_t *)(uintptr_t)d->process.boot.bytes};
    m.pid = d->process.pid;
    m.start = d->process.start;
    m.since_ns = d->since_ns;
    m.driver = d->driver;
    out->limit = VM_RECORD_MAX;
    buffer_put(out, VM_RECORD_MAGIC, MAGIC_SIZE);
    buffer_put_le64(out, 0);
    uint8_t *payload = buffer_grow(out, vmmig__record__vm__get_packed_size(&m));
    if (!payload)
        return error_set(err, VM_ERROR_NO_SPACE, "the record of VM %s is too large", d->name);
    size_t n = vmmig__record__vm__pack(&m, payload);
    put_le64(out->data + MAGIC_SIZE, XXH3_64bits(payload, n));
    return 0;
}

int vm_record_reserve(const char *folder, const struct vm_definition *d, struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    cleanup_free char *path = path_of(folder, d->name, room_suffix, err);
    if (!path || pack(d, &out, err) < 0)
        return -1;
    cleanup_close int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int failed = fd < 0 ? errno : posix_fallocate(fd, 0, (off_t)(out.len + ROOM_SLACK));
    if (failed) {
        unlink(path);
        return error_errno(err, failed, "no room for the record of VM %s in %s", d->name, folder);
    }
    return 0;
}

void vm_record_release(const char *folder, const char *name)
{
    cleanup_free char *path = path_of(folder, name, room_suffix, NULL);
    if (path)
        unlink(path);
}

/* 1: it was written where there was room for it; 0: there is none; -1. */
static int write_into_room(const char *room, const char *path, const struct buffer *record,
                           struct vm_error **err)
{
    cleanup_close int fd = open(room, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    if (io_write_full(fd, record->data, record->len, INT64_MAX, -1, err) < 0)
        return error_wrap(err, "cannot write %s", room);
    if (ftruncate(fd, (off_t)record->len) < 0 || fsync(fd) < 0 || rename(room, path) < 0)
        return error_errno(err, errno, "cannot write %s", path);
    return io_sync_folder_of(path, err) < 0 ? -1 : 1;
}

int vm_record_write(const char *folder, const struct vm_definition *d, struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    cleanup_free char *path = record_path(folder, d->name, err);
    cleanup_free char *room = path_of(folder, d->name, room_suffix, err);
    if (!path || !room || pack(d, &out, err) < 0)
        return -1;
    if (FAULT("vms.record") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot write %s", path);
    int written = write_into_room(room, path, &out, err);
    return written ? (written < 0 ? -1 : 0)
                   : io_write_file_durably(path, out.data, out.len, 0600, err);
}

int vm_record_remove(const char *folder, const char *name, struct vm_error **err)
{
    cleanup_free char *path = record_path(folder, name, err);
    if (!path)
        return -1;
    if (unlink(path) < 0 && errno != ENOENT)
        return error_errno(err, errno, "cannot remove %s", path);
    cleanup_close int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0)
        return error_errno(err, errno, "cannot sync %s", folder);
    return 0;
}

static int corrupt(struct vm_error **err, const char *what)
{
    return error_set(err, VM_ERROR_CORRUPT, "%s", what);
}

static bool origin_is_known(unsigned origin)
{
#define X(id, number, name) || origin == number
    return false VM_ORIGINS(X);
#undef X
}

static bool driver_is_known(unsigned driver)
{
#define X(id, number, name) || driver == number
    return false VM_DRIVERS(X);
#undef X
}

/* Is what the file says a definition, and of the VM whose file it is? */
static int check(const Vmmig__Record__Vm *m, const char *name, struct vm_error **err)
{
    if (strcmp(m->name, name) || !vm_name_is_valid(name))
        return corrupt(err, "it is another VM's record");
    if (!origin_is_known(m->origin) || !driver_is_known(m->driver) || m->pid <= 0)
        return corrupt(err, "its fields are out of range");
    if (field_check_uuid("the boot id", m->boot.data, m->boot.len, err) < 0 ||
        field_check_path("the VMM's socket", m->socket_path, err) < 0 ||
        field_check_argv("the command line", m->argv, m->n_argv, err) < 0)
        return error_set_kind(err, VM_ERROR_CORRUPT);
    return 0;
}

static int to_definition(const Vmmig__Record__Vm *m, struct vm_definition *ret,
                         struct vm_error **err)
{
    struct vm_definition d = {.origin = (enum vm_origin)m->origin,
                              .driver = (enum vm_driver)m->driver,
                              .since_ns = m->since_ns};
    strcpy(d.name, m->name);
    d.process.pid = m->pid;
    d.process.start = m->start;
    memcpy(d.process.boot.bytes, m->boot.data, sizeof(d.process.boot.bytes));
    /* The copy wants an array that ends with NULL. */
    cleanup_free char **argv = calloc(m->n_argv + 1, sizeof(*argv));
    if (!argv)
        return error_nomem(err);
    memcpy(argv, m->argv, m->n_argv * sizeof(*argv));
    d.argv = argv;
    d.socket_path = m->socket_path;
    return vm_definition_copy(&d, ret, err);
}

int vm_record_parse(const char *data, size_t len, const char *name, struct vm_definition *ret,
                    struct vm_error **err)
{
    if (len < HEADER_SIZE || memcmp(data, VM_RECORD_MAGIC, MAGIC_SIZE))
        return corrupt(err, "it is not a VM's record");
    if (get_le64(data + MAGIC_SIZE) != XXH3_64bits(data + HEADER_SIZE, len - HEADER_SIZE))
        return corrupt(err, "its checksum is wrong");
    Vmmig__Record__Vm *m = (Vmmig__Record__Vm *)unpack_message(&vmmig__record__vm__descriptor, data + HEADER_SIZE,
                                                               len - HEADER_SIZE);
    if (!m)
        return corrupt(err, "it is malformed");
    int r = check(m, name, err) < 0 ? -1 : to_definition(m, ret, err);
    vmmig__record__vm__free_unpacked(m, NULL);
    return r;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), k = strlen(end);
    return n > k && !strcmp(text + n - k, end);
}

/* A record that cannot be used must not be lost, and must not keep the agent from starting. */
static void put_aside(const char *path, const struct vm_error *why)
{
    cleanup_free char *aside = NULL;
    bool moved = asprintf(&aside, "%s.damaged", path) >= 0 && rename(path, aside) == 0;
    log_error("a VM's record is damaged", "path=%s reason=%s put_aside=%s", log_q(path),
              log_q(error_message(why)), moved ? "yes" : "no");
}

/* 1: *ret was read; 0: this file is none, or was put aside. */
static int read_one(const char *folder, const char *file, struct vm_definition *ret,
                    struct vm_error **err)
{
    cleanup_free char *path = NULL, *data = NULL;
    cleanup_error struct vm_error *damage = NULL;
    size_t len;
    if (asprintf(&path, "%s/%s", folder, file) < 0)
        return error_nomem(err);
    if (ends_with(file, ".tmp") || ends_with(file, room_suffix)) {
        unlink(path);
        return 0;
    }
    if (!ends_with(file, VM_RECORD_SUFFIX))
        return 0;
    if (io_read_file(path, VM_RECORD_MAX, &data, &len, err) < 0)
        return -1;
    cleanup_free char *name = strndup(file, strlen(file) - strlen(VM_RECORD_SUFFIX));
    if (!name)
        return error_nomem(err);
    if (vm_record_parse(data, len, name, ret, &damage) == 0)
        return 1;
    put_aside(path, damage);
    return 0;
}

int vm_record_read_all(const char *folder, unsigned max, struct vm_definition **ret_list,
                       unsigned *ret_n, struct vm_error **err)
{
    struct vm_definition *list = calloc(max, sizeof(*list));
    unsigned n = 0;
    int r = 0;
    DIR *dir = list ? opendir(folder) : NULL;
    if (!list)
        return error_nomem(err);
    if (!dir)
        r = error_errno(err, errno, "cannot read %s", folder);
    for (struct dirent *entry; r >= 0 && (entry = readdir(dir));) {
        struct vm_definition d;
        r = read_one(folder, entry->d_name, &d, err);
        if (r <= 0)
            continue;
        if (n < max) {
            list[n++] = d;
        } else {
            vm_definition_finish(&d);
            r = error_set(err, VM_ERROR_NO_SPACE,
                          "%s has more than %u VMs; raise max-vms in the configuration", folder,
                          max);
        }
    }
    if (dir)
        closedir(dir);
    if (r < 0) {
        while (n)
            vm_definition_finish(&list[--n]);
        free(list);
        return -1;
    }
    *ret_list = list;
    *ret_n = n;
    return 0;
}
