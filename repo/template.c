/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/template.h"

#include "base/cleanup.h"
#include "base/fault.h"
#include "repo/file_reader.h"
#include "repo/footer_cache.h"

#include <ctype.h>
#include <openssl/evp.h>
#include <string.h>

enum { TRIES = 16, FOOTERS_BYTES = 32 << 20, DIGEST_TYPED_MIN = 8 };

static bool word_is_good(const char *word, size_t n, size_t max)
{
    for (size_t i = 0; i < n; i++)
        if (!isascii(word[i]) || (!isalnum((unsigned char)word[i]) && !strchr("._-", word[i])))
            return false;
    return n && n <= max && *word != '.' && *word != '-';
}

/* The name apart: ret->name, and tag or digest (perhaps only its beginning). */
static int split(const char *name, struct template *ret, struct vm_error **err)
{
    struct template t = {0};
    size_t n = strcspn(name, ":@");
    const char *word = name[n] ? name + n + 1 : "";
    bool digest = name[n] == '@';
    bool good = word_is_good(name, n, TEMPLATE_NAME_MAX) &&
                word_is_good(word, strlen(word),
                             digest ? TEMPLATE_DIGEST_SIZE - 1 : TEMPLATE_TAG_MAX);
    if (digest && (strspn(word, "0123456789abcdef") != strlen(word) ||
                   strlen(word) < DIGEST_TYPED_MIN))
        good = false;
    if (!good)
        return error_set(err, VM_ERROR_USAGE,
                         "\"%.100s\" is no name of a template: NAME:TAG (%d and %d letters, digits "
                         "and ._-) or NAME@DIGEST",
                         name, TEMPLATE_NAME_MAX, TEMPLATE_TAG_MAX);
    memcpy(t.name, name, n);
    strcpy(digest ? t.digest : t.tag, word);
    *ret = t;
    return 0;
}

int template_name_check(const char *name, struct vm_error **err)
{
    struct template t;
    if (split(name, &t, err) < 0)
        return -1;
    return *t.tag ? 0 : error_set(err, VM_ERROR_USAGE, "\"%.100s\" has no tag: NAME:TAG", name);
}

static void tag_image(const struct template *t, char out[IMAGE_NAME_MAX + 1])
{
    snprintf(out, IMAGE_NAME_MAX + 1, "t:%s:%s", t->name, t->tag);
}

static void version_image(struct template *t)
{
    snprintf(t->image, sizeof(t->image), "t:%s@%s", t->name, t->digest);
}

/* ---- the digest ---- */

struct digest {
    struct store *store;
    EVP_MD_CTX *md;
    struct footer_cache *footers;
    struct page_hasher hasher;
    struct file_reader *reader; /* of the file that is read */
    uint8_t data[PAGE_BYTES];
};

/* From its pack's footer; where that does not tell (it is lost, or moved), from the page itself. */
static int identify(struct digest *d, const struct recipe_page *page, uint64_t offset,
                    struct page_id *ret_id, struct vm_error **err)
{
    footer_cache_trim(d->footers);
    if (!footer_cache_knows(d->footers, page->pack) &&
        footer_cache_load(d->footers, &page->pack, 1, err) < 0)
        return -1;
    const struct cached_footer *f = footer_cache_get(d->footers, page->pack);
    if (f && cached_footer_identity(f, page->offset, page->page, ret_id) &&
        !memcmp(ret_id->bytes, page->id, sizeof(page->id)))
        return 0;
    uint64_t left = file_reader_size(d->reader) - offset;
    memset(d->data, 0, sizeof(d->data));
    if (file_reader_read(d->reader, offset, d->data, left < PAGE_BYTES ? left : PAGE_BYTES, err) < 0)
        return -1;
    return page_hasher_hash(&d->hasher, d->data, PAGE_BYTES, ret_id, err);
}

static int digest_leaf(struct digest *d, uint64_t number, const struct recipe_leaf *leaf,
                       struct vm_error **err)
{
    uint8_t text[8];
    struct page_id id;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        uint64_t page = number * RECIPE_LEAF_PAGES + i;
        if (!leaf->pages[i].len)
            continue;
        if (identify(d, &leaf->pages[i], page * PAGE_BYTES, &id, err) < 0)
            return -1;
        put_le64(text, page);
        EVP_DigestUpdate(d->md, text, sizeof(text));
        EVP_DigestUpdate(d->md, id.bytes, sizeof(id.bytes));
    }
    return 0;
}

