/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_settings.h"

#include "base/clock.h"
#include "base/log.h"
#include "vmm/qemu_internal.h"

#include <stdlib.h>
#include <string.h>

#define NOTE_PATH "/objects/" QEMU_SETTINGS_NOTE
#define LOOK_AGAIN_NS (100 * NSEC_PER_MSEC)

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

/* ---- The note in QEMU ---- */

/* What is kept, as QEMU's object; a note that is there is replaced at once, so that there always is one. */
static int write_note(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *note = json_pack("{s:O, s:O}", "capabilities", q->kept_capabilities, "parameters",
                                           q->kept_parameters);
    cleanup_free char *text = note ? json_dumps(note, JSON_COMPACT) : NULL;
    if (!text)
        return error_nomem(err);
    json_t *args = q->settings_noted ? json_pack("{s:s, s:s, s:s}", "path", NOTE_PATH, "property",
                                                 "data", "value", text)
                                     : json_pack("{s:s, s:s, s:s}", "qom-type", "secret", "id",
                                                 QEMU_SETTINGS_NOTE, "data", text);
    if (qemu_command(q, q->settings_noted ? "qom-set" : "object-add", args, NULL, err) < 0)
        return -1;
    q->settings_noted = true;
    return 0;
}

static void remove_note(struct qemu *q)
{
    if (q->settings_noted)
        qmp_execute(q->qmp, "object-del", json_pack("{s:s}", "id", QEMU_SETTINGS_NOTE), QMP_TIMEOUT_MS, NULL, NULL);
    q->settings_noted = false;
}

/* Nothing is kept yet: what a former agent noted is. 0 also if it noted nothing. */
static int read_note(struct qemu *q, struct vm_error **err)
{
    CLEANUP(json) json_t *data = NULL;
    struct vm_error *absent = NULL;
    if (qemu_command(q, "qom-get", json_pack("{s:s, s:s}", "path", NOTE_PATH, "property", "data"), &data,
                     &absent) < 0) {
        if (absent->kind != VM_ERROR_REFUSED)
            return error_propagate(err, absent);
        error_free(absent);
        return 0;
    }
    const char *text = json_string_value(data);
    CLEANUP(json) json_t *note = text ? json_loads(text, 0, NULL) : NULL;
    json_t *capabilities = json_object_get(note, "capabilities");
    json_t *parameters = json_object_get(note, "parameters");
    q->settings_noted = true;
    if (!json_is_array(capabilities) || !json_is_object(parameters))
        return error_set(err, VM_ERROR_CORRUPT, "QEMU's object %s is not vmmig's", QEMU_SETTINGS_NOTE);
    q->kept_capabilities = json_incref(capabilities);
    q->kept_parameters = json_incref(parameters);
    return 0;
}

/* Also what a second use sets beyond the first: what is kept stays as it was first. */
static int keep(struct qemu *q, json_t *values, struct vm_error **err)
{
    CLEANUP(json) json_t *parameters = NULL;
    if (!q->kept_capabilities && read_note(q, err) < 0)
        return -1;
    if ((!q->kept_capabilities && query_capabilities(q, &q->kept_capabilities, err) < 0) ||
        query_parameters(q, values, &parameters, err) < 0)
        return -1;
    if (!q->kept_parameters)
        q->kept_parameters = json_object();
    if (json_object_update_missing(q->kept_parameters, parameters) < 0)
        return error_nomem(err);
    return write_note(q, err);
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
    q->settings_recovered = false;
    if (!q->kept_capabilities)
        return;
    if ((set_capabilities(q, q->kept_capabilities, &err) < 0 ||
         qemu_command(q, "migrate-set-parameters", json_incref(q->kept_parameters), NULL, &err) < 0) &&
        err->kind != VM_ERROR_VMM_DIED)
        log_warn("QEMU's migration settings are not what its user made them", "pid=%d error=%s",
                 q->guest.process.pid, log_q(error_message(err)));
    remove_note(q);
    drop(q);
}

int qemu_settings_use(struct qemu *q, const char *const *on, json_t *values, struct vm_error **err)
{
    CLEANUP(json) json_t *wanted = values;
    SCOPE_LOCK(&q->settings_lock);
    q->settings_recovered = false;
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

/* ---- After a former agent ---- */

/* True: they are set back, or that is not to be done any more. */
static bool settle(struct qemu *q)
{
    char status[32];
    SCOPE_LOCK(&q->settings_lock);
    if (!q->settings_recovered || qemu_query_migration(q, status, NULL, NULL) < 0)
        return true;
    if (qemu_migration_is_under_way(status))
        return false;
    log_info("QEMU's migration settings are its user's again", "pid=%d", q->guest.process.pid);
    restore(q);
    return true;
}

static void *settler_main(void *arg)
{
    struct qemu *q = arg;
    while (!settle(q)) {
        SCOPE_LOCK(&q->lock);
        if (q->closed)
            break;
        qemu_wait_changed(q, clock_mono_ns() + LOOK_AGAIN_NS);
    }
    return NULL;
}

static int recover(struct qemu *q, struct vm_error **err)
{
    char state[32];
    SCOPE_LOCK(&q->settings_lock);
    if (q->kept_capabilities)
        return 0;
    if (read_note(q, err) < 0)
        return -1;
    if (!q->kept_capabilities)
        return 0;
    if (qemu_query_run_state(q, state, err) < 0)
        return -1;
    q->settings_recovered = strcmp(state, "inmigrate") != 0;
    return 0;
}

void qemu_settings_recover(struct qemu *q)
{
    cleanup_error struct vm_error *err = NULL;
    if (recover(q, &err) < 0) {
        log_warn("it is not known what a user's QEMU was set to", "pid=%d error=%s", q->guest.process.pid,
                 log_q(error_message(err)));
        return;
    }
    if (q->has_settler || settle(q))
        return;
    q->has_settler = !pthread_create(&q->settler, NULL, settler_main, q);
    if (!q->has_settler)
        log_warn("a user's QEMU keeps other migration settings for now", "pid=%d", q->guest.process.pid);
}

void qemu_settings_finish(struct qemu *q)
{
    pthread_mutex_lock(&q->settings_lock);
    q->settings_recovered = false;
    pthread_mutex_unlock(&q->settings_lock);
    if (q->has_settler)
        pthread_join(q->settler, NULL);
    drop(q);
}
