/* SPDX-License-Identifier: Apache-2.0 */
/* Replay of a recording. */
#include "dirtylog/dirtylog_driver.h"

#include <errno.h>
#include <string.h>

enum { LINE_MAX_BYTES = 1024 };

struct trace {
    FILE *file;
    unsigned n_slots;
    uint64_t pages[DIRTYLOG_SLOTS_MAX];
    bool at_round; /* the line just read was "round" */
    uint64_t *round[DIRTYLOG_SLOTS_MAX]; /* pages of the round under way */
};

static int malformed(struct vm_error **err)
{
    return error_set(err, VM_ERROR_PROTOCOL, "the recording is malformed");
}

static int read_header(struct trace *t, struct vm_error **err)
{
    char line[LINE_MAX_BYTES];
    if (!fgets(line, sizeof(line), t->file) || strcmp(line, "vmmig-trace 1\n") ||
        !fgets(line, sizeof(line), t->file) || strncmp(line, "slots ", 6))
        return malformed(err);
    char *next = line + 5, *end;
    while (t->n_slots < DIRTYLOG_SLOTS_MAX) {
        uint64_t pages = strtoull(next, &end, 10);
        if (end == next)
            break;
        t->pages[t->n_slots++] = pages;
        next = end;
    }
    return t->n_slots && *next == '\n' ? 0 : malformed(err);
}

static void destroy(struct dirtylog *log)
{
    struct trace *t = log->state;
    if (!t)
        return;
    if (t->file)
        fclose(t->file);
    free(t);
    log->state = NULL;
}

static int create(struct dirtylog *log, const struct dirtylog_params *params, struct vm_error **err)
{
    struct trace *t = calloc(1, sizeof(*t));
    if (!t)
        return error_nomem(err);
    log->state = t;
    t->file = params->trace_path ? fopen(params->trace_path, "re") : NULL;
    if (!t->file)
        return error_errno(err, params->trace_path ? errno : ENOENT, "cannot open the recording %s",
                           params->trace_path ? params->trace_path : "");
    return read_header(t, err);
}

static void stop(struct dirtylog *log)
{
    struct trace *t = log->state;
    for (unsigned i = 0; i < DIRTYLOG_SLOTS_MAX; i++)
        free(steal_ptr(&t->round[i]));
}

/* From the beginning each time. */
static int start(struct dirtylog *log, struct vm_error **err)
{
    struct trace *t = log->state;
    rewind(t->file);
    t->n_slots = 0;
    t->at_round = false;
    if (read_header(t, err) < 0)
        return -1;
    if (t->n_slots != log->n_slots)
        return error_set(err, VM_ERROR_USAGE, "the recording is of %u memory slots, not of %u",
                         t->n_slots, log->n_slots);
    for (unsigned i = 0; i < t->n_slots; i++) {
        if (t->pages[i] != log->slots[i].size / DIRTYLOG_PAGE)
            return error_set(err, VM_ERROR_USAGE, "slot %u of the recording has another size", i);
        t->round[i] = calloc(dirtylog_words(log->slots[i].size) + 1, sizeof(uint64_t));
        if (!t->round[i]) {
            stop(log);
            return error_nomem(err);
        }
    }
    return 0;
}

/* As the guest did: change the pages, then have them in the log. */
static int replay_run(struct dirtylog *log, const char *line, struct vm_error **err)
{
    struct trace *t = log->state;
    unsigned slot;
    unsigned long long first, n;
    if (sscanf(line, "%u %llu %llu", &slot, &first, &n) != 3 || slot >= t->n_slots ||
        first > t->pages[slot] || n > t->pages[slot] - first)
        return malformed(err);
    uint8_t *memory = log->slots[slot].host;
    for (uint64_t page = first; page < first + n; page++) {
        uint64_t *word = (uint64_t *)(void *)(memory + page * DIRTYLOG_PAGE);
        __atomic_fetch_add(word, 1, __ATOMIC_RELAXED);
        t->round[slot][page / 64] |= 1ULL << (page % 64);
    }
    return 0;
}

/* The next round of the recording; behind its end nothing is written any more. */
static int begin_harvest(struct dirtylog *log, struct vm_error **err)
{
    struct trace *t = log->state;
    char line[LINE_MAX_BYTES];
    for (unsigned i = 0; i < t->n_slots; i++)
        memset(t->round[i], 0, dirtylog_words(log->slots[i].size) * sizeof(uint64_t));
    bool inside = t->at_round;
    t->at_round = false;
    while (fgets(line, sizeof(line), t->file)) {
        if (!strcmp(line, "round\n")) {
            t->at_round = inside;
            if (inside)
                return 0;
            inside = true;
        } else if (!inside || replay_run(log, line, err) < 0) {
            return inside ? -1 : malformed(err);
        }
    }
    return 0;
}

static int harvest(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err)
{
    struct trace *t = log->state;
    (void)err;
    memcpy(bitmap, t->round[slot], dirtylog_words(log->slots[slot].size) * sizeof(*bitmap));
    return 0;
}

const struct dirtylog_driver dirtylog_trace_driver = {.kind = DIRTYLOG_TRACE,
                                                      .create = create,
                                                      .destroy = destroy,
                                                      .start = start,
                                                      .stop = stop,
                                                      .begin_harvest = begin_harvest,
                                                      .harvest = harvest};
