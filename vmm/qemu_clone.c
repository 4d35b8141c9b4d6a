/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_clone.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_own.h"
#include "vmm/qemu_preflight.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

enum { LOAD_TIMEOUT_MS = 600000, KILL_TIMEOUT_MS = 5000, POLL_US = 500, STATE_FD_TEXT = 24 };

struct making {
    const struct qemu_clone_params *params;
    struct qemu_clone_notes *notes;
    struct qemu_argv a;
    bool *tap_used; /* of params->taps */
    bool has_generation, has_uuid, has_name;
    unsigned n_given; /* MACs that QEMU chose by itself */
};

static const char *or_empty(const char *text)
{
    return text ? text : "";
}

static void note(struct making *m, const char *text)
{
    if (m->notes->n < QEMU_CLONE_NOTES_MAX)
        snprintf(m->notes->text[m->notes->n++], QEMU_CLONE_NOTE_MAX, "%s", text);
}

/* ---- disks ---- */

/* Which saved disk the properties are of: by its file, then by its name. -1. */
static int match_disk(const struct qemu_definition *d, const struct qemu_props *p)
{
    static const char *const files[] = {"file", "filename", "file.filename"};
    static const char *const names[] = {"node-name", "id"};
    for (unsigned i = 0; i < d->n_disks; i++) {
        for (size_t k = 0; k < sizeof(files) / sizeof(*files); k++)
            if (!strcmp(or_empty(qemu_props_get(p, files[k])), d->disks[i].file))
                return (int)i;
        for (size_t k = 0; k < sizeof(names) / sizeof(*names); k++) {
            const char *name = or_empty(qemu_props_get(p, names[k]));
            if (*name && (!strcmp(name, d->disks[i].name) || !strcmp(name, d->disks[i].node)))
                return (int)i;
        }
    }
    return -1;
}

/* Has the guest a disk of its own there, of which a clone gets an overlay? */
static bool is_own_disk(const struct qemu_json *vm, int disk)
{
    return disk >= 0 && *vm->disk_files[disk] && vm->definition.disks[disk].writable;
}

/* -1: the option is of no such disk. */
static int own_disk_of(const struct qemu_json *vm, const struct qemu_option *o)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if ((strcmp(o->name, "drive") && strcmp(o->name, "blockdev")) ||
        qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, NULL) < 0)
        return -1;
    int disk = match_disk(&vm->definition, &p);
    return is_own_disk(vm, disk) ? disk : -1;
}

int qemu_clone_first_disk(const struct qemu_json *vm, unsigned *ret_disk, struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_parse(vm->definition.argv, &a, err) < 0)
        return -1;
    for (unsigned i = 0; i < a.n; i++) {
        int disk = own_disk_of(vm, &a.options[i]);
        if (disk < 0)
            continue;
        *ret_disk = (unsigned)disk;
        return 0;
    }
    return error_set(err, VM_ERROR_REFUSED, "it has no disk to make larger");
}

static int replace_drive(struct qemu_props *p, const char *overlay, struct vm_error **err)
{
    for (unsigned i = p->n; i-- > 0;)
        if (!strncmp(p->list[i].key, "file.", 5) || !strncmp(p->list[i].key, "backing", 7))
            qemu_props_remove(p, p->list[i].key);
    return qemu_props_set(p, "file", overlay, err) < 0 ? -1
                                                       : qemu_props_set(p, "format", "qcow2", err);
}

/* The node that devices name becomes a qcow2 node of that name upon the overlay. */
static int replace_blockdev(struct qemu_props *p, const char *overlay, struct vm_error **err)
{
    static const char *const kept[] = {"node-name", "read-only", "discard", "detect-zeroes"};
    cleanup_qemu_props struct qemu_props to = {0};
    if (qemu_props_set(&to, "driver", "qcow2", err) < 0)
        return -1;
    for (size_t k = 0; k < sizeof(kept) / sizeof(*kept); k++) {
        const char *value = qemu_props_get(p, kept[k]);
        if (value && qemu_props_set(&to, kept[k], value, err) < 0)
            return -1;
    }
    if (qemu_props_set(&to, "file.driver", "file", err) < 0 ||
        qemu_props_set(&to, "file.filename", overlay, err) < 0)
        return -1;
    qemu_props_finish(p);
    *p = to;
    to = (struct qemu_props){0};
    return 0;
}

