/* SPDX-License-Identifier: Apache-2.0 */
#include "base/clock.h"
#include "base/text.h"
#include "tools/cli.h"
#include "client/client.h"
#include "tools/cli_follow.h"
#include "tools/cli_print.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- printing ---- */

static void print_one(const Vmmig__Control__SnapshotInfo *s)
{
    char when[32];
    time_t seconds = (time_t)(s->created_ns / NSEC_PER_SEC);
    struct tm tm;
    gmtime_r(&seconds, &tm);
    strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%SZ", &tm);
    printf("%-32s %s %10s %10s  %s\n", s->image, when, text_size(s->size),
           text_size(s->stored), s->memory ? "memory" : "disks");
}

static json_t *json_of(const Vmmig__Control__SnapshotInfo *s)
{
    json_t *files = json_array();
    for (size_t i = 0; i < s->n_files; i++)
        json_array_append_new(files, json_pack("{s:s, s:I}", "name", s->files[i]->name, "size_bytes",
                                               (json_int_t)s->files[i]->size));
    return json_pack("{s:s, s:s, s:s, s:s?, s:o, s:I, s:I, s:b, s:o}", "snapshot", s->image, "vm",
                     s->vm, "name", s->name, "parent", *s->parent ? s->parent : NULL, "created",
                     cli_json_instant(s->created_ns), "size_bytes", (json_int_t)s->size,
                     "stored_bytes", (json_int_t)s->stored, "memory", (int)s->memory, "files",
                     files);
}

/* Ask, and print what comes, each behind `word` if there is one. */
static int ask(const struct cli *c, unsigned type, const ProtobufCMessage *request,
               const char *word, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    if (client_ask(&c->at, type, request, VMMIG__CONTROL__TYPE__SNAPSHOTS, &answer, err) < 0)
        return -1;
    const Vmmig__Control__Snapshots *list = answer.snapshots;
    json_t *json = json_array();
    if (!c->json && !word && list->n_snapshots)
        printf("%-32s %-20s %10s %10s\n", "SNAPSHOT", "TAKEN", "SIZE", "STORED");
    for (size_t i = 0; i < list->n_snapshots; i++) {
        const Vmmig__Control__SnapshotInfo *s = list->snapshots[i];
        if (c->json)
            json_array_append_new(json, json_of(s));
        else if (word)
            printf("%s: %s\n", s->image, word);
        else
            print_one(s);
        for (size_t k = 0; !c->json && k < s->n_files; k++)
            printf("    %-28s %" PRIu64 "\n", s->files[k]->name, s->files[k]->size);
    }
    if (!c->json && !list->n_snapshots && !list->left_out)
        puts(word ? "nothing to delete" : "no snapshots");
    if (c->json)
        return cli_print_json(json_pack("{s:o, s:I}", "snapshots", json, "left_out", (json_int_t)list->left_out), err);
    json_decref(json);
    if (list->left_out)
        printf("and %" PRIu64 " older ones%s%s\n", list->left_out, word ? ": " : "", word ? word : "");
    return 0;
}

/* ---- commands ---- */

static int follow(const struct cli *c, unsigned type, const ProtobufCMessage *request,
                  struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    cleanup_close int signal_fd = c->background ? -1 : cli_follow_prepare(err);
    if (!c->background && signal_fd < 0)
        return -1;
    CLEANUP(client) struct client *client = client_open(&c->at, err);
    if (!client || client_call(client, type, request, VMMIG__CONTROL__TYPE__JOB, &answer, err) <
                       0)
        return -1;
    if (!c->background)
        return cli_follow(c, client, answer.job->vm, answer.job, signal_fd, err);
    if (c->json)
        return cli_print_json(cli_json_job(answer.job), err);
    printf("%s: %s of %s has begun; `vmmig watch %s` follows it\n", answer.job->vm,
           answer.job->kind, answer.job->peer, answer.job->vm);
    return 0;
}

static int run_take(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Snapshot m = VMMIG__CONTROL__SNAPSHOT__INIT;
    char *path = NULL;
    if (vm_name_check(c->args.list[0], err) < 0)
        return error_wrap(err, "'%.80s'", c->args.list[0]);
    if (c->guest_agent && !(path = cli_resolve(c, c->guest_agent)))
        return error_errno(err, errno, "--guest-agent %s", c->guest_agent);
    m.vm = client_word(c->args.list[0]);
    m.name = client_word(c->args.list[1]);
    m.disk_only = c->disk_only;
    m.guest_agent = path ? path : m.guest_agent;
    int r = follow(c, VMMIG__CONTROL__TYPE__SNAPSHOT, &m.base, err);
    free(path);
    return r;
}

