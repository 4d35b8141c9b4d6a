/* SPDX-License-Identifier: Apache-2.0 */
/* Templates, clones and the mount. */
#include "base/clock.h"
#include "base/text.h"
#include "tools/cli.h"
#include "client/client.h"
#include "tools/cli_follow.h"
#include "tools/cli_print.h"

#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

static char *word(const char *text)
{
    return (char *)(uintptr_t)text;
}

/* ---- templates ---- */

static json_t *json_template(const Vmmig__Control__TemplateInfo *t)
{
    return json_pack("{s:s, s:s, s:s?, s:s, s:s, s:I, s:o, s:b}", "template", t->template_, "name",
                     t->name, "tag", *t->tag ? t->tag : NULL, "digest", t->digest, "source",
                     t->source, "size_bytes", (json_int_t)t->size, "published",
                     cli_json_instant(t->published_ns), "working_set", (int)t->working_set);
}

static void print_template(const Vmmig__Control__TemplateInfo *t)
{
    char when[32];
    time_t seconds = (time_t)(t->published_ns / NSEC_PER_SEC);
    struct tm tm;
    gmtime_r(&seconds, &tm);
    strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%SZ", &tm);
    printf("%-28s %.12s %s %10s  %s\n", t->template_, t->digest, when, text_size(t->size),
           t->source);
}

static void print_head(void)
{
    printf("%-28s %-12s %-20s %10s  %s\n", "TEMPLATE", "DIGEST", "PUBLISHED", "SIZE", "FROM");
}

/* About one template. */
static int ask_template(const struct cli *c, unsigned type, const ProtobufCMessage *request, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    if (client_ask(&c->at, type, request, VMMIG__CONTROL__TYPE__TEMPLATES, &answer, err) < 0)
        return -1;
    const Vmmig__Control__Templates *m = answer.templates;
    if (!m->n_templates)
        return error_set(err, VM_ERROR_PROTOCOL, "the agent names no template");
    if (c->json)
        return cli_print_json(json_template(m->templates[0]), err);
    print_head();
    print_template(m->templates[0]);
    return 0;
}

static int run_publish(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__TemplatePublish m = VMMIG__CONTROL__TEMPLATE_PUBLISH__INIT;
    m.image = word(c->args.list[0]);
    m.template_ = word(c->args.list[1]);
    return ask_template(c, VMMIG__CONTROL__TYPE__TEMPLATE_PUBLISH, &m.base, err);
}

/* Prints, or adds to json; `after` becomes the last of them. 1: there are more. */
static int list_some(const struct cli *c, char **after, json_t *json, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__TemplateList m = VMMIG__CONTROL__TEMPLATE_LIST__INIT;
    m.after = *after ? *after : word("");
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__TEMPLATE_LIST, &m.base, VMMIG__CONTROL__TYPE__TEMPLATES, &answer,
                   err) < 0)
        return -1;
    const Vmmig__Control__Templates *found = answer.templates;
    if (!c->json && !*after && found->n_templates)
        print_head();
    for (size_t i = 0; i < found->n_templates; i++)
        if (c->json)
            json_array_append_new(json, json_template(found->templates[i]));
        else
            print_template(found->templates[i]);
    if (!found->n_templates || !found->left_out)
        return 0;
    free(*after);
    *after = strdup(found->templates[found->n_templates - 1]->template_);
    return *after ? 1 : error_nomem(err);
}

static int run_template_list(const struct cli *c, struct vm_error **err)
{
    cleanup_free char *after = NULL;
    json_t *json = json_array();
    int more;
    do
        more = list_some(c, &after, json, err);
    while (more > 0);
    if (more == 0 && c->json)
        return cli_print_json(json_pack("{s:o}", "templates", json), err);
    json_decref(json);
    return more;
}

static int run_template_show(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__TemplateShow m = VMMIG__CONTROL__TEMPLATE_SHOW__INIT;
    m.template_ = word(c->args.list[0]);
    return ask_template(c, VMMIG__CONTROL__TYPE__TEMPLATE_SHOW, &m.base, err);
}

static int run_template_delete(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__TemplateDelete m = VMMIG__CONTROL__TEMPLATE_DELETE__INIT;
    m.template_ = word(c->args.list[0]);
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__TEMPLATE_DELETE, &m.base, VMMIG__CONTROL__TYPE__OK,
                &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(json_pack("{s:s}", "deleted", c->args.list[0]), err);
    printf("%s: deleted\n", c->args.list[0]);
    return 0;
}

