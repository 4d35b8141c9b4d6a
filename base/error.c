/* SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct vm_error nomem = {VM_ERROR_NO_SPACE, ENOMEM, (char[]){"out of memory"}};

static const struct {
    const char *name;
    int status;
    const char *text;
} kinds[] = {
#define X(id, name, status, text) {name, status, text},
    VM_ERROR_KINDS(X)
#undef X
};

int error_nomem(struct vm_error **err)
{
    if (err)
        *err = &nomem;
    return -1;
}

int error_vset(struct vm_error **err, enum vm_error_kind kind, int sys_errno, const char *fmt,
               va_list args)
{
    if (!err)
        return -1;
    struct vm_error *e = malloc(sizeof(*e));
    if (!e)
        return error_nomem(err);
    e->kind = kind;
    e->sys_errno = sys_errno;
    if (vasprintf(&e->message, fmt, args) < 0) {
        free(e);
        return error_nomem(err);
    }
    if (sys_errno) {
        char *whole;
        if (asprintf(&whole, "%s: %s", e->message, strerror(sys_errno)) >= 0) {
            free(e->message);
            e->message = whole;
        }
    }
    *err = e;
    return -1;
}

int error_set(struct vm_error **err, enum vm_error_kind kind, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    error_vset(err, kind, 0, fmt, args);
    va_end(args);
    return -1;
}

static enum vm_error_kind kind_of_errno(int errnum)
{
    switch (errnum) {
    case ENOENT:
        return VM_ERROR_NOT_FOUND;
    case EACCES:
    case EPERM:
        return VM_ERROR_DENIED;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
        return VM_ERROR_NO_SPACE;
    case EEXIST:
    case EADDRINUSE:
        return VM_ERROR_CONFLICT;
    case ETIMEDOUT:
        return VM_ERROR_TIMEOUT;
    case ECONNREFUSED:
    case ECONNRESET:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case EPIPE:
        return VM_ERROR_UNREACHABLE;
    case ECANCELED:
        return VM_ERROR_CANCELLED;
    default:
        return VM_ERROR_SYSTEM;
    }
}

int error_errno(struct vm_error **err, int errnum, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    error_vset(err, kind_of_errno(errnum), errnum, fmt, args);
    va_end(args);
    return -1;
}

int error_wrap(struct vm_error **err, const char *fmt, ...)
{
    if (!err || !*err || *err == &nomem)
        return -1;
    char *context = NULL;
    va_list args;
    va_start(args, fmt);
    int made = vasprintf(&context, fmt, args);
    va_end(args);
    if (made < 0)
        return -1;
    char *whole;
    if (asprintf(&whole, "%s: %s", context, (*err)->message) >= 0) {
        free((*err)->message);
        (*err)->message = whole;
    }
    free(context);
    return -1;
}

int error_set_kind(struct vm_error **err, enum vm_error_kind kind)
{
    if (err && *err && *err != &nomem)
        (*err)->kind = kind;
    return -1;
}

int error_propagate(struct vm_error **err, struct vm_error *from)
{
    if (err)
        *err = from;
    else
        error_free(from);
    return -1;
}

struct vm_error *error_copy(const struct vm_error *from)
{
    struct vm_error *copy = NULL;
    if (from == &nomem)
        return &nomem;
    error_set(&copy, from->kind, "%s", from->message);
    if (copy != &nomem)
        copy->sys_errno = from->sys_errno;
    return copy;
}

void error_free(struct vm_error *err)
{
    if (!err || err == &nomem)
        return;
    free(err->message);
    free(err);
}

void error_clear(struct vm_error **err)
{
    if (!err)
        return;
    error_free(*err);
    *err = NULL;
}

const char *error_kind_name(enum vm_error_kind kind)
{
    return (unsigned)kind < VM_ERROR_KIND_COUNT ? kinds[kind].name : "failed";
}

int error_kind_status(enum vm_error_kind kind)
{
    return (unsigned)kind < VM_ERROR_KIND_COUNT ? kinds[kind].status : 1;
}

const char *error_kind_text(enum vm_error_kind kind)
{
    return (unsigned)kind < VM_ERROR_KIND_COUNT ? kinds[kind].text : "";
}

enum vm_error_kind error_kind_parse(const char *name)
{
    for (int i = 0; i < VM_ERROR_KIND_COUNT; i++)
        if (!strcmp(name, kinds[i].name))
            return i;
    return VM_ERROR_FAILED;
}

const char *error_message(const struct vm_error *err)
{
    return err ? err->message : "no error";
}
