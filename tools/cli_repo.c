/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_repo.h"

#include "client/client.h"
#include "repo/repo.h"
#include "repo/service.h"
#include "tools/cli_follow.h"
#include "tools/cli_local.h"
#include "tools/cli_print.h"

#include <string.h>

/* An export's file gets its name before anybody is told that it is there. */
static int end(struct cli_repo_view *view, int64_t elapsed_ns, struct vm_error **err)
{
    const Vmmig__Control__Repo *m = view->request;
    if (m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT &&
        image_export_keep(m->path, view->fd, err) < 0)
        return -1;
    return cli_repo_end(view, elapsed_ns, err);
}

/* ---- through the agent ---- */

static int conclude(const Vmmig__Control__Job *job, void *arg, struct vm_error **err)
{
    if (!job->result)
        return error_set(err, VM_ERROR_PROTOCOL, "the agent does not say what came of it");
    if (cli_repo_part(arg, job->result, err) < 0)
        return -1;
    return end(arg, job->elapsed_ns, err);
}

static int run_job(const struct cli *c, struct client *client, struct cli_repo_view *view,
                   struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    struct cli_follow_hooks hooks = {
        .ctrl_c_cancels = view->request->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT,
        .conclude = conclude, .arg = view};
    cleanup_close int signal_fd = cli_follow_prepare(err);
    if (signal_fd < 0 ||
        client_send_fd(client, VMMIG__CONTROL__TYPE__REPO, &view->request->base, view->fd,
                       err) < 0 ||
        client_receive(client, VMMIG__CONTROL__TYPE__JOB, INT64_MAX, -1, &answer, err) < 0)
        return -1;
    return cli_follow_with(c, client, answer.job, &hooks, signal_fd, err);
}

static int run_answered(struct client *client, struct cli_repo_view *view,
                        struct vm_error **err)
{
    bool more = true;
    if (client_send(client, VMMIG__CONTROL__TYPE__REPO, &view->request->base, err) < 0)
        return -1;
    while (more) {
        cleanup_control_message struct control_message answer = {0};
        if (client_receive(client, VMMIG__CONTROL__TYPE__REPO_RESULT, INT64_MAX, -1, &answer,
                               err) < 0 ||
            cli_repo_part(view, answer.repo_result, err) < 0)
            return -1;
        more = answer.repo_result->more;
    }
    return end(view, -1, err);
}

int cli_repo_run(const struct cli *c, const Vmmig__Control__Repo *request, int fd,
                 struct vm_error **err)
{
    struct cli_repo_view view = {.cli = c, .request = request, .fd = fd};
    int result = -1;
    if (control_check(VMMIG__CONTROL__TYPE__REPO, &request->base, err) < 0)
        return error_set_kind(err, VM_ERROR_USAGE);
    if (c->repo && c->at.agent)
        return error_set(err, VM_ERROR_USAGE, "--repo works without an agent: leave it or --agent out");
    if (c->repo) {
        int64_t elapsed_ns = -1;
        result = cli_local_repo(c, &view, &elapsed_ns, err) < 0 ? -1 : end(&view, elapsed_ns, err);
    } else {
        CLEANUP(client) struct client *client = client_open(&c->at, err);
        if (!client)
            return error_wrap(err, "without --repo URL");
        result = repo_service_is_long(request->verb) ? run_job(c, client, &view, err)
                                                     : run_answered(client, &view, err);
    }
    json_decref(view.object);
    return result;
}

/* ---- the commands ---- */

static int run_verb(const struct cli *c, Vmmig__Control__RepoVerb verb, struct vm_error **err)
{
    Vmmig__Control__Repo m = VMMIG__CONTROL__REPO__INIT;
    m.verb = verb;
    m.data_pool = client_word(c->data_pool ? c->data_pool : "");
    m.fence_after_ms = c->fence_after_s * 1000;
    m.repack = m.recompress = c->repack;
    m.heal = c->heal;
    m.older_than_s = c->older_than_h * 3600;
    return cli_repo_run(c, &m, -1, err);
}

static int run_init(const struct cli *c, struct vm_error **err)
{
    return run_verb(c, VMMIG__CONTROL__REPO_VERB__REPO_INIT, err);
}

static int run_stat(const struct cli *c, struct vm_error **err)
{
    return run_verb(c, VMMIG__CONTROL__REPO_VERB__REPO_STAT, err);
}

static int run_gc(const struct cli *c, struct vm_error **err)
{
    return run_verb(c, VMMIG__CONTROL__REPO_VERB__REPO_GC, err);
}

static int run_scrub(const struct cli *c, struct vm_error **err)
{
    return run_verb(c, VMMIG__CONTROL__REPO_VERB__REPO_SCRUB, err);
}

static int run_rebuild(const struct cli *c, struct vm_error **err)
{
    return run_verb(c, VMMIG__CONTROL__REPO_VERB__REPO_REBUILD_INDEX, err);
}

