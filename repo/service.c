/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/service.h"

#include "base/clock.h"
#include "repo/collect.h"
#include "repo/copy.h"
#include "repo/repo.h"
#include "repo/scrub.h"

#include <inttypes.h>
#include <stdlib.h>

enum { LIST_PART = 64, DIFF_PART = 512, SHARERS_MAX = 64, COUNTS_MAX = 24 };

/* protobuf-c's strings are not const, though packing does not change them. */
static char *word(const char *text)
{
    return (char *)(uintptr_t)text;
}

/* ---- results that are counts ---- */

struct counts {
    Vmmig__Control__RepoCount counts[COUNTS_MAX], *list[COUNTS_MAX];
    size_t n;
};

static void count(struct counts *c, const char *name, uint64_t value)
{
    Vmmig__Control__RepoCount *m = &c->counts[c->n];
    vmmig__control__repo_count__init(m);
    m->name = word(name);
    m->value = value;
    c->list[c->n++] = m;
}

static int emit_counts(const struct repo_service *s, struct counts *c, struct vm_error **err)
{
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    result.counts = c->list;
    result.n_counts = c->n;
    return s->emit(&result, s->arg, err);
}

static int emit_nothing(const struct repo_service *s, struct vm_error **err)
{
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    return s->emit(&result, s->arg, err);
}

/* ---- findings ---- */

struct findings {
    Vmmig__Control__RepoFinding *list[SERVICE_FINDINGS_MAX];
    size_t n;
};

static void take_finding(enum scrub_kind kind, const char *what, void *arg)
{
    struct findings *f = arg;
    size_t max = kind == SCRUB_IMAGE ? SERVICE_FINDINGS_MAX : SERVICE_DAMAGE_MAX;
    Vmmig__Control__RepoFinding *m = f->n < max ? malloc(sizeof(*m)) : NULL;
    if (!m)
        return;
    vmmig__control__repo_finding__init(m);
    m->image = kind == SCRUB_IMAGE;
    m->forwarding = kind == SCRUB_FORWARDING;
    m->what = strdup(what);
    if (!m->what) {
        free(m);
        return;
    }
    field_make_text(m->what, strlen(m->what));
    f->list[f->n++] = m;
}

static void free_findings(struct findings *f)
{
    for (size_t i = 0; f && i < f->n; i++) {
        free(f->list[i]->what);
        free(f->list[i]);
    }
    free(f);
}
DEFINE_CLEANUP(findings, struct findings *, free_findings)

/* ---- repositories ---- */

static int serve_stat(struct repo *r, const char *url, const struct repo_service *s,
                      struct vm_error **err)
{
    struct repo_stat stat;
    if (repo_stat(r, &stat, err) < 0)
        return -1;
    Vmmig__Control__RepoStat m = VMMIG__CONTROL__REPO_STAT__INIT;
    m.uuid = (ProtobufCBinaryData){sizeof(stat.uuid.bytes), stat.uuid.bytes};
    m.url = word(url);
    m.images = stat.images;
    m.image_bytes = stat.image_bytes;
    m.packs = stat.packs;
    m.pack_bytes = stat.pack_bytes;
    m.trees = stat.trees;
    m.tree_bytes = stat.tree_bytes;
    m.index_shards = stat.index.shards;
    m.index_keys = stat.index.keys;
    m.space_total = stat.space.total;
    m.space_available = stat.space.available;
    m.leases = stat.leases;
    m.oldest_lease_s = (int64_t)stat.oldest_lease_s;
    field_make_text(stat.oldest_lease_holder, IMAGE_NAME_MAX);
    m.oldest_lease_holder = word(stat.oldest_lease_holder);
    m.oldest_lease_image = word(stat.oldest_lease_image);
    Vmmig__Control__RepoFinding finding = VMMIG__CONTROL__REPO_FINDING__INIT, *list = &finding;
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    char what[96];
    snprintf(what, sizeof(what),
             "%" PRIu64 " entries of the catalogue: \"vmmig repo scrub\" names them", stat.damaged);
    finding.what = what;
    result.stat = &m;
    result.findings = &list;
    result.n_findings = stat.damaged > 0;
    return s->emit(&result, s->arg, err);
}

