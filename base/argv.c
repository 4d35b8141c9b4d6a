/* SPDX-License-Identifier: Apache-2.0 */
#include "base/argv.h"

#include <stdlib.h>
#include <string.h>

size_t argv_count(char *const *argv)
{
    size_t n = 0;
    while (argv[n])
        n++;
    return n;
}

char **argv_copy(char *const *argv, size_t n)
{
    size_t bytes = (n + 1) * sizeof(char *);
    for (size_t i = 0; i < n; i++)
        bytes += strlen(argv[i]) + 1;
    char **copy = malloc(bytes);
    if (!copy)
        return NULL;
    char *text = (char *)(copy + n + 1);
    for (size_t i = 0; i < n; i++) {
        copy[i] = text;
        text = stpcpy(text, argv[i]) + 1;
    }
    copy[n] = NULL;
    return copy;
}
