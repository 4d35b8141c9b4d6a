/* SPDX-License-Identifier: Apache-2.0 */
/* The destination's half of vmm/qemu_preflight.h. */
#include "base/cleanup.h"
#include "base/io.h"
#include "vmm/qemu_inspect.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_preflight.h"
#include "vmm/qemu_sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { PROBE_TIMEOUT_MS = 10000, KILL_TIMEOUT_MS = 5000, PROC_FILE_MAX = 64 << 10 };

/* A machine type that this binary has, asked of a QEMU that does nothing else. */

static int find_machine(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    CLEANUP(json) json_t *machines = NULL;
    size_t i;
    json_t *machine;
    if (qemu_command(q, "query-machines", NULL, &machines, err) < 0)
        return -1;
    json_array_foreach(machines, i,
                       machine) if (!strcmp(qmp_string(machine, "name"), d->machine)) return 0;
    const struct qmp_version *v = qmp_version(qemu_qmp(q));
    return error_set(
        err, VM_ERROR_REFUSED,
        "QEMU %d.%d.%d of this host does not have the machine type %s (the VM runs under "
        "QEMU %d.%d.%d)",
        v->major, v->minor, v->micro, d->machine, d->version[0], d->version[1], d->version[2]);
}

static int probe(const struct qemu_definition *d, const struct qemu_host *host,
                 struct vm_error **err)
{
    static char machine[] = "-machine", none[] = "none", nodefaults[] = "-nodefaults",
                no_user_config[] = "-no-user-config", display[] = "-display";
    cleanup_free char *program = strdup(host->binary);
    if (!program)
        return error_nomem(err);
    char *argv[] = {program, machine, none, nodefaults, no_user_config, display, none, NULL};
    struct uuid unique = uuid_new();
    /* No longer than the agent's own socket there: so long that it had room may be the name of the
     * folder. */
    cleanup_free char *qmp_path = NULL, *log_path = NULL;
    if (asprintf(&qmp_path, "%s/p%.7s.qmp", host->scratch_dir, uuid_text(&unique)) < 0 ||
        asprintf(&log_path, "%s/p%.7s.log", host->scratch_dir, uuid_text(&unique)) < 0)
        return error_nomem(err);
    struct qemu_launch launch = {.binary = host->binary,
                                 .argv = argv,
                                 .qmp_path = qmp_path,
                                 .log_path = log_path,
                                 .user = host->user,
                                 .timeout_ms = PROBE_TIMEOUT_MS};
    struct qemu *q = qemu_spawn(&launch, err);
    int rc = q ? find_machine(q, d, err) : -1;
    if (q) {
        guest_kill(qemu_guest(q), KILL_TIMEOUT_MS, NULL);
        qemu_destroy(q);
    }
    unlink(qmp_path);
    unlink(log_path);
    return rc;
}

static int check_accel(const struct qemu_definition *d, struct vm_error **err)
{
    if (strcmp(d->accel, "kvm"))
        return 0;
    cleanup_close int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return error_set(err, VM_ERROR_REFUSED,
                         "the VM needs KVM, and /dev/kvm cannot be opened: %s", strerror(errno));
    return 0;
}

/* A number after `key` in a file of /proc or /sys; the first number of the file for key "". */
static int read_number(const char *path, const char *key, uint64_t *ret, struct vm_error **err)
{
    cleanup_free char *text = NULL;
    size_t n;
    if (io_read_file(path, PROC_FILE_MAX, &text, &n, err) < 0)
        return -1;
    const char *at = strstr(text, key);
    if (!at || sscanf(at + strlen(key), " %" SCNu64, ret) != 1)
        return error_set(err, VM_ERROR_SYSTEM, "%s has no %s", path, key);
    return 0;
}

static int read_huge_pages(uint64_t page_size, const char *file, uint64_t *ret)
{
    char path[128];
    snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%" PRIu64 "kB/%s",
             page_size >> 10, file);
    return read_number(path, "", ret, NULL);
}

static int check_huge_pages(const struct qemu_definition *d, uint64_t page_size,
                            struct vm_error **err)
{
    uint64_t free_pages, promised, needed = qemu_definition_memory(d, page_size);
    if (read_huge_pages(page_size, "free_hugepages", &free_pages) < 0 ||
        read_huge_pages(page_size, "resv_hugepages", &promised) < 0)
        return error_set(err, VM_ERROR_REFUSED, "this host has no huge pages of %" PRIu64 " KiB",
                         page_size >> 10);
    /* Those that a mapping has reserved are free until they are touched. */
    free_pages -= promised < free_pages ? promised : free_pages;
    if (free_pages < needed / page_size)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "the VM needs %" PRIu64 " huge pages of %" PRIu64 " KiB, %" PRIu64
                         " are free",
                         needed / page_size, page_size >> 10, free_pages);
    return 0;
}