static int serve_gc(struct repo *r, const Vmmig__Control__Repo *m, const struct repo_service *s,
                    struct vm_error **err)
{
    struct collect_options o = {.fence_after_ns = (int64_t)m->fence_after_ms * NSEC_PER_MSEC,
                                .repack = m->repack, .recompress = m->recompress,
                                .control = s->control};
    struct collect_report report;
    struct counts c = {.n = 0};
    if (repo_collect(r, &o, &report, err) < 0)
        return -1;
    count(&c, "condemned", report.condemned);
    count(&c, "packs_removed", report.packs);
    count(&c, "trees_removed", report.trees);
    count(&c, "bytes_freed", report.bytes);
    count(&c, "writers_fenced", report.writers_fenced);
    count(&c, "packs_repacked", report.repacked);
    count(&c, "repacked_from_bytes", report.repacked_from);
    count(&c, "repacked_to_bytes", report.repacked_to);
    count(&c, "more_to_repack", report.more_to_repack);
    count(&c, "repack_lacked_space", report.repack_lacked_space);
    return emit_counts(s, &c, err);
}

static int scrub_into(struct repo *r, const Vmmig__Control__Repo *m, const struct repo_service *s,
                      struct findings *f, struct vm_error **err)
{
    struct scrub_options o = {.older_than_s = m->older_than_s, .heal = m->heal,
                              .control = &s->control};
    struct scrub_report report;
    struct counts c = {.n = 0};
    if (scrub_run(r, &o, take_finding, f, &report, err) < 0)
        return -1;
    count(&c, "packs", report.packs);
    count(&c, "bytes", report.bytes);
    count(&c, "records", report.records);
    count(&c, "pages", report.pages);
    count(&c, "images", report.images);
    count(&c, "damaged", report.damaged);
    count(&c, "images_touched", report.images_touched);
    count(&c, "healed", report.healed);
    count(&c, "forwardings_lost", report.forwardings);
    count(&c, "packs_skipped", report.packs_skipped);
    count(&c, "oldest_s", report.oldest_s);
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    result.counts = c.list;
    result.n_counts = c.n;
    result.findings = f->list;
    result.n_findings = f->n;
    return s->emit(&result, s->arg, err);
}

static int serve_scrub(struct repo *r, const Vmmig__Control__Repo *m,
                       const struct repo_service *s, struct vm_error **err)
{
    CLEANUP(findings) struct findings *f = calloc(1, sizeof(*f));
    return f ? scrub_into(r, m, s, f, err) : error_nomem(err);
}

static int serve_rebuild(struct repo *r, const struct repo_service *s, struct vm_error **err)
{
    struct rebuild_report report;
    struct counts c = {.n = 0};
    if (repo_rebuild_index(r, &s->control, &report, err) < 0)
        return -1;
    count(&c, "packs", report.packs);
    count(&c, "entries", report.entries);
    count(&c, "unreadable", report.unreadable);
    return emit_counts(s, &c, err);
}

static int serve_copy(struct repo *r, const Vmmig__Control__Repo *m, const struct repo_service *s,
                      struct vm_error **err)
{
    struct copy_report report;
    struct counts c = {.n = 0};
    CLEANUP(repo) struct repo *to = repo_open(m->to, err);
    if (!to && err && (*err)->kind == VM_ERROR_NOT_FOUND)
        return error_wrap(err, "cannot copy before \"vmmig repo init --repo %s\"", m->to);
    if (!to || repo_copy(r, to, *m->image ? m->image : NULL, &s->control, &report, err) < 0)
        return -1;
    count(&c, "images", report.images);
    count(&c, "images_present", report.present);
    count(&c, "size", report.bytes);
    count(&c, "bytes_read", report.bytes_read);
    count(&c, "stored_bytes", report.bytes_stored);
    return emit_counts(s, &c, err);
}

/* ---- images ---- */

static int serve_import(struct repo *r, const Vmmig__Control__Repo *m,
                        const struct repo_service *s, struct vm_error **err)
{
    struct import_options o = {.parent = *m->parent ? m->parent : NULL,
                               .file_name = *m->file ? m->file : NULL, .control = s->control};
    struct import_report report;
    struct counts c = {.n = 0};
    if (image_import_fd(r, s->fd, m->path, m->image, &o, &report, err) < 0)
        return -1;
    const struct image_writer_stat *w = &report.written;
    count(&c, "size", report.size);
    count(&c, "zero_bytes", w->pages_zero * PAGE_BYTES);
    count(&c, "shared_bytes", w->pages_shared * PAGE_BYTES);
    count(&c, "new_bytes", (w->pages_new - w->pages_again) * PAGE_BYTES);
    count(&c, "again_bytes", w->pages_again * PAGE_BYTES);
    count(&c, "stored_bytes", w->bytes_stored);
    return emit_counts(s, &c, err);
}

static int serve_export(struct repo *r, const Vmmig__Control__Repo *m,
                        const struct repo_service *s, struct vm_error **err)
{
    const char *file = *m->file ? m->file : NULL;
    if (image_export_fd(r, m->image, file, s->fd, m->path, &s->control, err) < 0)
        return -1;
    return emit_nothing(s, err);
}