/* ---- clones ---- */

struct settings {
    char *text; /* owned: a copy that was cut */
    Vmmig__Control__Setting list[CONTROL_SETTINGS_MAX], *pointers[CONTROL_SETTINGS_MAX];
    size_t n;
};

static int parse_settings(const char *text, struct settings *s, struct vm_error **err)
{
    s->text = strdup(text ? text : "");
    if (!s->text)
        return error_nomem(err);
    char *next = s->text;
    for (char *one; *s->text && (one = strsep(&next, ","));) {
        char *equals = strchr(one, '=');
        if (!equals || equals == one || !equals[1] || s->n == CONTROL_SETTINGS_MAX)
            return error_set(err, VM_ERROR_USAGE,
                             "--set %.80s: KEY=VALUE[,KEY=VALUE]... is expected", text);
        *equals = 0;
        vmmig__control__setting__init(&s->list[s->n]);
        s->list[s->n].key = one;
        s->list[s->n].value = equals + 1;
        s->pointers[s->n] = &s->list[s->n];
        s->n++;
    }
    return 0;
}

static json_t *json_clone(const Vmmig__Control__CloneInfo *i)
{
    json_t *notes = json_array();
    for (size_t k = 0; k < i->n_notes; k++)
        json_array_append_new(notes, json_string(i->notes[k]));
    return json_pack("{s:s, s:i, s:s, s:f, s:f, s:o}", "vm", i->vm, "pid", i->pid, "template",
                     i->template_, "start_ms", (double)i->start_ns / NSEC_PER_MSEC, "total_ms",
                     (double)i->total_ns / NSEC_PER_MSEC, "notes", notes);
}

static bool has_note(const Vmmig__Control__CloneInfo *i, const char *note)
{
    for (size_t k = 0; k < i->n_notes; k++)
        if (!strcmp(i->notes[k], note))
            return true;
    return false;
}

/* What is said of the first one is not repeated. */
static int say_clones(const struct cli *c, const Vmmig__Control__Clones *m, struct vm_error **err)
{
    json_t *json = json_array();
    for (size_t i = 0; i < m->n_clones; i++) {
        const Vmmig__Control__CloneInfo *one = m->clones[i];
        if (c->json)
            json_array_append_new(json, json_clone(one));
        else
            printf("%s: runs (process %d), %.0f ms\n", one->vm, one->pid,
                   (double)one->total_ns / NSEC_PER_MSEC);
        for (size_t k = 0; !c->json && k < one->n_notes; k++)
            if (i == 0 || !has_note(m->clones[0], one->notes[k]))
                printf("    %s\n", one->notes[k]);
    }
    if (c->json)
        return cli_print_json(json_pack("{s:o}", "clones", json), err);
    json_decref(json);
    return 0;
}

/* Over a connection of its own: the other one is busy. All clones of a request are one. */
static void cancel_clone(const struct cli *c, const Vmmig__Control__Clone *m)
{
    char vm[VM_NAME_MAX + 16];
    cleanup_error struct vm_error *err = NULL;
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Cancel cancel = VMMIG__CONTROL__CANCEL__INIT;
    snprintf(vm, sizeof(vm), "%s%s", m->as, m->count ? "-1" : "");
    cancel.vm = vm;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__CANCEL, &cancel.base, CLIENT_ANY, &answer, &err) < 0)
        fprintf(stderr, "vmmig: %s\n", error_message(err));
    else
        fprintf(stderr, "vmmig: cancelling; Ctrl-C again leaves without waiting for it\n");
}

static bool was_interrupted(int signals)
{
    struct signalfd_siginfo info;
    return read(signals, &info, sizeof(info)) == sizeof(info);
}