static int run_list(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__SnapshotList m = VMMIG__CONTROL__SNAPSHOT_LIST__INIT;
    if (c->args.n) {
        if (vm_name_check(c->args.list[0], err) < 0)
            return error_wrap(err, "'%.80s'", c->args.list[0]);
        m.vm = client_word(c->args.list[0]);
    }
    return ask(c, VMMIG__CONTROL__TYPE__SNAPSHOT_LIST, &m.base, NULL, err);
}

static int run_show(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__SnapshotList m = VMMIG__CONTROL__SNAPSHOT_LIST__INIT;
    m.image = client_word(c->args.list[0]);
    return ask(c, VMMIG__CONTROL__TYPE__SNAPSHOT_LIST, &m.base, NULL, err);
}

static int run_delete(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__SnapshotDelete m = VMMIG__CONTROL__SNAPSHOT_DELETE__INIT;
    m.image = client_word(c->args.list[0]);
    return ask(c, VMMIG__CONTROL__TYPE__SNAPSHOT_DELETE, &m.base, "deleted", err);
}

static int run_restore(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Restore m = VMMIG__CONTROL__RESTORE__INIT;
    char *folder = NULL;
    if (c->as && vm_name_check(c->as, err) < 0)
        return error_wrap(err, "--as '%.80s'", c->as);
    bool in_ceph = c->disk_dir && !strncmp(c->disk_dir, "rbd:", 4);
    if (in_ceph)
        m.disk_dir = client_word(c->disk_dir);
    else if (c->disk_dir && !(folder = cli_resolve(c, c->disk_dir)))
        return error_errno(err, errno, "--disk-dir %s", c->disk_dir);
    m.image = client_word(c->args.list[0]);
    m.as = client_word(c->as ? c->as : "");
    m.disk_dir = folder ? folder : m.disk_dir;
    m.paused = c->paused;
    int r = follow(c, VMMIG__CONTROL__TYPE__RESTORE, &m.base, err);
    free(folder);
    return r;
}

static int run_prune(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__SnapshotPrune m = VMMIG__CONTROL__SNAPSHOT_PRUNE__INIT;
    if (vm_name_check(c->args.list[0], err) < 0)
        return error_wrap(err, "'%.80s'", c->args.list[0]);
    if (!c->keep_last && !c->keep_daily && !c->keep_weekly)
        return error_set(err, VM_ERROR_USAGE,
                         "one of --keep-last, --keep-daily and --keep-weekly is required");
    m.vm = client_word(c->args.list[0]);
    m.keep_last = (uint32_t)c->keep_last;
    m.keep_daily = (uint32_t)c->keep_daily;
    m.keep_weekly = (uint32_t)c->keep_weekly;
    m.dry_run = c->dry_run;
    return ask(c, VMMIG__CONTROL__TYPE__SNAPSHOT_PRUNE, &m.base,
               c->dry_run ? "would be deleted" : "deleted", err);
}

#define MEMBER(m) .offset = offsetof(struct cli, m)

static const struct option take_options[] = {
    {"disk-only", NULL, option_parse_flag, MEMBER(disk_only),
     .text = "Disks and definition, without memory"},
    {"guest-agent", "PATH", option_parse_text, MEMBER(guest_agent),
     .text = "Socket of the guest's agent (qemu-ga), which freezes its file systems for the "
             "instant. Without it the one on the VM's command line is used, if there is one"},
    {"background", NULL, option_parse_flag, MEMBER(background), .text = "Return when it has begun"},
    {NULL}};

static const struct option restore_options[] = {
    {"as", "NAME", option_parse_text, MEMBER(as),
     .text = "What the VM is to be called. As it was, if it is not given"},
    {"disk-dir", "DIR", option_parse_text, MEMBER(disk_dir),
     .text = "Where its disks go, as NAME-diskN.FORMAT (a raw one in Ceph: NAME-diskN): a folder, "
             "or a pool of Ceph as rbd:POOL[/NAMESPACE][:id=USER][:conf=FILE]. Where they were, if "
             "it is not given and the user of VMs may make files there"},
    {"paused", NULL, option_parse_flag, MEMBER(paused),
     .text = "Do not let it run yet: QEMU's command cont, in a monitor of your own, does"},
    {"background", NULL, option_parse_flag, MEMBER(background), .text = "Return when it has begun"},
    {NULL}};

