/* SPDX-License-Identifier: Apache-2.0 */
/*
 * argv: argument vectors that are one allocation each, the words behind the pointers: free() ends
 * one. Pure functions; any thread.
 */
#ifndef VMMIG_BASE_ARGV_H
#define VMMIG_BASE_ARGV_H

#include <stddef.h>

/* Words before the NULL. */
size_t argv_count(char *const *argv);
/* A copy of the first n words, ended by NULL. NULL without memory. */
char **argv_copy(char *const *argv, size_t n);

#endif
