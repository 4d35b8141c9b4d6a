/* SPDX-License-Identifier: Apache-2.0 */
/*
 * template: snapshots that are published to be cloned. Templates are images of the catalogue under
 * names of their own:
 *
 *     t:NAME@DIGEST      a version, for ever the same content; its parent is the snapshot
 *     t:NAME:TAG         a tag; its parent is the version that it stands for now
 *     t:NAME@DIGEST+ws   the version's working set (snapshot/working_set.h), once it is known
 *
 * DIGEST is half of the SHA-256 over the names and sizes of the files and the whole identities
 * (SHA-256) of their pages: it depends on the content alone, on any host, and nobody can make other
 * content of the same digest. A tag moves in one guarded write. All of them are roots for
 * collections; who uses a version has a lease, so that deleting it harms nobody.
 *
 *     template_publish(store, "web1@nightly", "debian12:v3", &t, &err)
 *     template_find(store, "debian12:v3", &t, &image, &err)     also "debian12@DIGEST"
 *
 * Races: whatever is published and deleted at the same time, a tag that is left in the end stands
 * for a version that is there (whose working set may have to be found again). Crash: a version may be there without its
 * tag; publishing again goes on from there. A deleting that crashed may leave a tag whose version
 * is gone: it can be published or deleted again. Threads: any.
 */
#ifndef VMMIG_REPO_TEMPLATE_H
#define VMMIG_REPO_TEMPLATE_H

#include "repo/catalogue.h"

enum { TEMPLATE_NAME_MAX = 48, TEMPLATE_TAG_MAX = 24, TEMPLATE_DIGEST_SIZE = 33 };

struct template {
    char name[TEMPLATE_NAME_MAX + 1];
    char tag[TEMPLATE_TAG_MAX + 1];    /* "": a version without one, or asked for by its digest */
    char digest[TEMPLATE_DIGEST_SIZE];
    char image[IMAGE_NAME_MAX + 1];    /* t:NAME@DIGEST */
    char source[IMAGE_NAME_MAX + 1];   /* the snapshot that was published */
    uint64_t size, published_s;
    bool has_working_set;
};

/* USAGE, with the rule, unless it is NAME:TAG. */
int template_name_check(const char *name, struct vm_error **err);
/* Is that a name that only the functions of this header may give to an image, and take away? */
bool template_owns(const char *image);
/* Is that the name of an image that is a version? */
bool template_is_version(const char *image);
/*
 * Make `source` a version of the template and let the tag stand for it. REFUSED if it is no
 * snapshot of a running VM.
 */
int template_publish(struct store *s, const char *source, const char *name,
                     struct template *ret_template, struct vm_error **err);
/* NAME:TAG, or NAME@DIGEST (its first 8 digits or more, if they tell it). NOT_FOUND. */
int template_find(struct store *s, const char *name, struct template *ret_template,
                  struct image *ret_image, struct vm_error **err);
/* All tags, and versions without a tag, in no order. */
typedef int template_visit_fn(const struct template *t, void *arg, struct vm_error **err);
int template_list(struct store *s, template_visit_fn *visit, void *arg, struct vm_error **err);
/*
 * Delete a tag, and its version when no other tag stands for it; or a version, REFUSED while it has
 * tags.
 */
int template_delete(struct store *s, const char *name, struct vm_error **err);

#endif
