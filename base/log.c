/* SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static enum log_level max_level = LOG_LEVEL_INFO;
static _Thread_local char thread_job[40], thread_vm[72];

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const int syslog_priorities[] = {3, 4, 6, 7};

void log_set_level(enum log_level level)
{
    max_level = level;
}

bool log_level_parse(const char *name, enum log_level *ret_level)
{
    for (unsigned i = 0; i < sizeof(level_names) / sizeof(*level_names); i++) {
        if (!strcmp(name, level_names[i])) {
            *ret_level = i;
            return true;
        }
    }
    return false;
}

void log_set_thread_context(const char *job, const char *vm)
{
    snprintf(thread_job, sizeof(thread_job), "%s", job ? job : "");
    snprintf(thread_vm, sizeof(thread_vm), "%s", vm ? vm : "");
}

const char *log_quote(const char *text, char out[LOG_QUOTE_MAX])
{
    char *o = out, *end = out + LOG_QUOTE_MAX - 6;
    *o++ = '"';
    for (const unsigned char *t = (const unsigned char *)text; *t && o < end; t++) {
        if (*t == '"' || *t == '\\') {
            *o++ = '\\';
            *o++ = (char)*t;
        } else if (*t < 0x20 || *t == 0x7f) {
            o += sprintf(o, "\\x%02x", *t);
        } else {
            *o++ = (char)*t;
        }
    }
    *o++ = '"';
    *o = 0;
    return out;
}

/* Append to line, never past its end. */
__attribute__((format(printf, 4, 5))) static size_t append(char *line, size_t len, size_t size, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(line + len, size - len, fmt, args);
    va_end(args);
    return n < 0 ? len : len + (size_t)n >= size ? size - 1 : len + (size_t)n;
}

static size_t append_prefix(char *line, size_t size, enum log_level level)
{
    if (getenv("JOURNAL_STREAM"))
        return append(line, 0, size, "<%d>level=%s", syslog_priorities[level], level_names[level]);
    struct timespec now;
    struct tm tm;
    char stamp[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &tm);
    return append(line, 0, size, "ts=%s.%03ldZ level=%s", stamp, now.tv_nsec / 1000000,
                  level_names[level]);
}

void log_write(enum log_level level, const char *msg, const char *fields_fmt, ...)
{
    if (level > max_level)
        return;
    int saved = errno;
    char line[2048];
    size_t len = append_prefix(line, sizeof(line) - 1, level);
    if (thread_job[0])
        len = append(line, len, sizeof(line) - 1, " job=%s", thread_job);
    if (thread_vm[0])
        len = append(line, len, sizeof(line) - 1, " vm=%s", thread_vm);
    len = append(line, len, sizeof(line) - 1, " msg=\"%s\"", msg);
    if (*fields_fmt) {
        va_list args;
        va_start(args, fields_fmt);
        len = append(line, len, sizeof(line) - 1, " ");
        int n = vsnprintf(line + len, sizeof(line) - 1 - len, fields_fmt, args);
        va_end(args);
        if (n > 0)
            len = len + (size_t)n >= sizeof(line) - 1 ? sizeof(line) - 2 : len + (size_t)n;
    }
    line[len++] = '\n';
    /* A log that cannot be written has nowhere to say so. */
    ssize_t ignored = write(STDERR_FILENO, line, len);
    (void)ignored;
    errno = saved;
}