/* Ctrl-C cancels it: nothing of it is left then. */
static int ask_clone(const struct cli *c, const Vmmig__Control__Clone *m, struct control_message *ret_answer,
                     struct vm_error **err)
{
    cleanup_close int signals = cli_follow_prepare(err);
    CLEANUP(client) struct client *client = signals < 0 ? NULL : client_open(&c->at, err);
    if (!client || client_send(client, VMMIG__CONTROL__TYPE__CLONE, &m->base, err) < 0)
        return -1;
    for (bool asked = false;; asked = true) {
        struct vm_error *failed = NULL;
        if (client_receive(client, VMMIG__CONTROL__TYPE__CLONES,
                           client_deadline_ns(VMMIG__CONTROL__TYPE__CLONE), signals, ret_answer,
                           &failed) == 0)
            return 0;
        if (failed->kind != VM_ERROR_CANCELLED || !was_interrupted(signals) || asked)
            return error_propagate(err, failed);
        error_free(failed);
        cancel_clone(c, m);
    }
}

static int run_clone(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Clone m = VMMIG__CONTROL__CLONE__INIT;
    struct settings s = {.n = 0};
    if (vm_name_check(c->as, err) < 0)
        return error_wrap(err, "--as '%.80s'", c->as);
    m.template_ = word(c->args.list[0]);
    m.as = word(c->as);
    m.count = (uint32_t)c->count;
    m.disk_size = c->disk_size;
    m.memory = c->memory;
    int r = parse_settings(c->set, &s, err);
    m.sets = s.pointers;
    m.n_sets = s.n;
    if (r == 0)
        r = ask_clone(c, &m, &answer, err);
    free(s.text);
    return r < 0 ? -1 : say_clones(c, answer.clones, err);
}

/* ---- the mount ---- */

static int say_mounted(const struct cli *c, const Vmmig__Control__Mounted *m, struct vm_error **err)
{
    if (c->json)
        return cli_print_json(
            json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:b}", "dir",
                      m->dir, "repository", m->repository, "pid", m->pid, "fetchers",
                      (int)m->fetchers, "open_files", (int)m->open_files, "leases", (int)m->leases,
                      "cache_bytes", (json_int_t)m->cache_used, "cache_limit_bytes",
                      (json_int_t)m->cache_limit, "reads", (json_int_t)m->reads, "waits",
                      (json_int_t)m->waits, "fetched_bytes", (json_int_t)m->fetched_bytes,
                      "prefetched_bytes", (json_int_t)m->prefetched_bytes, "failed_reads",
                      (json_int_t)m->failed_reads, "cache_full", m->cache_full),
            err);
    printf("%s shows %s\n", m->dir, m->repository);
    if (m->cache_full)
        puts("the file system of its cache is full: give it room, or set a smaller cache-size");
    return 0;
}

/* Without looking at what is mounted there. */
static char *resolve_parent(const char *dir)
{
    cleanup_free char *copy = strdup(dir), *again = strdup(dir);
    cleanup_free char *parent = copy && again ? realpath(dirname(copy), NULL) : NULL;
    char *path;
    return parent && asprintf(&path, "%s/%s", parent, basename(again)) >= 0 ? path : NULL;
}

static int absolute(const struct cli *c, const char *dir, char out[FIELD_PATH_MAX + 1], struct vm_error **err)
{
    cleanup_free char *path = cli_resolve(c, dir);
    if (!path && errno == ENOTCONN) /* a mount whose process has died */
        path = resolve_parent(dir);
    if (!path)
        return error_errno(err, errno, "%s", dir);
    snprintf(out, FIELD_PATH_MAX + 1, "%s", path);
    return 0;
}

static int run_mount(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Mount m = VMMIG__CONTROL__MOUNT__INIT;
    char dir[FIELD_PATH_MAX + 1];
    if (absolute(c, c->args.list[0], dir, err) < 0)
        return -1;
    m.dir = dir;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__MOUNT, &m.base, VMMIG__CONTROL__TYPE__MOUNTED,
                &answer, err) < 0)
        return -1;
    return say_mounted(c, answer.mounted, err);
}

static int run_unmount(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Unmount m = VMMIG__CONTROL__UNMOUNT__INIT;
    char dir[FIELD_PATH_MAX + 1];
    if (absolute(c, c->args.list[0], dir, err) < 0)
        return -1;
    m.dir = dir;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__UNMOUNT, &m.base, VMMIG__CONTROL__TYPE__OK,
                &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(json_pack("{s:s}", "unmounted", dir), err);
    printf("%s: unmounted\n", dir);
    return 0;
}