/* The -blockdev whose `file` is the node of that name; -1. */
static int find_user_of(struct making *m, const char *node)
{
    for (unsigned i = 0; *node && i < m->a.n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (!strcmp(m->a.options[i].name, "blockdev") &&
            qemu_props_parse(m->a.options[i].value, "driver", &p, NULL) == 0 &&
            !strcmp(or_empty(qemu_props_get(&p, "file")), node))
            return (int)i;
    }
    return -1;
}

static int put_props(struct making *m, unsigned i, const struct qemu_props *p,
                     struct vm_error **err)
{
    char *text = qemu_props_format(p, qemu_option_implied_key(m->a.options[i].name));
    if (!text)
        return error_nomem(err);
    qemu_argv_set(&m->a, i, text);
    return 0;
}

static int place_disk(struct making *m, unsigned *i, struct vm_error **err)
{
    struct qemu_option *o = &m->a.options[*i];
    bool blockdev = !strcmp(o->name, "blockdev");
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0)
        return -1;
    int disk = match_disk(&m->params->vm->definition, &p);
    const char *overlay = disk < 0 ? NULL : m->params->disk_paths[disk];
    if (!overlay)
        return 0;
    if (!blockdev)
        return replace_drive(&p, overlay, err) < 0 ? -1 : put_props(m, *i, &p, err);
    int user = find_user_of(m, or_empty(qemu_props_get(&p, "node-name")));
    if (user < 0)
        return replace_blockdev(&p, overlay, err) < 0 ? -1 : put_props(m, *i, &p, err);
    cleanup_qemu_props struct qemu_props top = {0};
    if (qemu_props_parse(m->a.options[user].value, "driver", &top, err) < 0 ||
        replace_blockdev(&top, overlay, err) < 0 || put_props(m, (unsigned)user, &top, err) < 0)
        return -1;
    qemu_argv_remove(&m->a, *i);
    --*i;
    return 0;
}

/* ---- devices ---- */

static int place_name(struct making *m, struct qemu_props *p, bool *ret_changed,
                      struct vm_error **err)
{
    m->has_name = *ret_changed = true;
    return qemu_props_set(p, "guest", m->params->name, err);
}

/* What the guest has: QEMU gives NICs without a MAC one after the other. */
static int note_mac(struct making *m, const struct qemu_props *p, const char *fresh,
                    struct vm_error **err)
{
    const char *mac = qemu_props_get(p, "mac");
    char given[QEMU_MAC_SIZE];
    snprintf(given, sizeof(given), "52:54:00:12:34:%02x", (0x56 + m->n_given) & 0xff);
    m->n_given += !mac;
    if (m->notes->n_macs == QEMU_CLONE_MACS_MAX)
        return error_set(err, VM_ERROR_REFUSED,
                         "it has more than %d NICs: say --set mac=keep", QEMU_CLONE_MACS_MAX);
    struct qemu_clone_mac *note = &m->notes->macs[m->notes->n_macs++];
    snprintf(note->from, QEMU_MAC_SIZE, "%s", mac ? mac : given);
    snprintf(note->to, QEMU_MAC_SIZE, "%s", fresh);
    return 0;
}

static int fresh_mac(struct making *m, struct qemu_props *p, struct vm_error **err)
{
    struct uuid u = uuid_new();
    char text[QEMU_MAC_SIZE];
    /* QEMU's own prefix; the rest is random. */
    snprintf(text, sizeof(text), "52:54:00:%02x:%02x:%02x", u.bytes[0], u.bytes[1], u.bytes[2]);
    return note_mac(m, p, text, err) < 0 ? -1 : qemu_props_set(p, "mac", text, err);
}

