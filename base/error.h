/* SPDX-License-Identifier: Apache-2.0 */
/*
 * error: the one error type of vmmig.
 *
 * Contract. A function that can fail returns 0 (or a value that its header names) on success and
 * -1 on failure, or NULL where it returns a pointer. Its last argument is `struct vm_error **err`.
 * On success *err is not touched. On failure *err, if err is not NULL, points to a new error that
 * the caller frees (`cleanup_error`, error_free). *err must be NULL when the call begins. An error
 * is made where the cause is known, says what, where and what to do in one line, and gains context
 * while it unwinds (error_wrap).
 *
 *     int disk_open(const char *path, struct vm_error **err)
 *     {
 *         cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
 *         if (fd < 0)
 *             return error_errno(err, errno, "cannot open disk %s", path);
 *         if (check_header(fd, err) < 0)
 *             return error_wrap(err, "disk %s", path);
 *         ...
 *
 * Memory running out yields a shared, immutable error, so that making an error cannot fail.
 * Threads: an error belongs to one thread at a time; it may be handed over.
 */
#ifndef VMMIG_BASE_ERROR_H
#define VMMIG_BASE_ERROR_H

#include <stdarg.h>

/* Kind, its stable name (in --json and logs), exit status of the command, what it means. */
#define VM_ERROR_KINDS(X)                                                                          \
    X(FAILED, "failed", 1, "the operation failed; the message says why")                           \
    X(USAGE, "usage", 2, "an argument is malformed or missing")                                    \
    X(NOT_FOUND, "not-found", 3, "no VM, image, file or job of that name")                         \
    X(CONFLICT, "conflict", 4, "the name is taken, or another operation is under way")             \
    X(REFUSED, "refused", 5, "vmmig will not do this to this VM; the message names the obstacle")  \
    X(UNREACHABLE, "unreachable", 6, "no agent or host answers at that address")                   \
    X(DENIED, "denied", 7, "certificate, key or permission was not accepted")                      \
    X(VERSION, "version", 8, "the other side speaks a version that this one does not")             \
    X(PROTOCOL, "protocol", 9, "the other side sent what the protocol does not allow")             \
    X(TIMEOUT, "timeout", 10, "no answer within the limit")                                        \
    X(NO_SPACE, "no-space", 11, "disk, pool or memory is full")                                    \
    X(CORRUPT, "corrupt", 12, "stored data is damaged")                                            \
    X(VMM_DIED, "vmm-died", 13, "the VM's process ended")                                          \
    X(CANCELLED, "cancelled", 14, "cancelled on request")                                          \
    X(IN_DOUBT, "in-doubt", 15, "only the peer or an operator can tell who owns the VM")           \
    X(SYSTEM, "system", 16, "the operating system refused; the message has its reason")

enum vm_error_kind {
#define X(id, name, status, text) VM_ERROR_##id,
    VM_ERROR_KINDS(X)
#undef X
    VM_ERROR_KIND_COUNT
};

struct vm_error {
    enum vm_error_kind kind;
    int sys_errno; /* errno of the failed call, 0 if none */
    char *message; /* one line, no newline, no trailing period */
};

/* Make an error. Always return -1, so that `return error_set(...)` reads well. */
int error_set(struct vm_error **err, enum vm_error_kind kind, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int error_vset(struct vm_error **err, enum vm_error_kind kind, int sys_errno, const char *fmt,
               va_list args) __attribute__((format(printf, 4, 0)));
/* As error_set, with ": strerror(errnum)" behind. The kind follows from errnum (ENOENT: NOT_FOUND,
 * EACCES: DENIED, ENOSPC: NO_SPACE, ECONNREFUSED: UNREACHABLE ...; otherwise SYSTEM). */
int error_errno(struct vm_error **err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Put "context: " before the message of *err; kind and errno stay. Returns -1. */
int error_wrap(struct vm_error **err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Change the kind of *err (not of the out-of-memory error). Returns -1. */
int error_set_kind(struct vm_error **err, enum vm_error_kind kind);
/* Hand `from` (owned by the call) to *err, or free it if err is NULL. Returns -1. */
int error_propagate(struct vm_error **err, struct vm_error *from);
struct vm_error *error_copy(const struct vm_error *from);
void error_free(struct vm_error *err);
/* error_free, then *err = NULL. Nothing if nobody asks for the error: err is NULL. */
void error_clear(struct vm_error **err);
/* The out-of-memory error; -1. */
int error_nomem(struct vm_error **err);

/* Stable name and exit status of a kind. */
const char *error_kind_name(enum vm_error_kind kind);
int error_kind_status(enum vm_error_kind kind);
const char *error_kind_text(enum vm_error_kind kind);
/* The kind of that stable name; FAILED if there is none (a newer peer's). */
enum vm_error_kind error_kind_parse(const char *name);
/* Never NULL, also for a NULL err. */
const char *error_message(const struct vm_error *err);

static inline void error_cleanup(struct vm_error **err)
{
    error_free(*err);
}
#define cleanup_error __attribute__((cleanup(error_cleanup)))

#endif