static int run_copy(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Repo m = VMMIG__CONTROL__REPO__INIT;
    m.verb = VMMIG__CONTROL__REPO_VERB__REPO_COPY;
    m.to = client_word(c->args.list[0]);
    m.image = client_word(c->args.n > 1 ? c->args.list[1] : "");
    return cli_repo_run(c, &m, -1, err);
}

#define MEMBER(m) .offset = offsetof(struct cli, m)
#define REPO_OPTION                                                                                \
    {"repo", "URL", option_parse_text, MEMBER(repo),                                               \
     .text = "Open this repository here, without an agent: dir:PATH, or "                          \
             "rados:POOL[/NAMESPACE][?conf=FILE&id=USER]. Else the agent's is meant"}

static const struct option repo_options[] = {REPO_OPTION, {NULL}};

static const struct option init_options[] = {
    REPO_OPTION,
    {"data-pool", "POOL", option_parse_text, MEMBER(data_pool),
     .text = "rados: keep packs in that pool, which may be erasure coded"},
    {NULL}};

static const struct option gc_options[] = {
    REPO_OPTION,
    {"repack", NULL, option_parse_flag, MEMBER(repack),
     .text = "Also rewrite, compressed with zstd, packs of which a quarter is dead, those with "
             "damaged records, and those that are still as they were written"},
    {"fence-after", "SECONDS", option_parse_u64, MEMBER(fence_after_s), .min = 1, .max = 86400,
     .unit = "seconds", .def = "60",
     .text = "A writer that says nothing for so long is taken for dead; if it lives, its import "
             "fails"},
    {NULL}};

static const struct option scrub_options[] = {
    REPO_OPTION,
    {"heal", NULL, option_parse_flag, MEMBER(heal),
     .text = "Also mend damaged records whose pages are stored elsewhere, too"},
    {"older-than", "HOURS", option_parse_u64, MEMBER(older_than_h), .min = 1, .max = 100000,
     .unit = "hours", .text = "Read only packs that were not verified for so long"},
    {NULL}};

#undef MEMBER

static const struct cli_command commands[] = {
    {"repo init", "", 0, 0, false, init_options, "make an empty repository",
     "Make an empty repository. The folder is made if need be; a pool must exist. A cephx user "
     "needs `mon 'allow r' osd 'allow rw pool=POOL namespace=NAMESPACE'`, and the same for a data "
     "pool.\n\n"
     "    vmmig repo init --repo dir:/srv/images",
     run_init},
    {"repo stat", "", 0, 0, false, repo_options, "what a repository holds and takes",
     "Tell how many images a repository holds, what they take, and how many leases there are, "
     "the oldest with its holder. Where entries of the catalogue are damaged it says so, and the exit "
     "status is 12.",
     run_stat},
    {"repo gc", "", 0, 0, false, gc_options, "free what no image needs any more",
     "Remove what no image needs any more. Imports, exports and other collections go on "
     "meanwhile.",
     run_gc},
    {"repo scrub", "", 0, 0, false, scrub_options, "read everything again, and name what is damaged",
     "Read and verify all that is stored. What is damaged is named with the images that it "
     "touches, and the exit status is 12.",
     run_scrub},
    {"repo rebuild-index", "", 0, 0, false, repo_options, "make the index anew from the packs",
     "Enter what packs and recipes hold into the index. Without an index everything can be read, "
     "but new images share nothing with old ones.",
     run_rebuild},
    {"repo copy", "URL [IMAGE]", 1, 2, false, repo_options, "copy images to another repository",
     "Copy one image, or all of them, to the repository at URL, which must exist. What is there "
     "already is neither read nor hashed. Names, parents and times are kept; an image of that name "
     "with other content stops the command before anything is copied. Through the agent only root "
     "and the agent's own user may do it.\n\n"
     "    vmmig repo copy rados:backup/site1",
     run_copy},
    {NULL}};

static const struct cli_object objects[] = {
    {"repo init", "initialized"},
    {"repo stat",
     "uuid, url, images, image_bytes, packs, pack_bytes, trees, tree_bytes, index_shards, "
     "index_keys, space_total, space_available, leases, oldest_lease (null: there is none; else image, "
     "holder, taken; and findings, as of repo scrub, where entries of the catalogue are damaged)"},
    {"repo gc",
     "condemned, packs_removed, trees_removed, bytes_freed, writers_fenced, packs_repacked, "
     "repacked_from_bytes, repacked_to_bytes, more_to_repack, repack_lacked_space, elapsed_ms"},
    {"repo scrub",
     "packs, bytes, records, pages, images, damaged, images_touched, healed, forwardings_lost, "
     "packs_skipped, oldest_s, findings (an array: kind, image, damage or forwarding; what), "
     "elapsed_ms"},
    {"repo rebuild-index", "packs, entries, unreadable, elapsed_ms"},
    {"repo copy", "images, images_present, size, bytes_read, stored_bytes, elapsed_ms"},
    {NULL}};

const struct cli_family cli_family_repo = {"The repository", commands, objects};