static bool is_nic(const struct qemu_props *p)
{
    return qemu_props_get(p, "netdev") != NULL;
}

static int place_device(struct making *m, struct qemu_props *p, bool *ret_changed,
                        struct vm_error **err)
{
    const char *driver = or_empty(qemu_props_get(p, "driver"));
    if (!strcmp(driver, "vmgenid")) {
        struct uuid fresh = uuid_new();
        m->has_generation = *ret_changed = true;
        return qemu_props_set(p, "guid", uuid_text(&fresh), err);
    }
    if (!is_nic(p) || m->params->keep_macs)
        return 0;
    *ret_changed = true;
    return fresh_mac(m, p, err);
}

static int place_netdev(struct making *m, struct qemu_props *p, bool *ret_changed,
                        struct vm_error **err)
{
    const char *id = or_empty(qemu_props_get(p, "id")), *tap = qemu_props_get(p, "ifname");
    if (!tap)
        return 0;
    for (unsigned i = 0; i < m->params->n_taps; i++)
        if (!strcmp(m->params->taps[i].from, id)) {
            *ret_changed = m->tap_used[i] = true;
            return qemu_props_set(p, "ifname", m->params->taps[i].to, err);
        }
    return error_set(err, VM_ERROR_REFUSED,
                     "its NIC %s is on tap %s, which two VMs cannot share: say --set %s=TAP",
                     *id ? id : "without a name", tap, *id ? id : "ID");
}

static int place_memory(struct making *m, struct qemu_props *p, bool *ret_changed,
                        struct vm_error **err)
{
    const struct qemu_definition *d = &m->params->vm->definition;
    const char *id = or_empty(qemu_props_get(p, "id"));
    if (strncmp(or_empty(qemu_props_get(p, "qom-type")), "memory-backend-", 15))
        return 0;
    for (unsigned i = 0; i < d->n_ram; i++) {
        if (strcmp(d->ram[i].backend, id))
            continue;
        if (d->ram[i].page_size != GUEST_PAGE_SIZE)
            return error_set(err, VM_ERROR_REFUSED,
                             "its memory %s is of huge pages, which clones cannot share", id);
        *ret_changed = true;
        qemu_props_remove(p, "prealloc");
        return qemu_props_set(p, "qom-type", "memory-backend-file", err) < 0 ||
                       qemu_props_set(p, "mem-path", m->params->ram_paths[i], err) < 0
                   ? -1
                   : qemu_props_set(p, "share", "off", err);
    }
    return error_set(err, VM_ERROR_CORRUPT, "memory backend '%.64s' was not saved", id);
}

static bool is_one_of(const char *name, const char *const *list)
{
    for (; *list; list++)
        if (!strcmp(name, *list))
            return true;
    return false;
}

static int place_option(struct making *m, unsigned *i, struct vm_error **err)
{
    static const char *const props[] = {"name", "device", "netdev", "object", NULL};
    const struct qemu_own own = {m->params->vm->name, m->params->name, true};
    struct qemu_option *o = &m->a.options[*i];
    if (!strcmp(o->name, "drive") || !strcmp(o->name, "blockdev"))
        return place_disk(m, i, err);
    if (!strcmp(o->name, "uuid")) {
        struct uuid u = uuid_new();
        char *fresh = strdup(uuid_text(&u));
        m->has_uuid = true;
        if (fresh)
            qemu_argv_set(&m->a, *i, fresh);
        return fresh ? 0 : error_nomem(err);
    }
    if (!is_one_of(o->name, props))
        return qemu_own_option(&own, &m->a, *i, err);
    cleanup_qemu_props struct qemu_props p = {0};
    bool changed = false;
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0)
        return -1;
    int r = !strcmp(o->name, "name")     ? place_name(m, &p, &changed, err)
            : !strcmp(o->name, "device") ? place_device(m, &p, &changed, err)
            : !strcmp(o->name, "netdev") ? place_netdev(m, &p, &changed, err)
                                         : place_memory(m, &p, &changed, err);
    return r < 0 || !changed ? r : put_props(m, *i, &p, err);
}