static int digest_file(struct digest *d, const struct image *image, const struct image_entry *file,
                       struct vm_error **err)
{
    uint8_t number[8];
    CLEANUP(file_reader)
    struct file_reader *r = file_reader_open(d->store, image, file, err);
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    if (!r || !leaf)
        return r ? error_nomem(err) : -1;
    d->reader = r;
    EVP_DigestUpdate(d->md, file->name, strlen(file->name) + 1);
    put_le64(number, file->size);
    EVP_DigestUpdate(d->md, number, sizeof(number));
    for (uint64_t at = 0, start, len; at < file->size; at = start + len) {
        if (file_reader_next_data(r, at, &start, &len, err) < 0)
            return -1;
        if (!len)
            break;
        for (uint64_t l = start / RECIPE_LEAF_BYTES; l * RECIPE_LEAF_BYTES < start + len; l++) {
            if (file_reader_leaf(r, l, leaf, err) < 0 || digest_leaf(d, l, leaf, err) < 0)
                return -1;
        }
    }
    return 0;
}

static int digest_image(struct store *s, const struct image *image,
                        char out[TEMPLATE_DIGEST_SIZE], struct vm_error **err)
{
    uint8_t hash[EVP_MAX_MD_SIZE];
    struct digest d = {.store = s, .md = EVP_MD_CTX_new()};
    int r = page_hasher_init(&d.hasher, err);
    if (r == 0 && (!d.md || !EVP_DigestInit_ex(d.md, EVP_sha256(), NULL)))
        r = error_nomem(err);
    if (r == 0 && !(d.footers = footer_cache_create(s, FOOTERS_BYTES, err)))
        r = -1;
    for (unsigned i = 0; r == 0 && i < image->n_files; i++)
        r = digest_file(&d, image, &image->files[i], err);
    if (r == 0)
        EVP_DigestFinal_ex(d.md, hash, NULL);
    footer_cache_destroy(d.footers);
    page_hasher_finish(&d.hasher);
    EVP_MD_CTX_free(d.md);
    for (int i = 0; r == 0 && i < (TEMPLATE_DIGEST_SIZE - 1) / 2; i++)
        snprintf(out + 2 * i, 3, "%02x", hash[i]);
    return r;
}

/* ---- publishing ---- */

static const struct object_set nothing = {{0}, {0}};

static int check_source(const struct image *image, struct vm_error **err)
{
    static const char *const files[] = {"vm.json", "device.state", "memory.raw"};
    for (size_t i = 0; i < sizeof(files) / sizeof(*files); i++)
        if (!image_find_file(image, files[i]))
            return error_set(err, VM_ERROR_REFUSED,
                             "image %s has no %s: only a snapshot of a running VM becomes a template",
                             image->name, files[i]);
    return 0;
}

static int commit_once(struct store *s, const struct image *from, const char *to,
                       const char *parent, const struct image *before, struct vm_error **err)
{
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    CLEANUP(registration)
    struct registration *r = catalogue_register_replace(s, to, before, from, err);
    if (!r)
        return -1;
    *image = *from;
    strcpy(image->name, to);
    strcpy(image->parent, parent);
    image->writer = registration_number(r);
    image->bytes_added = 0;
    return catalogue_commit(r, image, &nothing, err);
}

/*
 * `to` as another name of what `from` is. `before` (NULL: none) is what it was. Collections may give
 * `from` other roots meanwhile.
 */
static int commit_as(struct store *s, const struct image *from, const char *to, const char *parent,
                     const struct image *before, struct vm_error **err)
{
    cleanup_free struct image *now = malloc(sizeof(*now));
    if (!now)
        return error_nomem(err);
    *now = *from;
    for (int i = 0;; i++) {
        cleanup_error struct vm_error *failed = NULL;
        enum image_fate fate = IMAGE_GONE;
        if (commit_once(s, now, to, parent, before, &failed) == 0)
            return 0;
        if (failed->kind == VM_ERROR_NOT_FOUND && i < TRIES &&
            catalogue_find_again(s, from, now, &fate, err) < 0)
            return -1;
        if (fate == IMAGE_GONE)
            return error_propagate(err, steal_ptr(&failed));
    }
}

/* From the snapshot `source`, or from whatever has that content; as often as somebody deletes it. */
static int make_version(struct store *s, const struct image *from, const char *source,
                        const struct template *t, struct image *ret_version, struct vm_error **err)
{
    for (int i = 0;; i++) {
        cleanup_error struct vm_error *failed = NULL;
        if (catalogue_find(s, t->image, ret_version, &failed) == 0)
            return 0;
        if (failed->kind != VM_ERROR_NOT_FOUND || i == TRIES)
            return error_propagate(err, steal_ptr(&failed));
        error_clear(&failed);
        if (commit_as(s, from, t->image, source, NULL, &failed) < 0 &&
            failed->kind != VM_ERROR_CONFLICT)
            return error_propagate(err, steal_ptr(&failed));
    }
}

