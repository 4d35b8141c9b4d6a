/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault.h"

#include <stdlib.h>

#ifndef VMMIG_FAULTS

static int error_none_here(struct vm_error **err)
{
    return error_set(err, VM_ERROR_VERSION,
                     "this build has no fault points; use one made with -Dfaults=true");
}

int fault_init(struct vm_error **err)
{
    static const char *const names[] = {"VMMIG_FAULTS", "VMMIG_FAULTS_TOLD", "VMMIG_PATIENCE"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (getenv(names[i]))
            return error_set(err, VM_ERROR_USAGE,
                             "%s is set, but this build has no fault points; unset it", names[i]);
    return 0;
}

int fault_arm(const char *spec, struct vm_error **err)
{
    (void)spec;
    return error_none_here(err);
}

int fault_list(fault_visit *visit, void *arg, struct vm_error **err)
{
    (void)visit;
    (void)arg;
    return error_none_here(err);
}

#else

#include "base/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MAX_ARMED = 16, MAX_PATIENCE = 1000 };

enum action { CRASH, ERROR, DELAY, HANG, HOLD, DROP, DUPLICATE, CORRUPT, JUMP, MISTAKE };
static const char *const action_names[] = {"crash", "error",     "delay",   "hang", "hold",
                                           "drop",  "duplicate", "corrupt", "jump", "mistake"};

struct armed {
    char name[64];
    char what[80]; /* as it was written, behind the name */
    enum action action;
    int argument; /* errno or milliseconds */
    bool every;   /* at every passage; else once, when `passage` was counted down to 0 */
    int passage;
    unsigned acted, holding;
};

static pthread_mutex_t armed_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t armed_changed = PTHREAD_COND_INITIALIZER;
static struct armed armed[MAX_ARMED];
static int n_armed;
static unsigned generation; /* counts fault_arm, which ends what holds */
static int patience = 1;
static char told[256]; /* VMMIG_FAULTS_TOLD */
static _Thread_local int last_argument;

static const char *const a_point __attribute__((section("vmmig_faults"), used)) = "fault.self-test";
extern const char *const __start_vmmig_faults[], *const __stop_vmmig_faults[];

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* With the lock held. */
static void describe(struct fault_point *p)
{
    for (int i = 0; i < n_armed; i++) {
        if (strcmp(armed[i].name, p->name))
            continue;
        strcpy(p->armed, armed[i].what);
        p->acted += armed[i].acted;
        p->holds |= armed[i].holding > 0;
    }
}

int fault_list(fault_visit *visit, void *arg, struct vm_error **err)
{
    size_t n = (size_t)(__stop_vmmig_faults - __start_vmmig_faults);
    cleanup_free const char **names = malloc((n + 1) * sizeof(*names));
    if (!names)
        return error_nomem(err);
    memcpy(names, __start_vmmig_faults, n * sizeof(*names));
    qsort(names, n, sizeof(*names), by_name);
    for (size_t i = 0; i < n; i++) {
        if (i && !strcmp(names[i], names[i - 1]))
            continue;
        struct fault_point point = {.name = names[i]};
        pthread_mutex_lock(&armed_lock);
        describe(&point);
        pthread_mutex_unlock(&armed_lock);
        visit(&point, arg);
    }
    return 0;
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
    if (!equals || strlen(equals + 1) >= sizeof(ret->what))
        return error_set(err, VM_ERROR_USAGE, "fault '%s': NAME=ACTION expected", spec);
    *equals = 0;
    *ret = (struct armed){.passage = 1};
    strcpy(ret->what, equals + 1);
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
    if (!strcmp(copy, "none"))
        *copy = 0;
    for (char *one = strtok_r(copy, ",", &save); one; one = strtok_r(NULL, ",", &save)) {
        if (n == MAX_ARMED)
            return error_set(err, VM_ERROR_USAGE, "at most %d faults can be armed", MAX_ARMED);
        if (arm_one(one, &fresh[n++], err) < 0)
            return -1;
    }
    SCOPE_LOCK(&armed_lock);
    memcpy(armed, fresh, sizeof(*fresh) * (size_t)n);
    n_armed = n;
    generation++;
    pthread_cond_broadcast(&armed_changed);
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
        a->acted++;
        *ret = *a;
        return true;
    }
    return false;
}

/* Sleep until other faults are armed. */
static void hold(const char *name)
{
    SCOPE_LOCK(&armed_lock);
    unsigned since = generation;
    for (int i = 0; i < n_armed; i++)
        armed[i].holding += !strcmp(armed[i].name, name);
    while (generation == since)
        pthread_cond_wait(&armed_changed, &armed_lock);
}

/* Before it acts: what it does may be the last that this process did. */
static void tell(const struct armed *a)
{
    cleanup_close int fd = *told ? open(told, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd >= 0)
        dprintf(fd, "%s=%s\n", a->name, a->what);
}

enum fault_result fault_hit(const char *name)
{
    struct armed a;
    if (!take_armed(name, &a))
        return FAULT_NONE;
    tell(&a);
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
    case HOLD:
        hold(name);
        return FAULT_NONE;
    case ERROR:
        last_argument = a.argument;
        return FAULT_ERROR;
    case JUMP:
        last_argument = a.argument;
        return FAULT_JUMP;
    case MISTAKE:
        return FAULT_MISTAKE;
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
    return last_argument;
}

int fault_jump_ms(void)
{
    return last_argument;
}

int64_t clock_wall_ns(void)
{
    int64_t now = clock_read_ns(CLOCK_REALTIME);
    return FAULT("clock.wall") == FAULT_JUMP ? now + fault_jump_ms() * NSEC_PER_MSEC : now;
}

int64_t fault_patience_ns(int64_t ms)
{
    return ms * NSEC_PER_MSEC / patience;
}

int fault_init(struct vm_error **err)
{
    const char *spec = getenv("VMMIG_FAULTS"), *divisor = getenv("VMMIG_PATIENCE");
    if (spec && fault_arm(spec, err) < 0)
        return error_wrap(err, "VMMIG_FAULTS");
    if (divisor && (atoi(divisor) < 1 || atoi(divisor) > MAX_PATIENCE))
        return error_set(err, VM_ERROR_USAGE, "VMMIG_PATIENCE: a number from 1 to %d expected",
                         MAX_PATIENCE);
    patience = divisor ? atoi(divisor) : 1;
    const char *file = getenv("VMMIG_FAULTS_TOLD");
    snprintf(told, sizeof(told), "%s", file ? file : "");
    return 0;
}

#endif