static int add_rest(struct making *m, struct vm_error **err)
{
    char incoming[STATE_FD_TEXT];
    struct uuid u = uuid_new();
    snprintf(incoming, sizeof(incoming), "fd:%d", m->params->state_fd);
    if ((!m->has_name && qemu_argv_add(&m->a, "name", m->params->name, err) < 0) ||
        (!m->has_uuid && qemu_argv_add(&m->a, "uuid", uuid_text(&u), err) < 0) ||
        qemu_argv_add(&m->a, "incoming", incoming, err) < 0)
        return -1;
    if (m->params->vm->definition.state == GUEST_PAUSED)
        return qemu_argv_add(&m->a, "S", NULL, err);
    return 0;
}

static bool has_room(const struct making *m)
{
    for (unsigned i = 0; i < m->a.n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (!strcmp(m->a.options[i].name, "m") && m->a.options[i].value &&
            qemu_props_parse(m->a.options[i].value, "size", &p, NULL) == 0 &&
            qemu_props_get(&p, "maxmem"))
            return true;
    }
    return false;
}

static int check_memory(const struct making *m, struct vm_error **err)
{
    uint64_t wanted = m->params->memory, has = m->params->vm->definition.memory;
    if (!wanted || wanted == has)
        return 0;
    if (wanted < has || (wanted - has) % QEMU_CLONE_MEMORY_STEP)
        return error_set(err, VM_ERROR_USAGE,
                         "--memory: a clone has the %" PRIu64 " MiB of its template, and may get "
                         "multiples of %llu MiB more",
                         has >> 20, QEMU_CLONE_MEMORY_STEP >> 20);
    return has_room(m) ? 0
                       : error_set(err, VM_ERROR_REFUSED,
                                   "--memory: the template's VM was not started so that memory can be plugged "
                                   "in (-m ...,slots=N,maxmem=SIZE)");
}

int qemu_clone_argv(const struct qemu_clone_params *params, struct qemu_clone_notes *ret_notes,
                    char ***ret_argv, struct vm_error **err)
{
    struct qemu_clone_notes notes = {.n = 0};
    struct making m = {.params = params, .notes = &notes};
    cleanup_free bool *used = m.tap_used = calloc(params->n_taps + 1, sizeof(bool));
    int r = used ? qemu_argv_parse(params->vm->definition.argv, &m.a, err) : error_nomem(err);
    if (r == 0)
        r = qemu_argv_check_movable(&m.a, true, err);
    if (r == 0)
        r = check_memory(&m, err);
    for (unsigned i = 0; r == 0 && i < m.a.n; i++)
        r = place_option(&m, &i, err);
    for (unsigned i = 0; r == 0 && i < params->n_taps; i++)
        if (!used[i])
            r = error_set(err, VM_ERROR_USAGE, "--set %.40s: the template has no NIC of that name on a tap",
                          params->taps[i].from);
    if (r == 0)
        r = add_rest(&m, err);
    if (r == 0 && !m.has_generation)
        note(&m, "the guest has no vmgenid device: it is not told that it is a clone");
    if (r == 0 && !(*ret_argv = qemu_argv_format(&m.a)))
        r = error_nomem(err);
    qemu_argv_finish(&m.a);
    if (r == 0)
        *ret_notes = notes;
    return r;
}

/* ---- running ---- */

/* Until QEMU has loaded the state and runs, or stands where it is to stand. */
static int wait_loaded(struct qemu *q, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + LOAD_TIMEOUT_MS * NSEC_PER_MSEC;
    char state[32];
    do {
        if (qemu_query_run_state(q, state, err) < 0)
            return error_wrap(err, "the state was not loaded");
        if (!strcmp(state, "running") || !strcmp(state, "paused"))
            return 0;
        if (strcmp(state, "inmigrate"))
            return error_set(err, VM_ERROR_FAILED, "QEMU is '%s' after loading the state", state);
        usleep(POLL_US);
    } while (clock_mono_ns() < deadline);
    return error_set(err, VM_ERROR_TIMEOUT, "QEMU does not finish loading the state");
}

