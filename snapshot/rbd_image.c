/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/rbd_image.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/uuid.h"
#include "snapshot/run_tool.h"

#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ARGS = 16, SPEC_MAX = 3 * RBD_NAME_PART_MAX + 3, AGAIN_MS = 1000, REMOVE_SECONDS = 45 };

bool rbd_image_is(const char *name)
{
    return !strncmp(name, "rbd:", 4);
}

static int parse(const char *name, struct rbd_name *ret, struct vm_error **err)
{
    return rbd_name_parse(name, ret) ? 0
                                     : error_set(err, VM_ERROR_USAGE, "%s is no name of a RADOS block image", name);
}

static void make_spec(const struct rbd_name *n, char out[SPEC_MAX])
{
    snprintf(out, SPEC_MAX, "%s/%s%s%s", n->pool, n->space, *n->space ? "/" : "", n->image);
}

/* What `rbd` says to a command about the image. more: a further argument, or NULL. */
static char *ask(const char *name, const char *command, const char *more, const char *what,
                 const struct run_tool_limits *limits, struct vm_error **err)
{
    struct rbd_name n;
    char spec[SPEC_MAX], said[64 + SPEC_MAX];
    const char *argv[ARGS] = {"rbd", command};
    unsigned k = 2;
    if (parse(name, &n, err) < 0)
        return NULL;
    make_spec(&n, spec);
    snprintf(said, sizeof(said), "%s the image %s", what, spec);
    argv[k++] = spec;
    if (more)
        argv[k++] = more;
    if (*n.conf) {
        argv[k++] = "--conf";
        argv[k++] = n.conf;
    }
    if (*n.user) {
        argv[k++] = "--id";
        argv[k++] = n.user;
    }
    return run_tool(argv, said, limits, err);
}

int rbd_image_id(const char *name, const struct run_tool_limits *limits, char ret_id[RBD_IMAGE_ID_MAX],
                 struct vm_error **err)
{
    char *text = ask(name, "info", "--format=json", "look at", limits, err);
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    const char *id = json_string_value(json_object_get(o, "id"));
    int r = -1;
    if (text && id && strlen(id) < RBD_IMAGE_ID_MAX) {
        strcpy(ret_id, id);
        r = 0;
    } else if (text) {
        error_set(err, VM_ERROR_FAILED, "rbd does not tell the id of %s", name);
    }
    json_decref(o);
    free(text);
    return r;
}

int rbd_image_draft(const char *name, char ret_draft[RBD_NAME_TEXT_MAX], struct vm_error **err)
{
    struct rbd_name n;
    struct uuid unique = uuid_new();
    if (parse(name, &n, err) < 0)
        return -1;
    snprintf(n.image, sizeof(n.image), "vmmig-making-%s", uuid_text(&unique));
    return rbd_name_format(&n, ret_draft) ? 0 : error_set(err, VM_ERROR_USAGE, "the name %s is too long", name);
}

int rbd_image_rename(const char *from, const char *to, const struct run_tool_limits *limits, struct vm_error **err)
{
    struct rbd_name n;
    char spec[SPEC_MAX];
    if (parse(to, &n, err) < 0)
        return -1;
    make_spec(&n, spec);
    cleanup_free char *said = ask(from, "rename", spec, "rename", limits, err);
    return said ? 0 : -1;
}

/* 1: it is that one, or may be; 0: it is not, or there is none. */
static int is_that(const char *name, const char *id, const struct run_tool_limits *limits, struct vm_error **err)
{
    struct vm_error *failed = NULL;
    char now[RBD_IMAGE_ID_MAX];
    if (!strcmp(id, RBD_IMAGE_ANY)) /* one that is not whole may have no id */
        return 1;
    if (rbd_image_id(name, limits, now, &failed) == 0)
        return !strcmp(now, id);
    if (failed->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, failed);
    error_free(failed);
    return 0;
}

int rbd_image_remove(const char *name, const char *id, const struct run_tool_limits *limits, struct vm_error **err)
{
    int seconds = limits && limits->seconds ? limits->seconds : REMOVE_SECONDS;
    int64_t deadline = clock_mono_ns() + seconds * NSEC_PER_SEC;
    for (;;) {
        cleanup_error struct vm_error *failed = NULL;
        int r = is_that(name, id, limits, err);
        if (r <= 0)
            return r;
        char *said = ask(name, "rm", "--no-progress", "remove", limits, &failed);
        free(said);
        if (said || failed->kind == VM_ERROR_NOT_FOUND)
            return 0;
        if (clock_mono_ns() > deadline)
            return error_propagate(err, error_copy(failed));
        poll(NULL, 0, AGAIN_MS);
    }
}
