/* SPDX-License-Identifier: Apache-2.0 */
/*
 * limits: what this machine can do at best, on all its cores at once, in blocks of 64 KiB, half of them random, half
 * text: copy memory; compress and decompress it by LZ4; hash it by SHA-256, 4 KiB at a time; encrypt it as TLS 1.3
 * does (AES-256-GCM, records of 16 KiB); send it over loopback TCP to itself (each core sends and receives). Prints
 * a JSON object, bytes a second.
 */
#include "base/clock.h"

#include <lz4.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BLOCK = 64 << 10, PAGE = 4 << 10, TLS_RECORD = 16 << 10, THREADS_MAX = 64 };
#define SIZE (256ull << 20)
#define RUN_NS (400 * 1000000ll)

struct job {
    pthread_t thread;
    uint8_t *from, *to;
    int *lengths;
    EVP_CIPHER_CTX *cipher;
    EVP_MD_CTX *digest;
    int sender, receiver;
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

static int hash(struct job *j, size_t block)
{
    uint8_t digest[32];
    for (size_t at = 0; at < BLOCK; at += PAGE) {
        EVP_DigestInit_ex(j->digest, EVP_sha256(), NULL);
        EVP_DigestUpdate(j->digest, j->from + block * BLOCK + at, PAGE);
        EVP_DigestFinal_ex(j->digest, digest, NULL);
    }
    return 0;
}

static int encrypt(struct job *j, size_t block)
{
    static const uint8_t key[32] = {1}, nonce[12] = {2};
    uint8_t tag[16];
    int n;
    for (size_t at = 0; at < BLOCK; at += TLS_RECORD) {
        EVP_EncryptInit_ex(j->cipher, EVP_aes_256_gcm(), NULL, key, nonce);
        EVP_EncryptUpdate(j->cipher, j->to + block * 2 * BLOCK + at, &n, j->from + block * BLOCK + at, TLS_RECORD);
        EVP_EncryptFinal_ex(j->cipher, j->to + block * 2 * BLOCK + at + n, &n);
        EVP_CIPHER_CTX_ctrl(j->cipher, EVP_CTRL_GCM_GET_TAG, 16, tag);
    }
    return 0;
}

static int transfer(struct job *j, size_t block)
{
    size_t got = 0;
    if (send(j->sender, j->from + block * BLOCK, BLOCK, 0) != BLOCK)
        exit(1);
    while (got < BLOCK) {
        ssize_t n = recv(j->receiver, j->to + block * 2 * BLOCK + got, BLOCK - got, 0);
        if (n <= 0)
            exit(1);
        got += (size_t)n;
    }
    return 0;
}

static void connect_to_itself(struct job *j)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(at);
    int listener = socket(AF_INET, SOCK_STREAM, 0), room = 4 * BLOCK;
    j->sender = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(j->sender, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
    setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
    if (bind(listener, (struct sockaddr *)&at, length) != 0 || listen(listener, 1) != 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) != 0 ||
        connect(j->sender, (struct sockaddr *)&at, length) != 0)
        exit(1);
    j->receiver = accept(listener, NULL, NULL);
    close(listener);
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

static const struct {
    const char *name;
    int (*step)(struct job *, size_t);
} measures[] = {{"memcpy", copy},   {"lz4_compress", compress}, {"lz4_decompress", decompress},
                {"sha256", hash},   {"aes_256_gcm", encrypt},   {"loopback_tcp", transfer}};

int main(void)
{
    static struct job jobs[THREADS_MAX];
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    n = n > THREADS_MAX ? THREADS_MAX : n;
    for (long i = 0; i < n; i++) {
        jobs[i] = (struct job){.from = malloc(SIZE),
                               .to = malloc(2 * SIZE),
                               .lengths = calloc(SIZE / BLOCK, sizeof(int)),
                               .cipher = EVP_CIPHER_CTX_new(),
                               .digest = EVP_MD_CTX_new()};
        if (!jobs[i].from || !jobs[i].to || !jobs[i].lengths || !jobs[i].cipher || !jobs[i].digest)
            return 1;
        fill(jobs[i].from);
        memset(jobs[i].to, 1, 2 * SIZE);
        connect_to_itself(&jobs[i]);
    }
    printf("{\"cores\": %ld", n);
    for (size_t i = 0; i < sizeof(measures) / sizeof(*measures); i++)
        printf(", \"%s\": %.0f", measures[i].name, measure(jobs, n, measures[i].step));
    printf("}\n");
    return 0;
}