struct qemu *qemu_clone_spawn(const struct qemu_clone_params *params, char *const *argv,
                              struct clone_timing *ret_timing, struct vm_error **err)
{
    struct qemu_launch launch = params->launch;
    struct clone_timing timing = {.spawned_ns = clock_mono_ns()};
    launch.argv = argv;
    launch.fds = &params->state_fd;
    launch.n_fds = 1;
    launch.cwd = launch.cwd ? launch.cwd : params->vm->definition.cwd;
    if (lseek(params->state_fd, 0, SEEK_SET) < 0)
        return error_errno(err, errno, "the state of %s", params->name), NULL;
    struct qemu *q = qemu_spawn(&launch, err);
    if (!q)
        return NULL;
    /* A state that was saved while the guest stood for an instant makes QEMU stand, too. */
    bool run = params->vm->definition.state == GUEST_RUNNING;
    if (wait_loaded(q, err) < 0 || qemu_verify_cpus(q, &params->vm->definition, err) < 0 ||
        (run && guest_resume(&q->guest, err) < 0)) {
        guest_kill(&q->guest, KILL_TIMEOUT_MS, NULL);
        unlink(launch.qmp_path);
        qemu_destroy(q);
        return NULL;
    }
    timing.running_ns = clock_mono_ns();
    *ret_timing = timing;
    return q;
}

/* The block device or node whose file that is. */
static int find_block(struct qemu *q, const char *path, json_t **ret_args, struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    size_t i;
    json_t *node;
    if (qemu_command(q, "query-named-block-nodes", NULL, &nodes, err) < 0)
        return -1;
    json_array_foreach(nodes, i, node)
    {
        if (strcmp(qmp_string(node, "file"), path) || strcmp(qmp_string(node, "drv"), "qcow2"))
            continue;
        *ret_args = json_pack("{s:s}", "node-name", qmp_string(node, "node-name"));
        return 0;
    }
    return error_set(err, VM_ERROR_FAILED, "QEMU has no disk %s", path);
}

int qemu_clone_resize(struct qemu *q, const char *disk_path, uint64_t size, struct vm_error **err)
{
    json_t *args = NULL;
    if (find_block(q, disk_path, &args, err) < 0)
        return -1;
    json_object_set_new(args, "size", json_integer((json_int_t)size));
    return qemu_command(q, "block_resize", args, NULL, err);
}

static int plug_dimm(struct qemu *q, uint64_t size, struct vm_error **err)
{
    struct uuid unique = uuid_new();
    char memory[32], dimm[32];
    snprintf(memory, sizeof(memory), "memory-%.8s", uuid_text(&unique));
    snprintf(dimm, sizeof(dimm), "dimm-%.8s", uuid_text(&unique));
    return qemu_command(q, "object-add",
                        json_pack("{s:s, s:s, s:I}", "qom-type", "memory-backend-ram", "id", memory,
                                  "size", (json_int_t)size),
                        NULL, err) < 0 ||
                   qemu_command(q, "device_add",
                                json_pack("{s:s, s:s, s:s}", "driver", "pc-dimm", "id", dimm,
                                          "memdev", memory),
                                NULL, err) < 0
               ? -1
               : 0;
}

int qemu_clone_grow(struct qemu *q, uint64_t size, struct vm_error **err)
{
    CLEANUP(json) json_t *summary = NULL;
    if (qemu_command(q, "query-memory-size-summary", NULL, &summary, err) < 0)
        return -1;
    uint64_t has = (uint64_t)(qmp_integer(summary, "base-memory") +
                              qmp_integer(summary, "plugged-memory"));
    if (size > has && plug_dimm(q, size - has, err) < 0)
        return error_wrap(err, "--memory: %" PRIu64 " MiB cannot be plugged in", (size - has) >> 20);
    return 0;
}
