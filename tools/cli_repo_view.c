/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_repo.h"

#include "base/clock.h"
#include "base/text.h"
#include "base/uuid.h"
#include "repo/service.h"
#include "tools/cli_print.h"

#include <inttypes.h>
#include <string.h>
#include <time.h>

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static void instant(int64_t seconds, char out[32])
{
    time_t t = (time_t)seconds;
    struct tm tm;
    gmtime_r(&t, &tm);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

static const char *uuid_of(const ProtobufCBinaryData *data, char out[UUID_TEXT_SIZE])
{
    struct uuid id;
    memcpy(id.bytes, data->data, sizeof(id.bytes));
    return uuid_format(&id, out);
}

/* ---- as JSON ---- */

static json_t *json_image(const Vmmig__Control__Image *m)
{
    char created[32];
    json_t *files = json_array();
    instant(m->created_s, created);
    for (size_t i = 0; i < m->n_files; i++)
        json_array_append_new(files, json_pack("{s:s, s:o}", "name", m->files[i]->name, "size",
                                               number(m->files[i]->size)));
    return json_pack("{s:s, s:s?, s:s, s:o, s:o, s:o}", "image", m->name, "parent",
                     *m->parent ? m->parent : NULL, "created", created, "size", number(m->size),
                     "bytes_added", number(m->bytes_added), "files", files);
}

static json_t *json_stat(const Vmmig__Control__RepoStat *m)
{
    char uuid[UUID_TEXT_SIZE], taken[32];
    instant(m->oldest_lease_s, taken);
    json_t *oldest = m->leases ? json_pack("{s:s, s:s, s:s}", "image", m->oldest_lease_image,
                                           "holder", m->oldest_lease_holder, "taken", taken)
                               : json_null();
    return json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "uuid",
                     uuid_of(&m->uuid, uuid), "url", m->url, "images", number(m->images),
                     "image_bytes", number(m->image_bytes), "packs", number(m->packs),
                     "pack_bytes", number(m->pack_bytes), "trees", number(m->trees), "tree_bytes",
                     number(m->tree_bytes), "index_shards", number(m->index_shards), "index_keys",
                     number(m->index_keys), "space_total", number(m->space_total),
                     "space_available", number(m->space_available), "leases", number(m->leases),
                     "oldest_lease", oldest);
}

static const char *finding_kind(const Vmmig__Control__RepoFinding *m, bool text)
{
    if (m->forwarding)
        return "forwarding";
    if (m->image)
        return text ? "image touched" : "image";
    return text ? "damaged" : "damage";
}

static json_t *json_sizes(const Vmmig__Control__ImageSizes *m)
{
    json_t *sharers = json_array();
    for (size_t i = 0; i < m->n_sharers_shown; i++)
        json_array_append_new(sharers,
                              json_pack("{s:s, s:o}", "image", m->sharers_shown[i]->name, "bytes",
                                        number(m->sharers_shown[i]->bytes)));
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:o, s:o, s:o}", "virtual_bytes",
                     number(m->virtual_bytes), "data_bytes", number(m->data_bytes),
                     "stored_bytes", number(m->stored_bytes), "shared_bytes",
                     number(m->shared_bytes), "unique_bytes", number(m->unique_bytes),
                     "recipe_bytes", number(m->recipe_bytes), "estimated", (int)m->estimated,
                     "unreadable", number(m->unreadable), "shared_with", number(m->sharers), "sharers", sharers);
}

static json_t *array_of(json_t *object, const char *name)
{
    if (!json_object_get(object, name))
        json_object_set_new(object, name, json_array());
    return json_object_get(object, name);
}

static void merge(json_t *object, json_t *fields)
{
    json_object_update(object, fields);
    json_decref(fields);
}

static int keep_counts(struct cli_repo_view *v, const Vmmig__Control__RepoResult *p,
                       struct vm_error **err)
{
    for (size_t i = 0; i < p->n_counts; i++)
        json_object_set_new(v->object, p->counts[i]->name, number(p->counts[i]->value));
    return json_is_object(v->object) ? 0 : error_nomem(err);
}

static int part_as_json(struct cli_repo_view *v, const Vmmig__Control__RepoResult *p,
                        struct vm_error **err)
{
    json_t *o = v->object;
    if (p->stat)
        merge(o, json_stat(p->stat));
    if (p->sizes && p->n_images)
        merge(o, json_image(p->images[0]));
    if (p->sizes)
        merge(o, json_sizes(p->sizes));
    for (size_t i = 0; !p->sizes && i < p->n_images; i++)
        json_array_append_new(array_of(o, "images"), json_image(p->images[i]));
    for (size_t i = 0; i < p->n_stretches; i++)
        json_array_append_new(array_of(o, "differences"),
                              json_pack("{s:s, s:o, s:o}", "file", p->stretches[i]->file, "offset",
                                        number(p->stretches[i]->offset), "len",
                                        number(p->stretches[i]->len)));
    for (size_t i = 0; i < p->n_findings; i++)
        json_array_append_new(array_of(o, "findings"),
                              json_pack("{s:s, s:s}", "kind",
                                        finding_kind(p->findings[i], false), "what",
                                        p->findings[i]->what));
    return keep_counts(v, p, err);
}

