/* SPDX-License-Identifier: Apache-2.0 */
/*
 * limits: what this machine can do at best, on all its cores at once: copy memory, compress and decompress it by LZ4
 * in blocks of 64 KiB, half of them random, half text. Prints a JSON object, bytes a second. Used by
 * tests/bench/attach.py.
 */
#include "base/clock.h"

#include <lz4.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 64 << 10, THREADS_MAX = 64 };
#define SIZE (256ull << 20)
#define RUN_NS (400 * 1000000ll)

struct job {
    pthread_t thread;
    uint8_t *from, *to;
    int *lengths;
    int (*step)(struct job *job, size_t block);
    uint64_t done;
    int64_t took;
};

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static void fill(uint8_t *memory)
{
    static const char words[16][9] = {"the     ", "memory  ", "of a    ", "virtual ",
                                      "machine ", "that was", " written", " before ",
                                      "and then", " copied ", "to the  ", "other   ",
                                      "host in ", "rounds, ", "until   ", "nothing "};
    for (uint64_t i = 0; i < SIZE / 8; i++) {
        uint64_t value = mix(i);
        memcpy(memory + i * 8, i * 8 / BLOCK % 2 ? (void *)&value : (void *)words[value % 16], 8);
    }
}

static int copy(struct job *j, size_t block)
{
    memcpy(j->to + block * 2 * BLOCK, j->from + block * BLOCK, BLOCK);
    return 0;
}

static int compress(struct job *j, size_t block)
{
    j->lengths[block] = LZ4_compress_default((char *)j->from + block * BLOCK,
                                             (char *)j->to + block * 2 * BLOCK, BLOCK, 2 * BLOCK);
    return 0;
}

static int decompress(struct job *j, size_t block)
{
    LZ4_decompress_safe((char *)j->to + block * 2 * BLOCK, (char *)j->from + block * BLOCK,
                        j->lengths[block], BLOCK);
    return 0;
}

static void *run(void *arg)
{
    struct job *j = arg;
    int64_t start = clock_mono_ns();
    j->done = 0;
    do {
        for (size_t block = 0; block < SIZE / BLOCK; block++)
            j->step(j, block);
        j->done += SIZE;
        j->took = clock_mono_ns() - start;
    } while (j->took < RUN_NS);
    return NULL;
}

static double measure(struct job *jobs, long n, int (*step)(struct job *, size_t))
{
    double sum = 0;
    for (long i = 0; i < n; i++) {
        jobs[i].step = step;
        if (pthread_create(&jobs[i].thread, NULL, run, &jobs[i]) != 0)
            exit(1);
    }
    for (long i = 0; i < n; i++) {
        pthread_join(jobs[i].thread, NULL);
        sum += (double)jobs[i].done * 1e9 / (double)jobs[i].took;
    }
    return sum;
}

int main(void)
{
    static struct job jobs[THREADS_MAX];
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    n = n > THREADS_MAX ? THREADS_MAX : n;
    for (long i = 0; i < n; i++) {
        jobs[i].from = malloc(SIZE);
        jobs[i].to = malloc(2 * SIZE);
        jobs[i].lengths = calloc(SIZE / BLOCK, sizeof(int));
        if (!jobs[i].from || !jobs[i].to || !jobs[i].lengths)
            return 1;
        fill(jobs[i].from);
        memset(jobs[i].to, 1, 2 * SIZE);
    }
    double copied = measure(jobs, n, copy), packed = measure(jobs, n, compress);
    printf("{\"cores\": %ld, \"memcpy\": %.0f, \"lz4_compress\": %.0f, \"lz4_decompress\": %.0f}\n", n,
           copied, packed, measure(jobs, n, decompress));
    return 0;
}
