/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_inspect.h"

#include "base/bytes.h"
#include "vmm/qemu_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

int qemu_set_text(char **to, const char *text, struct vm_error **err)
{
    char *copy = strdup(text);
    if (!copy)
        return error_nomem(err);
    free(*to);
    *to = copy;
    return 0;
}

static int qom_get(struct qemu *q, const char *path, const char *property, json_t **ret,
                   struct vm_error **err)
{
    return qemu_command(q, "qom-get", json_pack("{s:s, s:s}", "path", path, "property", property),
                        ret, err);
}

int qemu_inspect_machine(struct qemu *q, struct qemu_definition *d, struct vm_error **err)
{
    static const char suffix[] = "-machine";
    CLEANUP(json) json_t *type = NULL;
    CLEANUP(json) json_t *kvm = NULL;
    if (qom_get(q, "/machine", "type", &type, err) < 0 ||
        qemu_command(q, "query-kvm", NULL, &kvm, err) < 0)
        return -1;
    char name[256];
    snprintf(name, sizeof(name), "%s", json_is_string(type) ? json_string_value(type) : "");
    size_t n = strlen(name);
    if (n > strlen(suffix) && !strcmp(name + n - strlen(suffix), suffix))
        name[n - strlen(suffix)] = 0;
    if (qemu_set_text(&d->machine, name, err) < 0 ||
        qemu_set_text(&d->accel, qmp_bool(kvm, "enabled") ? "kvm" : "tcg", err) < 0)
        return -1;
    const struct qmp_version *v = qmp_version(qemu_qmp(q));
    d->version[0] = v->major;
    d->version[1] = v->minor;
    d->version[2] = v->micro;
    return 0;
}

/* CPUID words as "leaf.subleaf.REGISTER=value;": the CPU that the guest sees. Only x86 has them. */
static int format_features(const json_t *words, struct buffer *out)
{
    size_t i;
    json_t *w;
    char text[96];
    json_array_foreach(words, i, w)
    {
        int n = snprintf(text, sizeof(text),
                         "%" JSON_INTEGER_FORMAT ".%" JSON_INTEGER_FORMAT ".%.8s=%08" PRIx64 ";",
                         qmp_integer(w, "cpuid-input-eax"), qmp_integer(w, "cpuid-input-ecx"),
                         qmp_string(w, "cpuid-register"), (uint64_t)qmp_integer(w, "features"));
        buffer_put(out, text, (size_t)n);
    }
    buffer_put_u8(out, 0);
    return out->failed ? -1 : 0;
}

int qemu_inspect_cpus(struct qemu *q, struct qemu_definition *d, struct vm_error **err)
{
    CLEANUP(json) json_t *cpus = NULL;
    CLEANUP(json) json_t *type = NULL;
    CLEANUP(json) json_t *words = NULL;
    cleanup_buffer struct buffer features = {.limit = 4 * QEMU_STRING_MAX};
    struct vm_error *lacking = NULL;
    if (qemu_command(q, "query-cpus-fast", NULL, &cpus, err) < 0)
        return -1;
    const char *path = qmp_string(json_array_get(cpus, 0), "qom-path");
    if (qom_get(q, path, "type", &type, err) < 0)
        return -1;
    if (qom_get(q, path, "feature-words", &words, &lacking) < 0 &&
        lacking->kind != VM_ERROR_REFUSED)
        return error_propagate(err, lacking);
    error_free(lacking);
    if (format_features(words, &features) < 0)
        return error_nomem(err);
    d->n_cpus = (unsigned)json_array_size(cpus);
    if (qemu_set_text(&d->cpu_model, json_is_string(type) ? json_string_value(type) : "", err) < 0)
        return -1;
    return qemu_set_text(&d->cpu_features, (const char *)features.data, err);
}

static int add_device(struct qemu_definition *d, const char *folder, const json_t *member,
                      struct vm_error **err)
{
    const char *type = qmp_string(member, "type");
    if (strncmp(type, "child<", strlen("child<")))
        return 0;
    if (d->n_devices == QEMU_DEVICES_MAX)
        return error_set(err, VM_ERROR_REFUSED, "the VM has more than %d devices",
                         QEMU_DEVICES_MAX);
    struct qemu_device *device = qemu_definition_add_device(d);
    if (!device)
        return error_nomem(err);
    if (asprintf(&device->path, "%s/%s", folder, qmp_string(member, "name")) < 0) {
        device->path = NULL;
        return error_nomem(err);
    }
    return qemu_set_text(&device->type, type, err);
}

static int by_path(const void *a, const void *b)
{
    return strcmp(((const struct qemu_device *)a)->path, ((const struct qemu_device *)b)->path);
}

int qemu_inspect_devices(struct qemu *q, struct qemu_definition *d, struct vm_error **err)
{
    static const char *const folders[] = {"/machine/peripheral", "/machine/peripheral-anon"};
    for (size_t i = 0; i < sizeof(folders) / sizeof(*folders); i++) {
        CLEANUP(json) json_t *members = NULL;
        size_t k;
        json_t *member;
        if (qemu_command(q, "qom-list", json_pack("{s:s}", "path", folders[i]), &members, err) < 0)
            return -1;
        json_array_foreach(members, k,
                           member) if (add_device(d, folders[i], member, err) < 0) return -1;
    }
    if (d->n_devices)
        qsort(d->devices, d->n_devices, sizeof(*d->devices), by_path);
    return 0;
}

/* "  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 ..." */
static bool parse_ram_block(const char *line, struct qemu_ram_block *ret)
{
    char name[GUEST_REGION_NAME_MAX], unit[8];
    unsigned long long psize, offset, used;
    if (sscanf(line, " %255s %llu %7s %llx %llx", name, &psize, unit, &offset, &used) != 5)
        return false;
    unsigned shift = !strcmp(unit, "KiB")   ? 10
                     : !strcmp(unit, "MiB") ? 20
                     : !strcmp(unit, "GiB") ? 30
                                            : 0;
    memcpy(ret->name, name, sizeof(name));
    ret->page_size = psize << shift;
    ret->used = used;
    return shift != 0;
}

int qemu_inspect_ram_blocks(struct qemu *q, struct qemu_ram_block **ret_blocks, unsigned *ret_n,
                            struct vm_error **err)
{
    CLEANUP(json) json_t *reply = NULL;
    if (qemu_command(q, "human-monitor-command",
                     json_pack("{s:s}", "command-line", "info ramblock"), &reply, err) < 0)
        return -1;
    const char *text = json_string_value(reply);
    if (!text)
        return error_set(err, VM_ERROR_PROTOCOL, "QEMU does not list its RAM blocks");
    size_t lines = 1;
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    struct qemu_ram_block *blocks = calloc(lines, sizeof(*blocks));
    if (!blocks)
        return error_nomem(err);
    unsigned n = 0;
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        n += parse_ram_block(line, &blocks[n]);
    }
    *ret_blocks = blocks;
    *ret_n = n;
    return 0;
}

const struct qemu_ram_block *qemu_find_ram_block(const struct qemu_ram_block *blocks, unsigned n,
                                                 const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(blocks[i].name, name))
            return &blocks[i];
    return NULL;
}
