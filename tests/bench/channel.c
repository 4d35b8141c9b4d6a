/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast channels carry frames over loopback, and what that costs:
 *
 *     channel [MIB [CONNECTIONS...]]        default: 2048 MiB over 1 and 2 connections
 *
 * Sender and receiver are two processes; each row is one run, plain or TLS, with frames of 256 KiB
 * in one piece (compressed pages) or in pages of 4 KiB (raw ones). CPU seconds per GiB are those
 * of the sending and of the receiving process. The table goes to standard output, one line of JSON
 * per row to standard error.
 */
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/channel.h"
#include "tools/pki.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { FRAME = 256 << 10, PAGE = 4096, MAX_CONNECTIONS = 16, SOURCE = 64 << 20 };

static char cert_dir[] = "/tmp/vmmig-bench-XXXXXX";
static struct channel_token token;
static struct uuid attempt;

static void must(int ret, struct vm_error *err)
{
    if (ret >= 0)
        return;
    fprintf(stderr, "channel: %s\n", error_message(err));
    exit(1);
}

static struct conn_context *make_context(bool tls)
{
    char ca[64], cert[64], key[64];
    struct vm_error *err = NULL;
    snprintf(ca, sizeof(ca), "%s/ca.crt", cert_dir);
    snprintf(cert, sizeof(cert), "%s/127.0.0.1.crt", cert_dir);
    snprintf(key, sizeof(key), "%s/127.0.0.1.key", cert_dir);
    struct conn_settings settings = {.insecure_plain = true};
    if (tls)
        settings = (struct conn_settings){.ca_file = ca, .cert_file = cert, .key_file = key};
    struct conn_context *ctx = conn_context_create(&settings, &err);
    must(ctx ? 0 : -1, err);
    return ctx;
}

/* ---- Receiver ---- */

struct lane {
    struct channel_receiver *receiver;
    struct conn_context *ctx;
    int fd;
    uint8_t *memory; /* frames go round in it, as pages would into a guest */
    size_t at;
};

static int lane_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                      size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct lane *l = arg;
    ret_iov[0] = (struct iovec){l->memory + l->at, payload_len};
    l->at = (l->at + FRAME) % SOURCE;
    return 1;
}

static int lane_commit(void *arg, struct vm_error **err)
{
    return 0;
}

static void *lane_thread(void *arg)
{
    struct lane *l = arg;
    struct vm_error *err = NULL;
    struct channel_hello hello;
    CLEANUP(conn) struct conn *conn = conn_accept(l->ctx, l->fd, INT64_MAX, -1, &err);
    must(conn ? 0 : -1, err);
    must(channel_hello_receive(conn, &hello, INT64_MAX, -1, &err), err);
    struct channel_receiver_params params = {.id = hello.id,
                                             .ops = {.begin = lane_begin, .commit = lane_commit},
                                             .arg = l,
                                             .cancel_fd = -1};
    CLEANUP(channel_receiver)
    struct channel_receiver *receiver = channel_receiver_create(&params, &err);
    must(channel_receiver_run(receiver, conn, &hello, &err), err);
    return NULL;
}

static void receive(struct conn_context *ctx, int listener, unsigned connections)
{
    pthread_t threads[MAX_CONNECTIONS];
    struct lane lanes[MAX_CONNECTIONS];
    for (unsigned i = 0; i < connections; i++) {
        io_wait(listener, POLLIN, INT64_MAX, -1, NULL);
        lanes[i] = (struct lane){.ctx = ctx, .fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)};
        lanes[i].memory = mmap(NULL, SOURCE, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        pthread_create(&threads[i], NULL, lane_thread, &lanes[i]);
    }
    for (unsigned i = 0; i < connections; i++)
        pthread_join(threads[i], NULL);
}

/* ---- Sender ---- */

struct stream {
    struct conn_context *ctx;
    const char *address;
    unsigned number;
    uint64_t frames;
    bool pages;
    const uint8_t *source;
    struct channel_sender_stats stats;
};

static int stream_connect(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                          struct vm_error **err)
{
    struct stream *s = arg;
    *ret_conn = conn_dial(s->ctx, s->address, CONN_CHANNEL, deadline_ns, cancel_fd, err);
    return *ret_conn ? 0 : -1;
}

