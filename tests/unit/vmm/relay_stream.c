/* SPDX-License-Identifier: Apache-2.0 */
/*
 * relay_stream: the tools' end of a real QEMU's migration, for tests: a stream in, its pages into
 * memory files, the rest out.
 *
 *     relay_stream [-c CHANNELS] [-o] [-d | -n] STREAM_FD REST_FD [SIZE:FD:NAME]...
 *
 * Each NAME is a mapped block of SIZE bytes, its pages are written to FD (a memfd). -o: opaque.
 * -d: drop pages and rest. -n: do not even parse, only read. Prints one line of JSON.
 */
#include "base/clock.h"
#include "base/io.h"
#include "vmm/qemu_source.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

struct relay {
    struct guest_region regions[16];
    unsigned n;
    int rest_fd;
    bool discard;
    uint64_t batches, done_at; /* bytes of rest before memory_done */
    uint64_t rest;
    int64_t first_ns; /* of the first event */
    int64_t cpu_ns;   /* of the source's thread */
    int end_latch;
    struct vm_error *err;
};

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    struct relay *r = arg;
    if (!r->first_ns)
        r->first_ns = clock_mono_ns();
    r->batches++;
    for (unsigned i = 0; i < batch->n && !r->discard; i++) {
        uint64_t addr = batch->pages[i].addr;
        uint8_t *to = r->regions[page_addr_region(addr)].base;
        to += page_addr_number(addr) * GUEST_PAGE_SIZE;
        if (batch->pages[i].data)
            memcpy(to, batch->pages[i].data, GUEST_PAGE_SIZE);
        else
            memset(to, 0, GUEST_PAGE_SIZE);
    }
    page_batch_unref(batch);
    return 0;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct relay *r = arg;
    if (!r->first_ns)
        r->first_ns = clock_mono_ns();
    r->rest += n;
    return r->discard ? 0 : io_write_full(r->rest_fd, data, n, INT64_MAX, -1, err);
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    struct relay *r = arg;
    r->done_at = r->rest;
    return 0;
}

static void on_ended(void *arg, struct vm_error *err)
{
    struct relay *r = arg;
    r->err = err;
    r->cpu_ns = clock_thread_cpu_ns();
    io_latch_set(r->end_latch);
}

static int map_region(struct relay *r, const char *text)
{
    struct guest_region *g = &r->regions[r->n];
    int fd, name = 0;
    if (r->n == 16 || sscanf(text, "%" SCNu64 ":%d:%n", &g->size, &fd, &name) != 2 || !name)
        return -1;
    snprintf(g->name, sizeof(g->name), "%s", text + name);
    void *p = mmap(NULL, g->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return -1;
    g->base = p;
    r->n++;
    return 0;
}

/* What any reader costs. */
static void only_read(struct relay *r, int fd)
{
    static char buf[1 << 20];
    for (ssize_t n; (n = read(fd, buf, sizeof(buf))) > 0; r->rest += (uint64_t)n) {
        if (!r->first_ns)
            r->first_ns = clock_mono_ns();
    }
    r->cpu_ns = clock_thread_cpu_ns();
}

static int run(struct relay *r, struct qemu_source_params *params, bool parse)
{
    struct qemu_source_counters c = {0};
    cleanup_error struct vm_error *err = NULL;
    if (parse) {
        CLEANUP(qemu_source) struct qemu_source *s = qemu_source_create(params, &err);
        if (!s || io_wait(r->end_latch, POLLIN, INT64_MAX, -1, &err) < 0) {
            fprintf(stderr, "relay_stream: %s\n", error_message(err));
            return 1;
        }
        qemu_source_counters(s, &c);
    } else {
        only_read(r, params->fd);
        c.bytes_read = r->rest;
    }
    close_fd(&r->rest_fd);
    printf("{\"error\": \"%s\", \"opaque\": %s, \"bytes_read\": %" PRIu64 ", \"pages\": %" PRIu64
           ", \"zero_pages\": %" PRIu64 ", \"rest\": %" PRIu64 ", \"memory_done\": %" PRIu64
           ", \"batches\": %" PRIu64 ", \"seconds\": %.6f, \"cpu_seconds\": %.6f}\n",
           r->err ? error_message(r->err) : "", c.opaque ? "true" : "false", c.bytes_read, c.pages,
           c.zero_pages, r->rest, r->done_at, r->batches,
           (double)(clock_mono_ns() - r->first_ns) / 1e9, (double)r->cpu_ns / 1e9);
    error_free(r->err);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct guest_source_events events = {
        .pages = on_pages, .bytes = on_bytes, .memory_done = on_memory_done};
    struct relay r = {.end_latch = io_latch_new(NULL)};
    struct qemu_source_params params = {.channels = 4, .events = &events, .arg = &r};
    bool parse = true;
    for (int o; (o = getopt(argc, argv, "c:odn")) != -1;) {
        if (o == 'c')
            params.channels = (unsigned)atoi(optarg);
        else if (o == 'o')
            params.opaque = true;
        else if (o == 'd')
            r.discard = true;
        else if (o == 'n')
            parse = false;
        else
            return 2;
    }
    if (argc - optind < 2)
        return 2;
    params.fd = atoi(argv[optind]);
    r.rest_fd = atoi(argv[optind + 1]);
    for (int i = optind + 2; i < argc; i++) {
        if (map_region(&r, argv[i]) < 0) {
            fprintf(stderr, "relay_stream: cannot map %s\n", argv[i]);
            return 2;
        }
    }
    params.regions = r.regions;
    params.n_regions = r.n;
    params.ended = on_ended;
    params.ended_arg = &r;
    return run(&r, &params, parse);
}