static int check_memory(const struct qemu_definition *d, const struct qemu_host *host,
                        struct vm_error **err)
{
    uint64_t available_kib, needed = qemu_definition_memory(d, GUEST_PAGE_SIZE);
    if (read_number("/proc/meminfo", "MemAvailable:", &available_kib, err) < 0)
        return -1;
    if (available_kib < needed >> 10)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "the VM needs %" PRIu64 " MiB of memory, %" PRIu64 " MiB are available",
                         needed >> 20, available_kib >> 10);
    if (available_kib < (needed + host->promised) >> 10)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "the VM needs %" PRIu64 " MiB of memory; %" PRIu64 " MiB are available, of which %" PRIu64
                         " MiB are for VMs that are arriving",
                         needed >> 20, available_kib >> 10, host->promised >> 20);
    for (unsigned i = 0; i < d->n_ram; i++)
        if (d->ram[i].page_size != GUEST_PAGE_SIZE &&
            check_huge_pages(d, d->ram[i].page_size, err) < 0)
            return -1;
    return 0;
}

static bool is_path(const struct qemu_disk *disk)
{
    return !strcmp(disk->driver, "file") || !strcmp(disk->driver, "host_device") ||
           !strcmp(disk->driver, "host_cdrom");
}

int qemu_check_cache(const struct qemu_definition *d, const struct qemu_disk *disk,
                     struct vm_error **err)
{
    struct process_identity self;
    if (process_identify(getpid(), &self, err) < 0)
        return -1;
    if (!disk->writable || !disk->cached || uuid_equal(&self.boot, &d->boot))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "disk %s (%s) goes through a host's page cache: start the VM with cache=none "
                     "(cache.direct=on), or say --assume-shared if the file system keeps both "
                     "hosts' caches alike",
                     disk->name, disk->file);
}

static int check_disk(const struct qemu_definition *d, const struct qemu_host *host,
                      const struct qemu_disk *disk, struct vm_error **err)
{
    char path[2 * QEMU_STRING_MAX];
    struct stat st;
    if (!is_path(disk))
        return 0;
    snprintf(path, sizeof(path), "%s%s%s", *disk->file == '/' ? "" : d->cwd,
             *disk->file == '/' ? "" : "/", disk->file);
    if (stat(path, &st) < 0)
        return error_errno(err, errno, "disk %s: %s", disk->name, path);
    return host->assume_shared ? 0 : qemu_check_cache(d, disk, err);
}

static int check_disks(const struct qemu_definition *d, const struct qemu_host *host,
                       struct vm_error **err)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (check_disk(d, host, &d->disks[i], err) < 0)
            return -1;
    return 0;
}

int qemu_dest_check(const struct qemu_definition *d, const struct qemu_host *host,
                    struct vm_error **err)
{
    if (access(host->binary, X_OK) < 0)
        return error_errno(err, errno, "cannot run %s", host->binary);
    return check_accel(d, err) < 0 || check_memory(d, host, err) < 0 || check_disks(d, host, err) < 0 ||
                   qemu_sockets_check_free(d->argv, d->cwd, err) < 0
               ? -1
               : 0;
}

int qemu_dest_explain(const struct qemu_definition *d, const struct qemu_host *host,
                      struct vm_error *failed, struct vm_error **err)
{
    struct vm_error *why = NULL;
    if (failed->kind == VM_ERROR_VMM_DIED && probe(d, host, &why) < 0 &&
        why->kind == VM_ERROR_REFUSED) {
        error_free(failed);
        return error_propagate(err, why);
    }
    error_free(why);
    return error_propagate(err, failed);
}

/* The QEMU that waits against the definition. */

static int differ(struct vm_error **err, const char *what, const char *there, const char *here)
{
    return error_set(err, VM_ERROR_REFUSED,
                     "the destination's QEMU is not the same machine: %s is '%.200s', not '%.200s'",
                     what, here, there);
}