static int move_tag(struct store *s, const struct template *t, struct image *version,
                    struct vm_error **err)
{
    char tag[IMAGE_NAME_MAX + 1];
    cleanup_free struct image *before = malloc(sizeof(*before));
    if (!before)
        return error_nomem(err);
    tag_image(t, tag);
    for (int i = 0; i < TRIES; i++) {
        cleanup_error struct vm_error *failed = NULL;
        bool there = catalogue_find(s, tag, before, &failed) == 0;
        if (!there && failed->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&failed));
        error_clear(&failed);
        if (there && !strcmp(before->parent, version->name))
            return 0;
        if (commit_as(s, version, tag, version->name, there ? before : NULL, &failed) == 0)
            return 0;
        if (failed->kind != VM_ERROR_CONFLICT)
            return error_propagate(err, steal_ptr(&failed));
    }
    return error_set(err, VM_ERROR_CONFLICT, "tag %s:%s changes all the time; try again", t->name,
                     t->tag);
}

static void describe(struct template *t, const struct image *version)
{
    strcpy(t->source, version->parent);
    t->size = image_size(version);
    t->published_s = version->created_s;
}

/* As often as somebody deletes the version meanwhile. */
static int publish_content(struct store *s, const struct image *source, const struct template *t,
                           struct image *ret_version, struct vm_error **err)
{
    for (int i = 0;; i++) {
        cleanup_error struct vm_error *failed = NULL;
        if (make_version(s, source, source->name, t, ret_version, &failed) == 0 &&
            move_tag(s, t, ret_version, &failed) == 0)
            break;
        if (i == TRIES || failed->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&failed));
    }
    (void)FAULT("template.tagged");
    /* Who was deleting the version when it had no tag has deleted it, or looks for tags once more. */
    return make_version(s, source, source->name, t, ret_version, err);
}

int template_publish(struct store *s, const char *source, const char *name,
                     struct template *ret_template, struct vm_error **err)
{
    struct template t;
    cleanup_free struct image *images = calloc(2, sizeof(*images));
    if (!images)
        return error_nomem(err);
    if (template_name_check(name, err) < 0 || split(name, &t, err) < 0 ||
        catalogue_find(s, source, &images[0], err) < 0 || check_source(&images[0], err) < 0 ||
        digest_image(s, &images[0], t.digest, err) < 0)
        return -1;
    version_image(&t);
    if (publish_content(s, &images[0], &t, &images[1], err) < 0)
        return -1;
    describe(&t, &images[1]);
    *ret_template = t;
    return 0;
}

/* ---- finding ---- */

/* Is it a version (1), a tag (2) or something else (0)? */
static int recognise(const struct image *image, struct template *ret)
{
    struct template t;
    if (strncmp(image->name, "t:", 2) || strchr(image->name, '+') ||
        split(image->name + 2, &t, NULL) < 0)
        return 0;
    int kind = *t.tag ? 2 : 1;
    const char *digest = strrchr(kind == 2 ? image->parent : image->name, '@');
    if (!digest || strlen(digest + 1) != TEMPLATE_DIGEST_SIZE - 1)
        return 0;
    strcpy(t.digest, digest + 1);
    version_image(&t);
    describe(&t, image);
    *ret = t;
    return kind;
}

bool template_owns(const char *image)
{
    return !strncmp(image, "t:", 2);
}

bool template_is_version(const char *image)
{
    struct template t;
    return template_owns(image) && split(image + 2, &t, NULL) == 0 &&
           strlen(t.digest) == TEMPLATE_DIGEST_SIZE - 1;
}

struct all {
    struct template *list;
    int *kinds;
    size_t n;
    char (*sets)[IMAGE_NAME_MAX + 1]; /* images that have a working set */
    size_t n_sets;
};

static void all_finish(struct all *a)
{
    free(a->list);
    free(a->kinds);
    free(a->sets);
}

static int add_working_set(struct all *a, const char *name, size_t len, struct vm_error **err)
{
    char(*more)[IMAGE_NAME_MAX + 1] = realloc(a->sets, (a->n_sets + 1) * sizeof(*more));
    if (!more)
        return error_nomem(err);
    a->sets = more;
    snprintf(more[a->n_sets++], sizeof(*more), "%.*s", (int)len, name);
    return 0;
}