struct image_message {
    Vmmig__Control__Image m;
    Vmmig__Control__ImageFile files[IMAGE_FILES_MAX], *list[IMAGE_FILES_MAX];
    struct image image;
};

/* Describes m->image. */
static void fill_image(struct image_message *im)
{
    struct image *image = &im->image;
    vmmig__control__image__init(&im->m);
    im->m.name = image->name;
    im->m.parent = image->parent;
    im->m.created_s = (int64_t)image->created_s;
    im->m.size = image_size(image);
    im->m.bytes_added = image->bytes_added;
    for (unsigned i = 0; i < image->n_files; i++) {
        vmmig__control__image_file__init(&im->files[i]);
        im->files[i].name = image->files[i].name;
        im->files[i].size = image->files[i].size;
        im->list[i] = &im->files[i];
    }
    im->m.files = im->list;
    im->m.n_files = image->n_files;
}

struct listing {
    const struct repo_service *service;
    struct image_message *messages;
    size_t n;
    struct findings *damaged;
};

static int emit_images(struct listing *l, bool more, struct vm_error **err)
{
    Vmmig__Control__Image *list[LIST_PART];
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    for (size_t i = 0; i < l->n; i++)
        list[i] = &l->messages[i].m;
    result.images = list;
    result.n_images = l->n;
    result.more = more;
    result.findings = l->damaged->list;
    result.n_findings = more ? 0 : l->damaged->n;
    l->n = 0;
    return l->service->emit(&result, l->service->arg, err);
}

static void list_damaged(const char *name, const struct vm_error *problem, void *arg)
{
    struct listing *l = arg;
    (void)name;
    take_finding(SCRUB_PACK, error_message(problem), l->damaged);
}

static int list_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    if (l->n == LIST_PART && emit_images(l, true, err) < 0)
        return -1;
    l->messages[l->n].image = *image;
    fill_image(&l->messages[l->n++]);
    return 0;
}

static int serve_list(struct repo *r, const struct repo_service *s, struct vm_error **err)
{
    cleanup_free struct image_message *messages = malloc(LIST_PART * sizeof(*messages));
    CLEANUP(findings) struct findings *damaged = calloc(1, sizeof(*damaged));
    struct listing l = {.service = s, .messages = messages, .damaged = damaged};
    if (!messages || !damaged)
        return error_nomem(err);
    if (catalogue_list(repo_store(r), list_image, list_damaged, &l, err) < 0)
        return -1;
    return emit_images(&l, false, err);
}

static int emit_show(const struct repo_service *s, struct image_show *show,
                     struct image_message *im, struct vm_error **err)
{
    Vmmig__Control__ImageSharer sharers[SHARERS_MAX], *list[SHARERS_MAX];
    Vmmig__Control__ImageSizes sizes = VMMIG__CONTROL__IMAGE_SIZES__INIT;
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    Vmmig__Control__Image *images[] = {&im->m};
    im->image = show->image;
    fill_image(im);
    sizes.virtual_bytes = show->sizes.virtual_bytes;
    sizes.data_bytes = show->sizes.data_bytes;
    sizes.stored_bytes = show->sizes.stored_bytes;
    sizes.shared_bytes = show->sizes.shared_bytes;
    sizes.unique_bytes = show->sizes.unique_bytes;
    sizes.recipe_bytes = show->sizes.recipe_bytes;
    sizes.estimated = show->sizes.estimated;
    sizes.unreadable = show->sizes.unreadable;
    sizes.sharers = show->n_sharers;
    for (size_t i = 0; i < show->n_sharers && i < SHARERS_MAX; i++) {
        vmmig__control__image_sharer__init(&sharers[i]);
        sharers[i].name = show->sharers[i].name;
        sharers[i].bytes = show->sharers[i].bytes;
        list[sizes.n_sharers_shown++] = &sharers[i];
    }
    sizes.sharers_shown = list;
    result.images = images;
    result.n_images = 1;
    result.sizes = &sizes;
    return s->emit(&result, s->arg, err);
}

static int serve_show(struct repo *r, const Vmmig__Control__Repo *m, const struct repo_service *s,
                      struct vm_error **err)
{
    cleanup_free struct image_show *show = calloc(1, sizeof(*show));
    cleanup_free struct image_message *im = malloc(sizeof(*im));
    if (!show || !im)
        return error_nomem(err);
    if (image_show(r, m->image, show, err) < 0)
        return -1;
    int result = emit_show(s, show, im, err);
    free(show->sharers);
    return result;
}

