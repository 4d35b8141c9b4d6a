/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/rbd_image.h"

#include "base/clock.h"
#include "snapshot/run_tool.h"
#include "vmm/rbd_name.h"

#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ARGS = 16, SPEC_MAX = 3 * RBD_NAME_PART_MAX + 3, AGAIN_MS = 1000 };
#define REMOVE_NS (45 * NSEC_PER_SEC)

bool rbd_image_is(const char *name)
{
    return !strncmp(name, "rbd:", 4);
}

/* What `rbd` says to a command about the image. */
static char *ask(const char *name, const char *command, const char *option, const char *what, struct vm_error **err)
{
    struct rbd_name n;
    char spec[SPEC_MAX], said[64 + SPEC_MAX];
    const char *argv[ARGS] = {"rbd", command, option};
    unsigned k = 3;
    if (!rbd_name_parse(name, &n)) {
        error_set(err, VM_ERROR_USAGE, "%s is no name of a RADOS block image", name);
        return NULL;
    }
    snprintf(spec, sizeof(spec), "%s/%s%s%s", n.pool, n.space, *n.space ? "/" : "", n.image);
    snprintf(said, sizeof(said), "%s the image %s", what, spec);
    argv[k++] = spec;
    if (*n.conf) {
        argv[k++] = "--conf";
        argv[k++] = n.conf;
    }
    if (*n.user) {
        argv[k++] = "--id";
        argv[k++] = n.user;
    }
    return run_tool(argv, said, err);
}

int rbd_image_id(const char *name, char ret_id[RBD_IMAGE_ID_MAX], struct vm_error **err)
{
    char *text = ask(name, "info", "--format=json", "look at", err);
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

int rbd_image_remove(const char *name, const char *id, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + REMOVE_NS;
    for (;;) {
        cleanup_error struct vm_error *failed = NULL;
        char now[RBD_IMAGE_ID_MAX];
        if (rbd_image_id(name, now, &failed) < 0)
            return failed->kind == VM_ERROR_NOT_FOUND ? 0 : error_propagate(err, error_copy(failed));
        if (strcmp(now, id))
            return 0;
        char *said = ask(name, "rm", "--no-progress", "remove", &failed);
        free(said);
        if (said)
            return 0;
        if (clock_mono_ns() > deadline)
            return error_propagate(err, error_copy(failed));
        poll(NULL, 0, AGAIN_MS);
    }
}