static const struct option prune_options[] = {
    {"keep-last", "N", option_parse_u64, MEMBER(keep_last), .max = CONTROL_KEEP_MAX,
     .unit = "snapshots", .text = "Keep the newest N"},
    {"keep-daily", "N", option_parse_u64, MEMBER(keep_daily), .max = CONTROL_KEEP_MAX,
     .unit = "days", .text = "Keep the newest of each of the last N days that have one"},
    {"keep-weekly", "N", option_parse_u64, MEMBER(keep_weekly), .max = CONTROL_KEEP_MAX,
     .unit = "weeks", .text = "Keep the newest of each of the last N weeks that have one"},
    {"dry-run", NULL, option_parse_flag, MEMBER(dry_run), .text = "Tell, and delete nothing"},
    {NULL}};

#undef MEMBER

static const struct cli_command commands[] = {
    {"snapshot list", "[VM]", 0, 1, false, NULL, "the snapshots of a VM, or of all",
     "List snapshots in the order in which they were taken: when, its size, and what it added to the "
     "repository. Of more than 1024 the newest are listed, and how many there are besides.",
     run_list},
    {"snapshot show", "VM@NAME", 1, 1, false, NULL, "one snapshot and its files",
     "Tell about one snapshot, with its files.", run_show},
    {"snapshot delete", "VM@NAME", 1, 1, false, NULL, "delete a snapshot",
     "Delete a snapshot. Others of the same VM stay whole, whichever it is. `repo gc` frees what "
     "nothing else uses.",
     run_delete},
    {"snapshot prune", "VM --keep-last N", 1, 1, false, prune_options,
     "delete the snapshots that no rule keeps",
     "Delete those snapshots of a VM that none of the rules given keeps. Days and weeks are those "
     "of UTC, weeks begin on Monday.\n\n"
     "    vmmig snapshot prune web1 --keep-last 3 --keep-daily 7 --keep-weekly 4",
     run_prune},
    {"snapshot", "VM NAME", 2, 2, false, take_options, "disks and memory of a running VM",
     "Keep the VM as it is at one instant, disks, memory and devices, as VM@NAME in the agent's "
     "repository. The guest is paused for the switch only, and runs on while everything is "
     "stored. What did not change since the VM's last snapshot takes no space, and of the disks "
     "only what changed is read.\n\n"
     "    vmmig snapshot web1 nightly\n\n"
     "Where QEMU cannot write-protect the guest's memory (it may not use userfaultfd) memory is "
     "copied first, as for a migration, into scratch-dir; the answer says so. Meanwhile the guest may be slowed down. "
     "So is that of a paused guest, which stays paused, in QEMU's state postmigrate: it goes on when you "
     "resume it (QEMU's command cont, in a monitor of your own), and has to be before its memory can be taken again. "
     "File systems, if an agent in the guest freezes them, stand for as long as memory is copied, but not "
     "for more than 20 s: then they are thawed, and the answer says so, or the snapshot fails, if "
     "--guest-agent was given.\n\n"
     "Memory of a VMM that links libvmmig-attach is copied into scratch-dir while the guest runs, "
     "and it is paused for what it wrote meanwhile.\n\n"
     "File systems that are not thawed at once, since the guest's agent does not answer, are tried "
     "again until they are, wherever the guest is sent meanwhile. So are those of a guest that is "
     "restored or cloned from an instant at which they stood frozen.",
     run_take},
    {"restore", "VM@NAME", 1, 1, false, restore_options, "a VM from a snapshot",
     "Make the VM of a snapshot run again, from the instant at which it was taken: its disks are "
     "written, its memory and devices loaded. It keeps its identity, MAC addresses too: do not run "
     "it beside the one that it was taken of in one network. Of a snapshot with --disk-only the VM "
     "boots anew. Nothing is overwritten: disks that are there already are refused.\n\n"
     "With another name, the sockets at which its QEMU listens (monitors, consoles, VNC) and the files "
     "that it writes are its own, as a clone's are: the former name in the last part of their paths is "
     "replaced, or NAME- is put before that part. So it runs beside the VM that it was taken of. What "
     "QEMU connects to stays the same.\n\n"
     "    vmmig restore web1@nightly --as web1b --disk-dir /srv/disks\n"
     "    vmmig restore web1@nightly --as web1c --disk-dir rbd:vms",
     run_restore},
    {NULL}};

static const struct cli_object objects[] = {
    {"a snapshot (snapshot list, show, delete, prune: an array `snapshots`)",
     "snapshot, vm, name, parent (null: none), created, size_bytes, stored_bytes, memory, and in "
     "the answer to show files (name, size_bytes); beside the array left_out, how many older ones "
     "there are"},
    {NULL}};

const struct cli_family cli_family_snapshot = {"Snapshots", commands, objects};