struct differing {
    const struct repo_service *service;
    Vmmig__Control__ImageStretch stretches[DIFF_PART];
    char files[DIFF_PART][IMAGE_FILE_NAME_MAX + 1];
    size_t n;
};

static int emit_stretches(struct differing *d, bool more, struct vm_error **err)
{
    Vmmig__Control__ImageStretch *list[DIFF_PART];
    Vmmig__Control__RepoResult result = VMMIG__CONTROL__REPO_RESULT__INIT;
    for (size_t i = 0; i < d->n; i++)
        list[i] = &d->stretches[i];
    result.stretches = list;
    result.n_stretches = d->n;
    result.more = more;
    d->n = 0;
    return d->service->emit(&result, d->service->arg, err);
}

static int take_difference(const struct image_difference *found, void *arg, struct vm_error **err)
{
    struct differing *d = arg;
    if (d->n == DIFF_PART && emit_stretches(d, true, err) < 0)
        return -1;
    Vmmig__Control__ImageStretch *m = &d->stretches[d->n];
    vmmig__control__image_stretch__init(m);
    m->file = d->files[d->n++];
    snprintf(m->file, IMAGE_FILE_NAME_MAX + 1, "%s", found->file);
    m->offset = found->offset;
    m->len = found->len;
    return 0;
}

static int serve_diff(struct repo *r, const Vmmig__Control__Repo *m, const struct repo_service *s,
                      struct vm_error **err)
{
    cleanup_free struct differing *d = malloc(sizeof(*d));
    if (!d)
        return error_nomem(err);
    d->service = s;
    d->n = 0;
    if (image_diff(r, m->image, m->other, take_difference, d, err) < 0)
        return -1;
    return emit_stretches(d, false, err);
}

/* Also of what is no image: an entry that is damaged has no other name. */
static int serve_delete(struct repo *r, const char *name, const struct repo_service *s,
                        struct vm_error **err)
{
    cleanup_error struct vm_error *problem = NULL;
    bool removed = false;
    if (catalogue_delete(repo_store(r), name, &problem) == 0)
        return emit_nothing(s, err);
    if ((problem->kind == VM_ERROR_NOT_FOUND || problem->kind == VM_ERROR_USAGE) &&
        catalogue_delete_damaged(repo_store(r), name, &removed, err) < 0)
        return -1;
    return removed ? emit_nothing(s, err) : error_propagate(err, steal_ptr(&problem));
}

/* ---- all verbs ---- */

static int serve(struct repo *r, const char *url, const Vmmig__Control__Repo *m,
                 const struct repo_service *s, struct vm_error **err)
{
    switch (m->verb) {
    case VMMIG__CONTROL__REPO_VERB__REPO_STAT:
        return serve_stat(r, url, s, err);
    case VMMIG__CONTROL__REPO_VERB__REPO_GC:
        return serve_gc(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__REPO_SCRUB:
        return serve_scrub(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__REPO_REBUILD_INDEX:
        return serve_rebuild(r, s, err);
    case VMMIG__CONTROL__REPO_VERB__REPO_COPY:
        return serve_copy(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT:
        return serve_import(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT:
        return serve_export(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_LIST:
        return serve_list(r, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_SHOW:
        return serve_show(r, m, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE:
        return serve_delete(r, m->image, s, err);
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF:
        return serve_diff(r, m, s, err);
    default:
        return error_set(err, VM_ERROR_VERSION, "this vmmig does not know that request");
    }
}

/* The verbs that are about one image, and which of its names are used. */
static int check_names(const Vmmig__Control__Repo *m, struct vm_error **err)
{
    bool about_one = m->verb >= VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT &&
                     m->verb != VMMIG__CONTROL__REPO_VERB__IMAGE_LIST;
    if (m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE)
        return 0; /* what it names may be no image */
    if ((about_one || *m->image) && image_name_check(m->image, err) < 0)
        return -1;
    if (m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF && image_name_check(m->other, err) < 0)
        return -1;
    return *m->parent ? image_name_check(m->parent, err) : 0;
}

int repo_service_run(const char *url, const Vmmig__Control__Repo *request,
                     const struct repo_service *service, struct vm_error **err)
{
    struct repo_init_options init = {.data_pool = *request->data_pool ? request->data_pool : NULL};
    if (check_names(request, err) < 0)
        return -1;
    if (request->verb == VMMIG__CONTROL__REPO_VERB__REPO_INIT)
        return repo_init(url, &init, err) < 0 ? -1 : emit_nothing(service, err);
    CLEANUP(repo) struct repo *r = repo_open(url, err);
    return r ? serve(r, url, request, service, err) : -1;
}
