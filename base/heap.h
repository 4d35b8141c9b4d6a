/* SPDX-License-Identifier: Apache-2.0 */
/*
 * heap: what malloc does with memory that was freed.
 *
 * glibc takes the first block of some MiB that is freed as a sign that such blocks come and go, and
 * from then on keeps them: in a process that stores packs some 25 MiB more than it ever uses at once.
 * After heap_give_back blocks of half a MiB and more go back to the system as soon as they are freed,
 * and smaller ones share few arenas.
 *
 * For programs that work with blocks of MiB: once, first thing in main, before there are threads.
 */
#ifndef VMMIG_BASE_HEAP_H
#define VMMIG_BASE_HEAP_H

void heap_give_back(void);

#endif