static int gather(const struct image *image, void *arg, struct vm_error **err)
{
    struct all *a = arg;
    struct template t;
    size_t n = strlen(image->name);
    if (!strncmp(image->name, "t:", 2) && n > 3 && !strcmp(image->name + n - 3, "+ws"))
        return add_working_set(a, image->name, n - 3, err);
    int kind = recognise(image, &t);
    if (!kind)
        return 0;
    struct template *list = realloc(a->list, (a->n + 1) * sizeof(*list));
    if (list)
        a->list = list;
    int *kinds = realloc(a->kinds, (a->n + 1) * sizeof(*kinds));
    if (kinds)
        a->kinds = kinds;
    if (!list || !kinds)
        return error_nomem(err);
    list[a->n] = t;
    kinds[a->n++] = kind;
    return 0;
}

static bool has_tag(const struct all *a, const struct template *version)
{
    for (size_t i = 0; i < a->n; i++)
        if (a->kinds[i] == 2 && !strcmp(a->list[i].image, version->image))
            return true;
    return false;
}

/* A tag's source is that of its version. */
static void settle_source(const struct all *a, struct template *tag)
{
    for (size_t i = 0; i < a->n; i++)
        if (a->kinds[i] == 1 && !strcmp(a->list[i].image, tag->image)) {
            strcpy(tag->source, a->list[i].source);
            tag->published_s = a->list[i].published_s;
        }
}

int template_list(struct store *s, template_visit_fn *visit, void *arg, struct vm_error **err)
{
    struct all a = {0};
    int r = catalogue_list(s, gather, catalogue_skip, &a, err);
    for (size_t i = 0; r == 0 && i < a.n; i++) {
        for (size_t k = 0; k < a.n_sets; k++)
            a.list[i].has_working_set |= !strcmp(a.sets[k], a.list[i].image);
        if (a.kinds[i] == 2)
            settle_source(&a, &a.list[i]);
        if (a.kinds[i] == 2 || !has_tag(&a, &a.list[i]))
            r = visit(&a.list[i], arg, err);
    }
    all_finish(&a);
    return r;
}

static int find_digest(struct store *s, struct template *t, struct vm_error **err)
{
    struct all a = {0};
    int found = 0, r = catalogue_list(s, gather, catalogue_skip, &a, err);
    char digest[TEMPLATE_DIGEST_SIZE] = "";
    for (size_t i = 0; r == 0 && i < a.n; i++)
        if (a.kinds[i] == 1 && !strcmp(a.list[i].name, t->name) &&
            !strncmp(a.list[i].digest, t->digest, strlen(t->digest))) {
            strcpy(digest, a.list[i].digest);
            found++;
        }
    all_finish(&a);
    if (r < 0)
        return -1;
    if (found > 1)
        return error_set(err, VM_ERROR_USAGE, "%s@%s is not one version but %d: give more digits",
                         t->name, t->digest, found);
    if (!found)
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no template %s@%s", t->name, t->digest);
    strcpy(t->digest, digest);
    return 0;
}

static int find_tag(struct store *s, struct template *t, struct image *image,
                    struct vm_error **err)
{
    char tag[IMAGE_NAME_MAX + 1];
    cleanup_error struct vm_error *failed = NULL;
    struct template known;
    tag_image(t, tag);
    if (catalogue_find(s, tag, image, &failed) < 0)
        return failed->kind == VM_ERROR_NOT_FOUND
                   ? error_set(err, VM_ERROR_NOT_FOUND, "there is no template %s:%s", t->name,
                               t->tag)
                   : error_propagate(err, steal_ptr(&failed));
    if (recognise(image, &known) != 2)
        return error_set(err, VM_ERROR_CORRUPT, "image %s is no tag of a template", tag);
    *t = known;
    return 0;
}

int template_find(struct store *s, const char *name, struct template *ret_template,
                  struct image *ret_image, struct vm_error **err)
{
    struct template t;
    char ws[IMAGE_NAME_MAX + 8];
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    if (split(name, &t, err) < 0)
        return -1;
    if (*t.tag ? find_tag(s, &t, image, err) < 0
               : strlen(t.digest) < TEMPLATE_DIGEST_SIZE - 1 && find_digest(s, &t, err) < 0)
        return -1;
    version_image(&t);
    if (catalogue_find(s, t.image, image, err) < 0)
        return -1;
    describe(&t, image);
    snprintf(ws, sizeof(ws), "%s+ws", t.image);
    if (ret_image)
        *ret_image = *image;
    t.has_working_set = catalogue_find(s, ws, image, NULL) == 0;
    *ret_template = t;
    return 0;
}

