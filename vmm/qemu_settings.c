/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_settings.h"

#include "base/log.h"
#include "vmm/qemu_internal.h"

#include <string.h>

/* ---- What is set ---- */

static int query_capabilities(struct qemu *q, json_t **ret, struct vm_error **err)
{
    return qemu_command(q, "query-migrate-capabilities", NULL, ret, err);
}

/* The values that `of` names, as they are now. Those that this QEMU does not tell are left out. */
static int query_parameters(struct qemu *q, json_t *of, json_t **ret, struct vm_error **err)
{
    CLEANUP(json) json_t *all = NULL;
    if (qemu_command(q, "query-migrate-parameters", NULL, &all, err) < 0)
        return -1;
    *ret = json_object();
    const char *name;
    json_t *ours;
    json_object_foreach(of, name, ours)
    {
        json_t *value = json_object_get(all, name);
        if (value && json_object_set(*ret, name, value) < 0)
            return error_nomem(err);
    }
    return *ret ? 0 : error_nomem(err);
}

/* Also what a second use sets beyond the first: what is kept stays as it was first. */
static int keep(struct qemu *q, json_t *values, struct vm_error **err)
{
    CLEANUP(json) json_t *parameters = NULL;
    if (!q->kept_capabilities && query_capabilities(q, &q->kept_capabilities, err) < 0)
        return -1;
    if (query_parameters(q, values, &parameters, err) < 0)
        return -1;
    if (!q->kept_parameters)
        q->kept_parameters = json_object();
    return json_object_update_missing(q->kept_parameters, parameters) < 0 ? error_nomem(err) : 0;
}

/* ---- What is to be set ---- */

static int set_capabilities(struct qemu *q, json_t *list, struct vm_error **err)
{
    return qemu_command(q, "migrate-set-capabilities", json_pack("{s:O}", "capabilities", list),
                        NULL, err);
}

/* Every capability that QEMU knows: on, if it is among these. */
static json_t *all_but(const json_t *known, const char *const *on)
{
    CLEANUP(json) json_t *list = json_array();
    size_t i;
    json_t *capability;
    json_array_foreach(known, i, capability)
    {
        const char *name = qmp_string(capability, "capability");
        bool state = false;
        for (const char *const *c = on; *c; c++)
            state |= !strcmp(*c, name);
        if (json_array_append_new(list,
                                  json_pack("{s:s, s:b}", "capability", name, "state", state)) < 0)
            return NULL;
    }
    return steal_ptr(&list);
}

static void drop(struct qemu *q)
{
    json_decref(steal_ptr(&q->kept_capabilities));
    json_decref(steal_ptr(&q->kept_parameters));
}

static void restore(struct qemu *q)
{
    cleanup_error struct vm_error *err = NULL;
    if (!q->kept_capabilities)
        return;
    if ((set_capabilities(q, q->kept_capabilities, &err) < 0 ||
         qemu_command(q, "migrate-set-parameters", json_incref(q->kept_parameters), NULL, &err) < 0) &&
        err->kind != VM_ERROR_VMM_DIED)
        log_warn("QEMU's migration settings are not what its user made them", "pid=%d error=%s",
                 q->guest.process.pid, log_q(error_message(err)));
    drop(q);
}

int qemu_settings_use(struct qemu *q, const char *const *on, json_t *values, struct vm_error **err)
{
    CLEANUP(json) json_t *wanted = values;
    SCOPE_LOCK(&q->settings_lock);
    if (!wanted || keep(q, wanted, err) < 0)
        return wanted ? -1 : error_nomem(err);
    CLEANUP(json) json_t *list = all_but(q->kept_capabilities, on);
    if (!list)
        return error_nomem(err);
    if (set_capabilities(q, list, err) == 0 &&
        qemu_command(q, "migrate-set-parameters", json_incref(wanted), NULL, err) == 0)
        return 0;
    restore(q);
    return -1;
}

void qemu_settings_restore(struct qemu *q)
{
    SCOPE_LOCK(&q->settings_lock);
    restore(q);
}

void qemu_settings_drop(struct qemu *q)
{
    SCOPE_LOCK(&q->settings_lock);
    drop(q);
}
