/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault.h"

#include <stdlib.h>

#ifndef VMMIG_FAULTS

int fault_init(struct vm_error **err)
{
    if (getenv("VMMIG_FAULTS"))
        return error_set(err, VM_ERROR_USAGE,
                         "VMMIG_FAULTS is set, but this build has no fault points; unset it");
    return 0;
}

#else

#include "base/cleanup.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

enum { MAX_ARMED = 16 };

enum action { CRASH, ERROR, DELAY, HANG, DROP, DUPLICATE, CORRUPT };
static const char *const action_names[] = {"crash", "error",     "delay",  "hang",
                                           "drop",  "duplicate", "corrupt"};

struct armed {
    char name[64];
    enum action action;
    int argument; /* errno or milliseconds */
    bool every;   /* at every passage; else once, when `passage` was counted down to 0 */
    int passage;
};

static pthread_mutex_t armed_lock = PTHREAD_MUTEX_INITIALIZER;
static struct armed armed[MAX_ARMED];
static int n_armed;
static _Thread_local int last_errno;

static const char *const a_point __attribute__((section("vmmig_faults"), used)) = "fault.self-test";
extern const char *const __start_vmmig_faults[], *const __stop_vmmig_faults[];

void fault_list(void (*visit)(const char *name, void *arg), void *arg)
{
    for (const char *const *p = __start_vmmig_faults; p < __stop_vmmig_faults; p++)
        visit(*p, arg);
}

static bool point_exists(const char *name)
{
    for (const char *const *p = __start_vmmig_faults; p < __stop_vmmig_faults; p++)
        if (!strcmp(*p, name))
            return true;
    return false;
}

static int parse_errno(const char *name)
{
    static const struct {
        const char *name;
        int value;
    } known[] = {{"EIO", EIO},       {"ENOSPC", ENOSPC},       {"ENOMEM", ENOMEM},
                 {"EAGAIN", EAGAIN}, {"ECONNRESET", ECONNRESET}, {"ETIMEDOUT", ETIMEDOUT},
                 {"EPIPE", EPIPE},   {"ECONNREFUSED", ECONNREFUSED}};
    for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
        if (!strcmp(known[i].name, name))
            return known[i].value;
    return atoi(name); /* a number; 0 for what is neither */
}

/* One NAME=ACTION[:ARGUMENT][@N]; modifies spec. */
static int arm_one(char *spec, struct armed *ret, struct vm_error **err)
{
    char *at = strchr(spec, '@');
    char *equals = strchr(spec, '=');
    if (!equals)
        return error_set(err, VM_ERROR_USAGE, "fault '%s': NAME=ACTION expected", spec);
    *equals = 0;
    ret->every = false;
    ret->passage = 1;
    if (at) {
        *at++ = 0;
        ret->every = !strcmp(at, "*");
        ret->passage = ret->every ? 0 : atoi(at);
        if (!ret->every && ret->passage < 1)
            return error_set(err, VM_ERROR_USAGE, "fault '%s': @N counts from 1", spec);
    }
    char *argument = strchr(equals + 1, ':');
    if (argument)
        *argument++ = 0;
    if (strlen(spec) >= sizeof(ret->name) || !point_exists(spec))
        return error_set(err, VM_ERROR_USAGE, "no fault point is named '%s'", spec);
    strcpy(ret->name, spec);
    for (unsigned i = 0; i < sizeof(action_names) / sizeof(*action_names); i++) {
        if (strcmp(equals + 1, action_names[i]))
            continue;
        ret->action = i;
        if (i == ERROR && argument && !parse_errno(argument))
            return error_set(err, VM_ERROR_USAGE, "fault '%s': no errno is named '%s'", spec,
                             argument);
        ret->argument = i == ERROR ? argument ? parse_errno(argument) : EIO
                                   : argument ? atoi(argument)
                                              : 0;
        return 0;
    }
    return error_set(err, VM_ERROR_USAGE, "fault '%s': no action is named '%s'", spec, equals + 1);
}

int fault_arm(const char *spec, struct vm_error **err)
{
    cleanup_free char *copy = strdup(spec);
    if (!copy)
        return error_nomem(err);
    struct armed fresh[MAX_ARMED];
    int n = 0;
    char *save = NULL;
    for (char *one = strtok_r(copy, ",", &save); one; one = strtok_r(NULL, ",", &save)) {
        if (n == MAX_ARMED)
            return error_set(err, VM_ERROR_USAGE, "at most %d faults can be armed", MAX_ARMED);
        if (arm_one(one, &fresh[n++], err) < 0)
            return -1;
    }
    SCOPE_LOCK(&armed_lock);
    memcpy(armed, fresh, sizeof(*fresh) * (size_t)n);
    n_armed = n;
    return 0;
}

/* The armed fault that acts at this passage of `name`, if any. */
static bool take_armed(const char *name, struct armed *ret)
{
    SCOPE_LOCK(&armed_lock);
    for (int i = 0; i < n_armed; i++) {
        struct armed *a = &armed[i];
        if (strcmp(a->name, name) || (!a->every && (!a->passage || --a->passage)))
            continue;
        *ret = *a;
        return true;
    }
    return false;
}

enum fault_result fault_hit(const char *name)
{
    struct armed a;
    if (!take_armed(name, &a))
        return FAULT_NONE;
    switch (a.action) {
    case CRASH:
        kill(getpid(), SIGKILL);
        pause();
        return FAULT_NONE;
    case DELAY:
        usleep((useconds_t)a.argument * 1000);
        return FAULT_NONE;
    case HANG:
        for (;;)
            pause();
    case ERROR:
        last_errno = a.argument;
        return FAULT_ERROR;
    case DROP:
        return FAULT_DROP;
    case DUPLICATE:
        return FAULT_DUPLICATE;
    case CORRUPT:
        return FAULT_CORRUPT;
    }
    return FAULT_NONE;
}

int fault_errno(void)
{
    return last_errno;
}

int fault_init(struct vm_error **err)
{
    const char *spec = getenv("VMMIG_FAULTS");
    if (spec && fault_arm(spec, err) < 0)
        return error_wrap(err, "VMMIG_FAULTS");
    return 0;
}

#endif
