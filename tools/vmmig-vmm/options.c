/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int complain(const char *format, ...)
{
    va_list args;
    char line[512];
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    fprintf(stderr, "vmmig-vmm: %s\n", line);
    return -1;
}

/* ---- Kinds of values: -1 if the text is none ---- */

static int parse_text(const char *text, void *member)
{
    *(const char **)member = text;
    return *text ? 0 : -1;
}

static int parse_flag(const char *text, void *member)
{
    (void)text;
    *(bool *)member = true;
    return 0;
}

static int parse_number(const char *text, uint64_t *ret_number, const char **ret_end)
{
    char *end;
    errno = 0;
    *ret_number = strtoull(text, &end, 10);
    *ret_end = end;
    return text[0] >= '0' && text[0] <= '9' && !errno ? 0 : -1;
}

static int parse_count(const char *text, void *member)
{
    const char *end;
    return parse_number(text, member, &end) < 0 || *end ? -1 : 0;
}

static int parse_unsigned(const char *text, void *member)
{
    uint64_t number;
    if (parse_count(text, &number) < 0 || number > UINT32_MAX)
        return -1;
    *(unsigned *)member = (unsigned)number;
    return 0;
}

/* MiB, or with K, M or G. */
static int parse_size(const char *text, void *member)
{
    const char *end;
    uint64_t number, *size = member;
    if (parse_number(text, &number, &end) < 0)
        return -1;
    unsigned shift = *end == 'K' ? 10 : *end == 'G' ? 30 : 20;
    if ((*end && (!strchr("KMG", *end) || end[1])) || number > (1ull << 40) >> shift)
        return -1;
    *size = number << shift;
    return 0;
}

static int parse_tracking(const char *text, void *member)
{
    struct options *o = member;
    if (strncmp(text, "trace:", 6))
        return vmmig_tracking_parse(text, &o->tracking) < 0 || o->tracking == VMMIG_TRACKING_TRACE
                   ? -1
                   : 0;
    o->tracking = VMMIG_TRACKING_TRACE;
    o->trace = text + 6;
    return *o->trace ? 0 : -1;
}

/* ---- The options ---- */

static const struct option {
    const char *name, *argument; /* NULL: a flag */
    int (*parse)(const char *text, void *member);
    size_t offset;
    const char *text;
} options[] = {
    {"attach", "SOCKET", parse_text, offsetof(struct options, attach),
     "where vmmig's agent attaches (required)"},
    {"name", "NAME", parse_text, offsetof(struct options, name),
     "by which vmmig knows the VM"},
    {"memory", "SIZE", parse_size, offsetof(struct options, memory),
     "MiB, or with suffix K, M or G (256)"},
    {"below-4g", "SIZE", parse_size, offsetof(struct options, below_4g),
     "more memory than that lies above 4 GiB (3G)"},
    {"hugetlb", NULL, parse_flag, offsetof(struct options, hugetlb), "memory of 2 MiB pages"},
    {"vcpus", "N", parse_unsigned, offsetof(struct options, vcpus), "1 to 8 (1)"},
    {"kernel", "FILE", parse_text, offsetof(struct options, kernel),
     "a multiboot kernel with load addresses"},
    {"append", "TEXT", parse_text, offsetof(struct options, append), "its command line"},
    {"serial", "WHERE", parse_text, offsetof(struct options, serial),
     "stdio, null, file:PATH, unix:PATH; %n: the name (stdio)"},
    {"events", "SOCKET", parse_text, offsetof(struct options, events),
     "who is told when the guest runs; %n: the name"},
    {"writer", "N", parse_count, offsetof(struct options, writer_rate),
     "a device that writes N pages a second"},
    {"tracking", "KIND", parse_tracking, 0, "auto, bitmap, ring, plain, or trace:FILE (auto)"},
    {"ring-entries", "N", parse_unsigned, offsetof(struct options, ring_entries),
     "of each vCPU's dirty ring (16384)"},
    {"record", "FILE", parse_text, offsetof(struct options, record),
     "record what is written, for trace:FILE"},
    {"incoming", NULL, parse_flag, offsetof(struct options, incoming), "wait for a guest"},
    {"help", NULL, parse_flag, offsetof(struct options, help), "this text"},
};
enum { N_OPTIONS = sizeof(options) / sizeof(*options) };

void options_help(void)
{
    puts("usage: vmmig-vmm --attach SOCKET [--kernel FILE | --incoming] [OPTION ...]\n\n"
         "Run one KVM guest that vmmig can move. Ends at SIGTERM, or when the guest was\n"
         "moved away. SIGUSR2 pauses the guest, or lets it go on.\n");
    for (unsigned i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        printf("  --%-12s %-7s %s\n", o->name, o->argument ? o->argument : "", o->text);
    }
    puts("\nExit status: 0, 1 for a failure, 2 for a wrong command line.");
}