/* ---- deleting ---- */

static int delete_quietly(struct store *s, const char *name, struct vm_error **err)
{
    cleanup_error struct vm_error *failed = NULL;
    if (catalogue_delete(s, name, &failed) == 0 || failed->kind == VM_ERROR_NOT_FOUND)
        return 0;
    return error_propagate(err, steal_ptr(&failed));
}

static int delete_version(struct store *s, const struct template *t, struct vm_error **err)
{
    char ws[IMAGE_NAME_MAX + 8];
    snprintf(ws, sizeof(ws), "%s+ws", t->image);
    return delete_quietly(s, ws, err) < 0 ? -1 : delete_quietly(s, t->image, err);
}

/* What it stands for; one that moves meanwhile is looked at once more. */
static int delete_tag(struct store *s, struct template *t, struct vm_error **err)
{
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    for (int i = 0; i < TRIES; i++) {
        cleanup_error struct vm_error *failed = NULL;
        if (find_tag(s, t, image, err) < 0)
            return -1;
        (void)FAULT("template.untag");
        if (catalogue_delete_image(s, image, &failed) == 0)
            return 0;
        if (failed->kind != VM_ERROR_CONFLICT)
            return error_propagate(err, steal_ptr(&failed));
    }
    return error_set(err, VM_ERROR_CONFLICT, "tag %s:%s changes all the time; try again", t->name,
                     t->tag);
}

/* Some tag that stands for the version; false: none does. */
static int look_for_tag(struct store *s, const struct template *version, struct template *ret_tag,
                        bool *ret_found, struct vm_error **err)
{
    struct all a = {0};
    int r = catalogue_list(s, gather, catalogue_skip, &a, err);
    *ret_found = false;
    for (size_t i = 0; r == 0 && i < a.n && !*ret_found; i++)
        if (a.kinds[i] == 2 && !strcmp(a.list[i].image, version->image)) {
            *ret_tag = a.list[i];
            *ret_found = true;
        }
    all_finish(&a);
    return r;
}

/* From the tag, which has the same content. NOT_FOUND: it does not stand for the version any more. */
static int restore_version(struct store *s, const struct template *version, const char *source,
                           const struct template *tag, struct vm_error **err)
{
    char name[IMAGE_NAME_MAX + 1];
    cleanup_free struct image *images = calloc(2, sizeof(*images));
    if (!images)
        return error_nomem(err);
    tag_image(tag, name);
    if (catalogue_find(s, name, &images[0], err) < 0)
        return -1;
    if (strcmp(images[0].parent, version->image))
        return error_set(err, VM_ERROR_NOT_FOUND, "tag %s:%s has moved", tag->name, tag->tag);
    return make_version(s, &images[0], source, version, &images[1], err);
}

/*
 * Tags that were published while their version was being deleted get it back. One that goes
 * meanwhile needs it no more, but there may be others.
 */
static int restore_if_tagged(struct store *s, const struct template *version, const char *source,
                             struct vm_error **err)
{
    for (int i = 0;; i++) {
        cleanup_error struct vm_error *failed = NULL;
        struct template tag;
        bool tagged;
        if (look_for_tag(s, version, &tag, &tagged, err) < 0)
            return -1;
        if (!tagged || restore_version(s, version, source, &tag, &failed) == 0)
            return 0;
        if (failed->kind != VM_ERROR_NOT_FOUND || i == TRIES)
            return error_propagate(err, steal_ptr(&failed));
    }
}

int template_delete(struct store *s, const char *name, struct vm_error **err)
{
    struct template t, version, tag;
    bool tagged;
    if (split(name, &t, err) < 0)
        return -1;
    bool is_tag = *t.tag != 0;
    if (is_tag ? delete_tag(s, &t, err) < 0 : template_find(s, name, &t, NULL, err) < 0)
        return -1;
    version_image(&t);
    if (look_for_tag(s, &t, &tag, &tagged, err) < 0)
        return -1;
    if (tagged)
        return is_tag ? 0
                      : error_set(err, VM_ERROR_REFUSED, "tags stand for %s: delete these first",
                                  name);
    char digest[TEMPLATE_NAME_MAX + TEMPLATE_DIGEST_SIZE + 2];
    snprintf(digest, sizeof(digest), "%s@%s", t.name, t.digest);
    const char *source = template_find(s, digest, &version, NULL, NULL) == 0 ? version.source : "";
    (void)FAULT("template.untagged");
    return delete_version(s, &t, err) < 0 ? -1 : restore_if_tagged(s, &t, source, err);
}