/* ---- as text ---- */

static void print_stat(const Vmmig__Control__RepoStat *m)
{
    char uuid[UUID_TEXT_SIZE], taken[32];
    uint64_t stored = m->pack_bytes + m->tree_bytes;
    printf("%s\n  id         %s\n", m->url, uuid_of(&m->uuid, uuid));
    printf("  images     %" PRIu64 ", %s\n", m->images, text_size(m->image_bytes));
    printf("  stored     %s: %s in %" PRIu64 " packs, ", text_size(stored),
           text_size(m->pack_bytes), m->packs);
    printf("%s in %" PRIu64 " trees\n", text_size(m->tree_bytes), m->trees);
    instant(m->oldest_lease_s, taken);
    if (m->leases)
        printf("  leases     %" PRIu64 ", the oldest of %s by %s, since %s\n", m->leases,
               m->oldest_lease_image, m->oldest_lease_holder, taken);
    if (stored)
        printf("  ratio      %.1f:1\n", (double)m->image_bytes / (double)stored);
    printf("  index      %" PRIu64 " keys in %u shards\n", m->index_keys, m->index_shards);
    printf("  space      %s free of ", text_size(m->space_available));
    printf("%s\n", text_size(m->space_total));
}

static void print_image_line(struct cli_repo_view *v, const Vmmig__Control__Image *m)
{
    char created[32];
    if (!v->n++)
        printf("%-20s  %10s  %10s  %s\n", "CREATED", "SIZE", "ADDED", "NAME");
    instant(m->created_s, created);
    printf("%-20s  %10s  ", created, text_size(m->size));
    printf("%10s  %s\n", text_size(m->bytes_added), m->name);
}

static void print_show(const Vmmig__Control__Image *m, const Vmmig__Control__ImageSizes *z)
{
    char created[32];
    const char *about = z->estimated ? "about " : "";
    instant(m->created_s, created);
    printf("%s\n  created    %s\n", m->name, created);
    if (*m->parent)
        printf("  parent     %s\n", m->parent);
    for (size_t i = 0; i < m->n_files; i++)
        printf("  file       %s, %s\n", m->files[i]->name, text_size(m->files[i]->size));
    printf("  virtual    %s\n  data       %s\n", text_size(z->virtual_bytes),
           text_size(z->data_bytes));
    printf("  stored     %s%s\n", about, text_size(z->stored_bytes));
    printf("  unique     %s%s\n  shared     ", about, text_size(z->unique_bytes));
    printf("%s%s\n  recipe     ", about, text_size(z->shared_bytes));
    printf("%s\n", text_size(z->recipe_bytes));
    for (size_t i = 0; i < z->n_sharers_shown; i++)
        printf("  with       %s, %s%s\n", z->sharers_shown[i]->name, about,
               text_size(z->sharers_shown[i]->bytes));
    if (z->unreadable)
        printf("  damaged    %" PRIu64 " other image%s, not counted: \"vmmig repo scrub\" names them\n",
               z->unreadable, z->unreadable == 1 ? "" : "s");
    if (z->sharers > z->n_sharers_shown)
        printf("  with       %" PRIu64 " more\n", z->sharers - z->n_sharers_shown);
}

static bool is_bytes(const char *name)
{
    size_t n = strlen(name);
    return !strcmp(name, "size") || !strcmp(name, "bytes") ||
           (n > 6 && !strcmp(name + n - 6, "_bytes")) || !strncmp(name, "bytes_", 6);
}

static void print_count(const char *field, uint64_t value)
{
    char name[32];
    snprintf(name, sizeof(name), "%s", field);
    for (char *c = name; *c; c++)
        *c = *c == '_' ? ' ' : *c;
    size_t n = strlen(name);
    if (n > 6 && !strcmp(name + n - 6, " bytes"))
        name[n - 6] = 0;
    if (is_bytes(field))
        printf("  %-18s  %s\n", name, text_size(value));
    else
        printf("  %-18s  %" PRIu64 "\n", name, value);
}

