/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The work of the Linux guest: signs of life by console, network and disk, and memory that checks
 * itself. Options, name=value:
 *
 *     mem=MIB        memory to work in (default 64)
 *     rate=MBPS      how much of it is rewritten per second, 10^6 bytes (default 10)
 *     tick=MS        between ticks on the console (default 100)
 *     udp=ADDRESS    send a heartbeat there, port 7000, every 5 ms
 *     log=FILE       append a line there and sync it, ten times a second
 *
 * Console output:
 *
 *     lab-guest ready
 *     tick N SECONDS checked=N errors=N    seconds of CLOCK_MONOTONIC; pages checked, checks failed
 *     BAD page=N expected=SEQ found=SEQ word=N     as of the bare guest; page is a page's number
 *     BAD log ...                          the disk failed
 *     verified checked=N errors=N
 *
 * Console input: "verify" has all the memory checked at once, "poweroff" ends the program.
 *
 * A heartbeat, and a line of the log, is "udp N SECONDS" and "log N SECONDS".
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tests/guest/bare/pages.h"

enum { PAGE = 4096, UDP_PORT = 7000, UDP_MS = 5, LOG_MS = 100, TURN_MS = 10, MAX_BAD_LINES = 16 };

static const struct pages_style style = {.fill = PAGES_FILL_TEXT, .pattern = PAGES_SEQ, .seed = 1};

static unsigned long mem_mib = 64, rate_mbps = 10, tick_ms = 100;
static const char *udp_address, *log_path;

static atomic_bool stopping, verify;
static atomic_ulong checked, errors;

static _Noreturn void die(const char *what)
{
    printf("PANIC %s: %s\n", what, strerror(errno));
    exit(1);
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Sleeps until *due, in steps of so many milliseconds. What was missed is not made up for. */
static void wait_turn(struct timespec *due, unsigned long ms)
{
    struct timespec now;

    due->tv_nsec += (long)ms * 1000000;
    due->tv_sec += due->tv_nsec / 1000000000;
    due->tv_nsec %= 1000000000;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, due, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > due->tv_sec)
        *due = now;
}

static struct timespec now_due(void)
{
    struct timespec due;

    clock_gettime(CLOCK_MONOTONIC, &due);
    return due;
}

/* ---- memory ---- */

static void check_page(uint64_t *words, uint64_t page, uint64_t expected)
{
    uint64_t contents[PAGES_WORDS];
    unsigned word;

    pages_render(&style, page, 0, expected, contents);
    word = pages_compare(words, contents);
    checked++;
    if (word == PAGES_WORDS)
        return;
    if (errors++ < MAX_BAD_LINES)
        printf("BAD page=%" PRIu64 " expected=%" PRIu64 " found=%" PRIu64 " word=%u\n", page,
               expected, words[3], word);
    memcpy(words, contents, PAGE);
}

static void *work_in_memory(void *unused)
{
    uint64_t pages = mem_mib << 20 >> 12;
    uint64_t per_turn = rate_mbps * 1000000 / PAGE * TURN_MS / 1000;
    uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint64_t *sequences = calloc(pages, sizeof(*sequences));
    struct timespec due = now_due();
    uint64_t page = 0;

    if (memory == MAP_FAILED || !sequences)
        die("memory");
    for (uint64_t i = 0; i < pages; i++)
        pages_render(&style, i, 0, sequences[i] = 1, memory + i * PAGES_WORDS);
    printf("lab-guest ready\n");
    while (!stopping) {
        for (uint64_t i = 0; i < per_turn; i++, page = (page + 1) % pages) {
            check_page(memory + page * PAGES_WORDS, page, sequences[page]);
            pages_render(&style, page, 0, ++sequences[page], memory + page * PAGES_WORDS);
        }
        if (atomic_exchange(&verify, false)) {
            for (uint64_t i = 0; i < pages; i++)
                check_page(memory + i * PAGES_WORDS, i, sequences[i]);
            printf("verified checked=%lu errors=%lu\n", checked, errors);
        }
        wait_turn(&due, TURN_MS);
    }
    return NULL;
}

/* ---- signs of life ---- */

static void *tick(void *unused)
{
    struct timespec due = now_due();

    for (unsigned long n = 0; !stopping; n++) {
        printf("tick %lu %.4f checked=%lu errors=%lu\n", n, seconds(), checked, errors);
        wait_turn(&due, tick_ms);
    }
    return NULL;
}

static void *send_heartbeats(void *unused)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(UDP_PORT)};
    struct timespec due = now_due();
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (fd < 0 || inet_pton(AF_INET, udp_address, &to.sin_addr) != 1)
        die("udp");
    for (unsigned long n = 0; !stopping; n++) {
        char line[64];
        int length = snprintf(line, sizeof(line), "udp %lu %.4f", n, seconds());

        sendto(fd, line, (size_t)length, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof(to));
        wait_turn(&due, UDP_MS);
    }
    close(fd);
    return NULL;
}

static void *write_log(void *unused)
{
    struct timespec due = now_due();
    int fd = open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);

    if (fd < 0)
        die("log");
    for (unsigned long n = 0; !stopping; n++) {
        if (dprintf(fd, "log %lu %.4f\n", n, seconds()) < 0 || fdatasync(fd) != 0)
            printf("BAD log: %s\n", strerror(errno));
        wait_turn(&due, LOG_MS);
    }
    close(fd);
    return NULL;
}

static void parse(char *option)
{
    char *value = strchr(option, '=');

    if (!value)
        die(option);
    *value++ = '\0';
    if (strcmp(option, "mem") == 0)
        mem_mib = strtoul(value, NULL, 10);
    else if (strcmp(option, "rate") == 0)
        rate_mbps = strtoul(value, NULL, 10);
    else if (strcmp(option, "tick") == 0)
        tick_ms = strtoul(value, NULL, 10);
    else if (strcmp(option, "udp") == 0)
        udp_address = value;
    else if (strcmp(option, "log") == 0)
        log_path = value;
    else
        die(option);
}

int main(int argc, char **argv)
{
    pthread_t threads[4];
    unsigned count = 0;
    char line[64];

    for (int i = 1; i < argc; i++)
        parse(argv[i]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_create(&threads[count++], NULL, work_in_memory, NULL);
    pthread_create(&threads[count++], NULL, tick, NULL);
    if (udp_address)
        pthread_create(&threads[count++], NULL, send_heartbeats, NULL);
    if (log_path)
        pthread_create(&threads[count++], NULL, write_log, NULL);
    while (fgets(line, sizeof(line), stdin) && strcmp(line, "poweroff\n") != 0) {
        if (strcmp(line, "verify\n") == 0)
            verify = true;
    }
    stopping = true;
    while (count)
        pthread_join(threads[--count], NULL);
    return 0;
}