static const struct option clone_options[] = {
    {"as", "NAME", option_parse_text, .offset = offsetof(struct cli, as), .required = true,
     .text = "What the clone is called here"},
    {"count", "N", option_parse_u64, .offset = offsetof(struct cli, count), .min = 1,
     .max = CONTROL_CLONES_MAX, .unit = "clones",
     .text = "So many, called NAME-1, NAME-2, ...: all of them or none"},
    {"set", "KEY=VALUE,...", option_parse_text, .offset = offsetof(struct cli, set),
     .text = "mac=auto (fresh MAC addresses; the default) or mac=keep; the id of a netdev and the "
             "tap that it is to be on"},
    {"disk-size", "SIZE", option_parse_size, .offset = offsetof(struct cli, disk_size), .min = 1,
     .max = 1ULL << 56, .text = "Make the first disk of the command line larger; the running guest is told"},
    {"memory", "SIZE", option_parse_size, .offset = offsetof(struct cli, memory), .min = 1,
     .max = 1ULL << 56,
     .text = "What the guest has then: more is plugged into it, in steps of 128 MiB, if its command "
             "line has slots and room for that (-m ...,slots=N,maxmem=SIZE)"},
    {NULL}};

static const struct cli_command commands[] = {
    {"template publish", "VM@NAME TEMPLATE:TAG", 2, 2, false, NULL,
     "make a snapshot a template",
     "Make a snapshot of a running VM a template from which clones are made. The tag moves to it; "
     "what it stood for before stays reachable by its digest.\n\n"
     "    vmmig template publish web1@nightly debian12:v3",
     run_publish},
    {"template list", "", 0, 0, false, NULL, "list the templates",
     "List the tags of templates, and versions that have none.", run_template_list},
    {"template show", "TEMPLATE", 1, 1, false, NULL, "one template",
     "What is known of a template. TEMPLATE is NAME:TAG or NAME@DIGEST.", run_template_show},
    {"template delete", "TEMPLATE", 1, 1, false, NULL, "delete a template",
     "Delete a tag, and the version when no other tag stands for it; or a version without tags. "
     "Clones of it run on.",
     run_template_delete},
    {"clone", "TEMPLATE --as NAME", 1, 1, false, clone_options,
     "a running VM from a template, at once",
     "Start a VM that goes on where the template's snapshot was taken. It shares memory and disk "
     "with the template and all its clones until it writes. It gets a new UUID, a new VM "
     "generation ID where the guest has the device, and new MAC addresses; what the running guest "
     "does not notice of that is said. One of a VMM that links libvmmig-attach gets a name of its "
     "own, if its command line has one. Its disks are NAME/diskN.qcow2 in clone-dir, and are yours to "
     "remove when it has ended: until then no other clone gets that name.\n\n"
     "    vmmig clone debian12:v3 --as web2\n"
     "    vmmig clone debian12:v3 --as worker --count 8\n\n"
     "Where storage is slow it takes as long as that needs: Ctrl-C, or `vmmig cancel NAME`, takes back what "
     "there is of it, of all N with --count.",
     run_clone},
    {"mount", "DIR", 1, 1, false, NULL, "show all images as files",
     "Make DIR, an empty folder of yours, show every image of the agent's repository as a folder of plain "
     "files: disk0.raw, memory.raw and so on. '/' in an image's name is written %2F. Files are read as "
     "they are needed, and cached once per host; they cannot be written. Files of another repository, or "
     "on a host without an agent: `vmmig image export --repo URL`.",
     run_mount},
    {"unmount", "DIR", 1, 1, false, NULL, "end a mount",
     "End a mount that `vmmig mount` made. Refused while somebody uses it, and for the agent's own while "
     "another is there.", run_unmount},
    {NULL}};

static const struct cli_object objects[] = {
    {"a template (template publish, show; list: an array `templates`)",
     "template, name, tag (null: none), digest, source, size_bytes, published, working_set"},
    {"template delete", "deleted"},
    {"clone: an array `clones`",
     "vm, pid, template (NAME@DIGEST), start_ms (from exec of the VMM until the guest ran), "
     "total_ms, notes"},
    {"mount",
     "dir, repository, pid, fetchers, open_files, leases, cache_bytes, cache_limit_bytes, reads, "
     "waits, fetched_bytes, prefetched_bytes, failed_reads, cache_full"},
    {"unmount", "unmounted"},
    {NULL}};

const struct cli_family cli_family_clone = {"Templates and clones", commands, objects};