static int check(const struct options *o)
{
    uint64_t unit = o->hugetlb ? 2u << 20 : PAGE;
    if (o->help)
        return 0;
    if (!o->attach)
        return complain("--attach SOCKET is missing; see vmmig-vmm --help");
    if (!o->vcpus || o->vcpus > VMM_VCPUS_MAX)
        return complain("--vcpus is 1 to %d", VMM_VCPUS_MAX);
    if (o->memory < 16u << 20 || o->memory % unit)
        return complain("--memory is at least 16 MiB and a multiple of %llu KiB",
                        (unsigned long long)unit >> 10);
    if (o->below_4g < 16u << 20 || o->below_4g > 3ull << 30 || o->below_4g % unit)
        return complain("--below-4g is 16 MiB to 3 GiB and a multiple of %llu KiB",
                        (unsigned long long)unit >> 10);
    if (!o->incoming && !o->kernel && o->tracking != VMMIG_TRACKING_TRACE)
        return complain("--kernel FILE or --incoming is missing; see vmmig-vmm --help");
    return 0;
}

/* Which option a word is; *ret_value: what stands behind its '=', or NULL. */
static const struct option *find(const char *word, const char **ret_value)
{
    size_t n = strcspn(word, "=");
    *ret_value = word[n] ? word + n + 1 : NULL;
    for (unsigned i = 0; i < N_OPTIONS; i++)
        if (!strncmp(word, "--", 2) && strlen(options[i].name) == n - 2 &&
            !strncmp(options[i].name, word + 2, n - 2))
            return &options[i];
    return NULL;
}

/*
 * vmmig: how a VMM is started that waits for this guest, on any host. All is as here, but for the
 * socket, which the agent there chooses, the kernel, which comes with the memory, the name, and the
 * recording, which two VMMs of one host would write over each other's.
 */
static void add_incoming(struct options *o, unsigned *n, const struct option *option,
                         const char *value)
{
    char *word = NULL;
    if (!strcmp(option->name, "attach"))
        value = VMMIG_SOCKET_WORD;
    else if (!strcmp(option->name, "name"))
        value = VMMIG_NAME_WORD;
    else if (!strcmp(option->name, "kernel") || !strcmp(option->name, "incoming") ||
             !strcmp(option->name, "record"))
        return;
    if (asprintf(&word, "--%s%s%s", option->name, value ? "=" : "", value ? value : "") > 0)
        o->incoming_argv[(*n)++] = word;
}

/* `text` with the VM's name for each %n. NULL: no memory, or there is no name. */
static char *put_name(const char *text, const char *name)
{
    size_t n = 1;
    for (const char *c = text; *c; c++)
        n += !strncmp(c, "%n", 2) && name ? strlen(name) : 1;
    char *out = malloc(n), *to = out;
    while (out && *text) {
        if (strncmp(text, "%n", 2)) {
            *to++ = *text++;
            continue;
        }
        if (!name) {
            free(out);
            return NULL;
        }
        to = stpcpy(to, name);
        text += 2;
    }
    if (out)
        *to = 0;
    return out;
}

int options_parse(int argc, char **argv, struct options *ret_options)
{
    static struct options o = {
        .memory = 256u << 20, .below_4g = 3ull << 30, .vcpus = 1, .append = "", .serial = "stdio"};
    unsigned n = 0;
    if (argc > VMM_ARGV_MAX)
        return complain("more than %d words", VMM_ARGV_MAX);
    o.incoming_argv[n++] = strchr(argv[0], '/') ? argv[0] : "/usr/bin/vmmig-vmm";
    for (int i = 1; i < argc; i++) {
        const char *value, *word = argv[i];
        const struct option *option = find(word, &value);
        if (!option)
            return complain("unknown option %s; see vmmig-vmm --help", word);
        if (!option->argument && value)
            return complain("--%s takes no value", option->name);
        if (option->argument && !value && i + 1 < argc)
            value = argv[++i];
        if (option->argument && !value)
            return complain("--%s needs a value: %s", option->name, option->argument);
        if (option->parse(value, (uint8_t *)&o + option->offset) < 0)
            return complain("--%s %s is no %s", option->name, value, option->argument);
        add_incoming(&o, &n, option, value);
    }
    o.incoming_argv[n++] = "--incoming";
    bool named = o.events;
    o.serial = put_name(o.serial, o.name);
    o.events = o.events ? put_name(o.events, o.name) : NULL;
    if (!o.serial || (named && !o.events))
        return complain("--serial or --events names the VM (%%n), and there is no --name");
    *ret_options = o;
    return check(&o);
}