static void part_as_text(struct cli_repo_view *v, const Vmmig__Control__RepoResult *p)
{
    if (p->stat)
        print_stat(p->stat);
    if (p->sizes && p->n_images)
        print_show(p->images[0], p->sizes);
    for (size_t i = 0; !p->sizes && i < p->n_images; i++)
        print_image_line(v, p->images[i]);
    for (size_t i = 0; i < p->n_stretches; i++) {
        const Vmmig__Control__ImageStretch *d = p->stretches[i];
        printf("%s  %" PRIu64 "  %" PRIu64 "\n", d->file, d->offset, d->len);
    }
    for (size_t i = 0; i < p->n_findings; i++)
        printf("%s: %s\n", finding_kind(p->findings[i], true), p->findings[i]->what);
}

int cli_repo_part(struct cli_repo_view *v, const Vmmig__Control__RepoResult *part,
                  struct vm_error **err)
{
    for (size_t i = 0; i < part->n_counts; i++)
        v->damaged |= part->counts[i]->value && (!strcmp(part->counts[i]->name, "damaged") ||
                                                 !strcmp(part->counts[i]->name, "images_touched"));
    /* A scrub counts; else findings are of the catalogue, beside what was asked for. */
    v->damaged |= part->n_findings && v->request->verb != VMMIG__CONTROL__REPO_VERB__REPO_SCRUB;
    for (size_t i = 0; i < part->n_stretches; i++)
        v->differing += part->stretches[i]->len;
    if (!v->object)
        v->object = json_object();
    if (v->cli->json)
        return part_as_json(v, part, err);
    part_as_text(v, part);
    return keep_counts(v, part, err);
}

/* What was done, where the parts say nothing of it. */
static void print_done(const struct cli_repo_view *v, int64_t elapsed_ns)
{
    const Vmmig__Control__Repo *m = v->request;
    double seconds = (double)elapsed_ns / NSEC_PER_SEC;
    switch (m->verb) {
    case VMMIG__CONTROL__REPO_VERB__REPO_INIT:
        puts("the repository is ready");
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_LIST:
        if (!v->n)
            puts("no images");
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE:
        printf("%s: deleted; `vmmig repo gc` frees its space\n", m->image);
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF:
        printf("%s differ\n", v->differing ? text_size(v->differing) : "0 bytes");
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT:
        printf("%s: imported in %.1f s\n", m->image, seconds);
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT:
        printf("%s: exported to %s in %.1f s\n", m->image, m->path, seconds);
        break;
    case VMMIG__CONTROL__REPO_VERB__REPO_SCRUB:
        if (v->damaged)
            puts("to mend it, import the same content again, or, where it is stored twice, use --heal; "
                 "what cannot be had again goes with the images that it touches");
        __attribute__((fallthrough));
    default:
        if (elapsed_ns >= 0)
            printf("%s: done in %.1f s\n", repo_service_verb_name(m->verb), seconds);
    }
}

/* What was done, then in which amounts. */
static void complete_text(const struct cli_repo_view *v, int64_t elapsed_ns)
{
    const char *name;
    json_t *value;
    print_done(v, elapsed_ns);
    json_object_foreach(v->object, name, value)
        print_count(name, (uint64_t)json_integer_value(value));
}

static void complete_json(struct cli_repo_view *v, int64_t elapsed_ns)
{
    const Vmmig__Control__Repo *m = v->request;
    switch (m->verb) {
    case VMMIG__CONTROL__REPO_VERB__REPO_INIT:
        json_object_set_new(v->object, "initialized", json_true());
        break;
    case VMMIG__CONTROL__REPO_VERB__REPO_SCRUB:
        array_of(v->object, "findings");
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_LIST:
        array_of(v->object, "images");
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE:
        json_object_set_new(v->object, "deleted", json_true());
        json_object_set_new(v->object, "image", json_string(m->image));
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF:
        array_of(v->object, "differences");
        json_object_set_new(v->object, "differing_bytes", number(v->differing));
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT:
        json_object_set_new(v->object, "path", json_string(m->path));
        json_object_set_new(v->object, "image", json_string(m->image));
        break;
    case VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT:
        json_object_set_new(v->object, "image", json_string(m->image));
        break;
    default:
        break;
    }
    if (elapsed_ns >= 0)
        json_object_set_new(v->object, "elapsed_ms",
                            json_real((double)elapsed_ns / NSEC_PER_MSEC));
}

int cli_repo_end(struct cli_repo_view *v, int64_t elapsed_ns, struct vm_error **err)
{
    int status = v->damaged ? error_kind_status(VM_ERROR_CORRUPT) : 0;
    if (!v->cli->json) {
        complete_text(v, elapsed_ns);
        return status;
    }
    complete_json(v, elapsed_ns);
    json_t *object = v->object;
    v->object = NULL;
    return cli_print_json(object, err) < 0 ? -1 : status;
}