/* Both lists are sorted by path: the lesser path is the one that the other side lacks. */
static int verify_devices(const struct qemu_definition *d, const struct qemu_definition *here,
                          struct vm_error **err)
{
    for (unsigned i = 0; i < d->n_devices || i < here->n_devices; i++) {
        int order = i == here->n_devices ? -1
                    : i == d->n_devices  ? 1
                                         : strcmp(d->devices[i].path, here->devices[i].path);
        const struct qemu_device *odd = order < 0 ? &d->devices[i] : &here->devices[i];
        if (order)
            return error_set(err, VM_ERROR_REFUSED,
                             "the destination's QEMU is not the same machine: %s %s %s",
                             order < 0 ? "it lacks" : "the VM lacks its", odd->path, odd->type);
        if (strcmp(d->devices[i].type, here->devices[i].type))
            return differ(err, d->devices[i].path, d->devices[i].type, here->devices[i].type);
    }
    return 0;
}

/* Every word of `a` that is not zero stands in `b`, too. The first that does not, or NULL. */
static const char *find_lacking_feature(const char *a, const char *b)
{
    for (; *a; a += strcspn(a, ";") + 1) {
        char word[96];
        int n = snprintf(word, sizeof(word), "%.*s;", (int)strcspn(a, ";"), a);
        bool zero = n > 10 && !strcmp(word + n - 10, "=00000000;");
        const char *found = b;
        while (!zero && (found = strstr(found, word)) && found != b && found[-1] != ';')
            found++;
        if (!zero && !found)
            return a;
        if (!a[strcspn(a, ";")])
            break;
    }
    return NULL;
}

static int verify_features(const char *there, const char *here, struct vm_error **err)
{
    const char *lacking = find_lacking_feature(there, here);
    const char *extra = lacking ? NULL : find_lacking_feature(here, there);
    const char *word = lacking ? lacking : extra;
    if (!word)
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "the CPU that this host offers is not the guest's: CPUID word %.*s is %s",
                     (int)strcspn(word, ";"), word, lacking ? "missing" : "new");
}

static int verify_cpus(const struct qemu_definition *d, const struct qemu_definition *here,
                       struct vm_error **err)
{
    char there_n[16], here_n[16];
    snprintf(there_n, sizeof(there_n), "%u", d->n_cpus);
    snprintf(here_n, sizeof(here_n), "%u", here->n_cpus);
    if (d->n_cpus != here->n_cpus)
        return differ(err, "the number of CPUs", there_n, here_n);
    if (strcmp(d->cpu_model, here->cpu_model))
        return differ(err, "the CPU model", d->cpu_model, here->cpu_model);
    return verify_features(d->cpu_features, here->cpu_features, err);
}

int qemu_verify_cpus(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition here = {0};
    return qemu_inspect_cpus(q, &here, err) < 0 ? -1 : verify_cpus(d, &here, err);
}

static int verify_ram(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    cleanup_free struct qemu_ram_block *blocks = NULL;
    unsigned n;
    if (qemu_inspect_ram_blocks(q, &blocks, &n, err) < 0)
        return -1;
    for (unsigned i = 0; i < d->n_ram; i++) {
        const struct qemu_ram *ram = &d->ram[i];
        const struct qemu_ram_block *block = qemu_find_ram_block(blocks, n, ram->block);
        if (!block)
            return differ(err, "a memory block", ram->block, "missing");
        if (block->used != ram->size || block->page_size != ram->page_size)
            return error_set(
                err, VM_ERROR_REFUSED,
                "the destination's QEMU is not the same machine: memory block %s has %" PRIu64
                " MiB in pages of %" PRIu64 " KiB, not %" PRIu64 " MiB in pages of %" PRIu64 " KiB",
                ram->block, block->used >> 20, block->page_size >> 10, ram->size >> 20,
                ram->page_size >> 10);
    }
    return 0;
}

int qemu_verify(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition here = {0};
    if (qemu_inspect_machine(q, &here, err) < 0 || qemu_inspect_cpus(q, &here, err) < 0 ||
        qemu_inspect_devices(q, &here, err) < 0)
        return -1;
    if (strcmp(d->machine, here.machine))
        return differ(err, "the machine type", d->machine, here.machine);
    if (strcmp(d->accel, here.accel))
        return differ(err, "the accelerator", d->accel, here.accel);
    return verify_cpus(d, &here, err) < 0 || verify_devices(d, &here, err) < 0
               ? -1
               : verify_ram(q, d, err);
}
