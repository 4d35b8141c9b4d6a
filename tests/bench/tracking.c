/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tracking: what dirty tracking costs. One driver, one size of guest memory; prints a JSON object.
 * Used by tests/bench/attach.py.
 *
 *     tracking bitmap|ring|plain GIB
 *
 * Times in milliseconds: start (switch logging on), first (read and clear everything after start),
 * and for a share of the pages written since: harvest (read the log: with what the vCPU's thread
 * did for that while the guest wrote, since a ring that is full is read there), clear (have them
 * logged anew, 32 MiB at a time). slowdown: how much longer the guest takes for rewriting 32 MiB
 * when the log is read and cleared every 100 ms. Memory is sparse: 256 MiB, mapped again and again,
 * so that the pages need not all be there.
 */
#include "base/clock.h"
#include "tests/unit/dirtylog/tiny_vm.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALIAS (256ull << 20)
#define PIECE_PAGES 8192u
#define RUN_PAGES 64u
#define BUSY_PAGES 8192u
/* A guest takes minutes for all pages of more than this: then that is measured once. */
#define REPEATED_MAX (4ull << 30)
enum { REPEATS = 3, ROUND_MS = 100, BUSY_MS = 1000 };

struct bench {
    struct tiny_vm *vm;
    struct dirtylog *log;
    uint64_t pages;
    uint64_t *bitmap, *own;
    atomic_int_fast64_t in_exits_ns; /* since the last harvest */
};

/* Given as it is, err might be read before the call beside it sets it. */
static void must(int result, struct vm_error *const *err)
{
    if (result == 0)
        return;
    fprintf(stderr, "tracking: %s\n", error_message(err ? *err : NULL));
    exit(1);
}

static bool on_exit_of(void *arg, unsigned vcpu, uint32_t reason)
{
    struct bench *b = arg;
    int64_t start = clock_mono_ns();
    bool ours = dirtylog_vcpu_exit(b->log, vcpu, reason);
    if (ours)
        atomic_fetch_add(&b->in_exits_ns, clock_mono_ns() - start);
    return ours;
}

static double ms_since(int64_t start)
{
    return (double)(clock_mono_ns() - start) / NSEC_PER_MSEC;
}

static void alias_memory(struct tiny_vm *vm, uint64_t size)
{
    for (uint64_t at = ALIAS; at < size; at += ALIAS)
        if (mmap(tiny_vm_data(vm) + at, ALIAS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                 tiny_vm_memfd(vm, TINY_VM_DATA_SLOT), 0) == MAP_FAILED)
            must(-1, NULL);
}

static double harvest(struct bench *b)
{
    struct vm_error *err = NULL;
    int64_t start = clock_mono_ns();
    must(dirtylog_begin_harvest(b->log, &err), &err);
    must(dirtylog_harvest(b->log, 0, b->own, &err), &err);
    must(dirtylog_harvest(b->log, TINY_VM_DATA_SLOT, b->bitmap, &err), &err);
    return ms_since(start) + (double)atomic_exchange(&b->in_exits_ns, 0) / NSEC_PER_MSEC;
}

static double clear(struct bench *b)
{
    struct vm_error *err = NULL;
    int64_t start = clock_mono_ns();
    for (uint64_t first = 0; first < b->pages; first += PIECE_PAGES) {
        uint64_t n = b->pages - first < PIECE_PAGES ? b->pages - first : PIECE_PAGES;
        bool some = false;
        for (uint64_t i = first / 64; i < (first + n + 63) / 64; i++)
            some |= b->bitmap[i] != 0;
        if (some)
            must(dirtylog_clear(b->log, TINY_VM_DATA_SLOT, first, n, b->bitmap, &err), &err);
    }
    double took = ms_since(start);
    memset(b->bitmap, 0, (b->pages + 63) / 64 * 8);
    return took;
}

/* Runs of RUN_PAGES, evenly over all memory. */
static void write_share(struct bench *b, unsigned percent)
{
    if (percent == 100) {
        tiny_vm_write(b->vm, 0, 0, b->pages);
        return;
    }
    for (uint64_t first = 0; percent && first + RUN_PAGES <= b->pages; first += RUN_PAGES * 100 / percent)
        tiny_vm_write(b->vm, 0, first, RUN_PAGES);
}