static void *stream_thread(void *arg)
{
    struct stream *s = arg;
    struct vm_error *err = NULL;
    struct channel_sender_params params = {.id = {attempt, token, (uint16_t)s->number},
                                           .connect = stream_connect,
                                           .connect_arg = s,
                                           .cancel_fd = -1};
    CLEANUP(channel_sender) struct channel_sender *sender = channel_sender_create(&params, &err);
    must(sender ? 0 : -1, err);
    struct iovec iov[FRAME / PAGE];
    int n = s->pages ? FRAME / PAGE : 1;
    for (uint64_t i = 0; i < s->frames; i++) {
        const uint8_t *from = s->source + i * FRAME % SOURCE;
        for (int k = 0; k < n; k++)
            iov[k] = (struct iovec){(void *)(uintptr_t)(from + k * (FRAME / n)), FRAME / (size_t)n};
        struct channel_frame frame = {
            .type = 1, .meta = "m", .meta_len = 1, .payload = iov, .n_payload = n};
        must(channel_sender_send(sender, &frame, &err), err);
    }
    must(channel_sender_end(sender, INT64_MAX, &err), err);
    channel_sender_get_stats(sender, &s->stats);
    return NULL;
}

static double cpu_seconds(int who)
{
    struct rusage u;
    getrusage(who, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void run(bool tls, bool pages, unsigned connections, unsigned mib, uint8_t *source)
{
    struct sockaddr_in at;
    socklen_t len = sizeof(at);
    char address[32];
    struct vm_error *err = NULL;
    int listener = conn_listen("127.0.0.1:0", &err);
    must(listener, err);
    getsockname(listener, (struct sockaddr *)&at, &len);
    snprintf(address, sizeof(address), "127.0.0.1:%d", ntohs(at.sin_port));
    double children_before = cpu_seconds(RUSAGE_CHILDREN), before = cpu_seconds(RUSAGE_SELF);
    pid_t child = fork();
    if (child == 0) {
        receive(make_context(tls), listener, connections);
        _exit(0);
    }
    struct conn_context *ctx = make_context(tls);
    struct stream streams[MAX_CONNECTIONS];
    pthread_t threads[MAX_CONNECTIONS];
    int64_t begin = clock_mono_ns();
    for (unsigned i = 0; i < connections; i++) {
        streams[i] = (struct stream){.ctx = ctx,
                                     .address = address,
                                     .number = i,
                                     .pages = pages,
                                     .source = source,
                                     .frames = (uint64_t)mib * (1 << 20) / FRAME / connections};
        pthread_create(&threads[i], NULL, stream_thread, &streams[i]);
    }
    for (unsigned i = 0; i < connections; i++)
        pthread_join(threads[i], NULL);
    double seconds = (double)(clock_mono_ns() - begin) / 1e9, gib = mib / 1024.0;
    waitpid(child, NULL, 0);
    double sender = (cpu_seconds(RUSAGE_SELF) - before) / gib;
    double receiver = (cpu_seconds(RUSAGE_CHILDREN) - children_before) / gib;
    printf("%-5s  %-6s  %11u  %6.2f  %6.3f  %8.3f  %8llu\n", tls ? "tls" : "plain",
           pages ? "pages" : "block", connections, gib * 1.073741824 / seconds, sender, receiver,
           (unsigned long long)streams[0].stats.rate / 1000000);
    fprintf(stderr,
            "{\"mode\":\"%s\",\"payload\":\"%s\",\"connections\":%u,\"gb_per_s\":%.3f,"
            "\"sender_cpu_s_per_gib\":%.3f,\"receiver_cpu_s_per_gib\":%.3f}\n",
            tls ? "tls" : "plain", pages ? "pages" : "block", connections,
            gib * 1.073741824 / seconds, sender, receiver);
    conn_context_destroy(ctx);
    close(listener);
}

int main(int argc, char **argv)
{
    struct vm_error *err = NULL;
    unsigned mib = argc > 1 ? (unsigned)atoi(argv[1]) : 2048;
    unsigned counts[MAX_CONNECTIONS] = {1, 2}, n_counts = 2;
    if (argc > 2)
        n_counts = 0;
    for (int i = 2; i < argc && n_counts < MAX_CONNECTIONS; i++)
        counts[n_counts++] = (unsigned)atoi(argv[i]);
    log_set_level(LOG_LEVEL_ERROR);
    must(mkdtemp(cert_dir) ? 0 : error_set(&err, VM_ERROR_SYSTEM, "no temporary folder"), err);
    must(pki_init(cert_dir, &err), err);
    must(pki_issue(cert_dir, &(struct pki_host){.name = "127.0.0.1"}, &err), err);
    token = channel_token_new();
    attempt = uuid_new();
    uint8_t *source = malloc(SOURCE);
    for (size_t i = 0; i < SOURCE; i++)
        source[i] = (uint8_t)(i * 2654435761u >> 11);
    printf("mode   frames  connections    GB/s  CPU s/GiB: sender  receiver  rate MB/s\n");
    for (int tls = 0; tls < 2; tls++)
        for (int pages = 0; pages < 2; pages++)
            for (unsigned i = 0; i < n_counts; i++)
                if (counts[i] >= 1 && counts[i] <= MAX_CONNECTIONS)
                    run(tls, pages, counts[i], mib, source);
    free(source);
    char command[64];
    snprintf(command, sizeof(command), "rm -rf %s", cert_dir);
    return system(command) != 0;
}
