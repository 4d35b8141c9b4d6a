/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cleanup: what a scope owns is released when the scope ends.
 *
 *     cleanup_free char *text = NULL;
 *     cleanup_close int fd = -1;
 *     ...
 *     return steal_fd(&fd);          // ownership leaves the scope
 *
 * A module with a destructor `foo_destroy(struct foo *)` that takes NULL adds
 * DEFINE_CLEANUP(foo, struct foo *, foo_destroy) to its header and gets `cleanup_foo`, used as
 * `CLEANUP(foo) struct foo *f = NULL;`.
 */
#ifndef VMMIG_BASE_CLEANUP_H
#define VMMIG_BASE_CLEANUP_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_free_ptr(void *p)
{
    free(*(void **)p);
}

static inline void cleanup_close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void cleanup_fclose_file(FILE **f)
{
    if (*f)
        fclose(*f);
}

static inline void cleanup_unlock_mutex(pthread_mutex_t **m)
{
    if (*m)
        pthread_mutex_unlock(*m);
}

static inline pthread_mutex_t *lock_mutex(pthread_mutex_t *m)
{
    pthread_mutex_lock(m);
    return m;
}

#define cleanup_free __attribute__((cleanup(cleanup_free_ptr)))
#define cleanup_close __attribute__((cleanup(cleanup_close_fd)))
#define cleanup_fclose __attribute__((cleanup(cleanup_fclose_file)))

/* Hold the mutex until the scope ends. One per scope. */
#define SCOPE_LOCK(m)                                                                              \
    __attribute__((cleanup(cleanup_unlock_mutex), unused)) pthread_mutex_t *scope_lock_held =      \
        lock_mutex(m)

#define DEFINE_CLEANUP(name, type, destroy)                                                        \
    static inline void cleanup_##name##_fn(type *p)                                                \
    {                                                                                              \
        destroy(*p);                                                                               \
    }
#define CLEANUP(name) __attribute__((cleanup(cleanup_##name##_fn), unused))

static inline int steal_fd(int *fd)
{
    int taken = *fd;
    *fd = -1;
    return taken;
}

/* The pointer; the variable is NULL afterwards. */
#define steal_ptr(p)                                                                               \
    ({                                                                                             \
        __typeof__(*(p)) taken_ = *(p);                                                            \
        *(p) = NULL;                                                                               \
        taken_;                                                                                    \
    })

/* Close and forget; close errors of data that matters are checked by fsync before. */
static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

#endif