static double smallest(const double *values, int n)
{
    double best = values[0];
    for (int i = 1; i < n; i++)
        best = values[i] < best ? values[i] : best;
    return best;
}

/* Passes a second of a guest that rewrites BUSY_PAGES, with the log read meanwhile or not. */
static double busy_rate(struct bench *b, bool tracked)
{
    int64_t start = clock_mono_ns();
    uint64_t before = tiny_vm_passes(b->vm, 0);
    tiny_vm_run_free(b->vm, 0, 0, BUSY_PAGES);
    while (ms_since(start) < BUSY_MS) {
        usleep(ROUND_MS * 1000);
        if (tracked) {
            harvest(b);
            clear(b);
        }
    }
    tiny_vm_stop(b->vm);
    return (double)(tiny_vm_passes(b->vm, 0) - before) / ms_since(start) * 1000;
}

int main(int argc, char **argv)
{
    static const unsigned shares[] = {0, 1, 10, 100};
    struct vm_error *err = NULL;
    struct bench b = {0};
    struct tiny_vm_params params = {.vcpus = 1};
    if (argc != 3 || !dirtylog_kind_parse(argv[1], &params.kind) || !tiny_vm_available())
        return 2;
    params.data_size = strtoull(argv[2], NULL, 10) << 30;
    b.vm = tiny_vm_create(&params);
    alias_memory(b.vm, params.data_size);
    b.pages = params.data_size / DIRTYLOG_PAGE;
    b.bitmap = calloc((b.pages + 63) / 64, 8);
    b.own = calloc(dirtylog_words(tiny_vm_slots(b.vm)[0].size), 8);
    struct dirtylog_params log = {.kind = params.kind,
                                  .vm_fd = tiny_vm_fd(b.vm),
                                  .vcpu_fds = tiny_vm_vcpu_fds(b.vm),
                                  .n_vcpus = 1,
                                  .kick = tiny_vm_kick,
                                  .in_guest = tiny_vm_in_guest,
                                  .arg = b.vm};
    b.log = dirtylog_create(&log, &err);
    must(b.log ? 0 : -1, &err);
    tiny_vm_on_exit(b.vm, NULL, on_exit_of, &b);
    tiny_vm_write(b.vm, 0, 0, b.pages); /* mapped already, as in a guest that has run for a while */
    double untracked = busy_rate(&b, false), start_ms[REPEATS], first_ms[REPEATS];
    for (int i = 0; i < REPEATS; i++) {
        if (i)
            dirtylog_stop(b.log);
        int64_t start = clock_mono_ns();
        must(dirtylog_start(b.log, tiny_vm_slots(b.vm), 2, &err), &err);
        start_ms[i] = ms_since(start);
        first_ms[i] = harvest(&b);
        memset(b.bitmap, 0xff, b.pages / 8);
        first_ms[i] += clear(&b);
    }
    printf("{\"driver\": \"%s\", \"gib\": %s, \"start_ms\": %.4f, \"first_ms\": %.4f", argv[1], argv[2],
           smallest(start_ms, REPEATS), smallest(first_ms, REPEATS));
    for (unsigned k = 0; k < 4; k++) {
        double harvest_ms[REPEATS], clear_ms[REPEATS];
        int repeats = shares[k] == 100 && params.data_size > REPEATED_MAX ? 1 : REPEATS;
        for (int i = 0; i < repeats; i++) {
            write_share(&b, shares[k]);
            harvest_ms[i] = harvest(&b);
            clear_ms[i] = clear(&b);
        }
        printf(", \"harvest_%u_ms\": %.4f, \"clear_%u_ms\": %.4f", shares[k],
               smallest(harvest_ms, repeats), shares[k], smallest(clear_ms, repeats));
    }
    double tracked = busy_rate(&b, true);
    printf(", \"slowdown\": %.4f}\n", untracked / tracked - 1);
    dirtylog_destroy(b.log);
    tiny_vm_destroy(b.vm);
    free(b.bitmap);
    free(b.own);
    return 0;
}
