/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Command lines from a peer: arguments separated by newlines. Whatever parses is written and parsed
 * again, made portable, and made a destination's.
 */
#include "vmm/qemu_portable.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ARGS_MAX = 256 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_props(const struct qemu_option *o)
{
    cleanup_qemu_props struct qemu_props p = {0}, again = {0};
    const char *implied = qemu_option_implied_key(o->name);
    if (!o->value || qemu_props_parse(o->value, implied, &p, NULL) < 0 || p.json)
        return;
    char *text = qemu_props_format(&p, implied);
    if (!text || (*text != '{' && qemu_props_parse(text, implied, &again, NULL) < 0))
        abort();
    for (unsigned i = 0; i < p.n && *text != '{'; i++) {
        const char *value = qemu_props_get(&again, p.list[i].key);
        if (!value || strcmp(value, qemu_props_get(&p, p.list[i].key)))
            abort();
    }
    free(text);
}

static void check_portable(const struct qemu_argv *a)
{
    static const struct qemu_backend_fact backend = {"pc.ram", "pc.ram", 64 << 20, 4096, false};
    static const struct qemu_memory_facts facts = {
        .machine = "m", .main_backend = "pc.ram", .backends = &backend, .n_backends = 1};
    cleanup_qemu_argv struct qemu_argv portable = {0};
    if (qemu_argv_portable(a, &facts, &portable, NULL) < 0)
        return;
    char **argv = qemu_argv_format(&portable);
    static char name[] = "pc.ram";
    struct qemu_ram ram = {name, name, 64 << 20, 4096};
    struct qemu_definition d = {.argv = argv, .ram = &ram, .n_ram = 1};
    int fd = 9;
    struct qemu_place place = {&fd, NULL, 0};
    char **destination;
    if (qemu_argv_destination(&d, &place, &destination, NULL) == 0)
        free(destination);
    free(argv);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1), *argv[ARGS_MAX + 1];
    size_t n = 0;
    memcpy(text, data, size);
    text[size] = 0;
    for (char *line = text; line && n < ARGS_MAX; n++) {
        argv[n] = line;
        line = strchr(line, '\n');
        if (line)
            *line++ = 0;
    }
    argv[n] = NULL;
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_parse(argv, &a, NULL) == 0) {
        for (unsigned i = 0; i < a.n; i++)
            check_props(&a.options[i]);
        check_portable(&a);
    }
    free(text);
    return 0;
}
