/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log: logfmt lines on standard error, one per event, written with one write(2).
 *
 *     ts=2026-01-31T12:00:00.123Z level=info job=7f3a vm=web1 msg="round done" round=2 pages=812
 *
 *     log_info("round done", "round=%u pages=%lu", round, pages);
 *
 * The message is a constant phrase; values go into fields. A field that comes from outside (a name,
 * a peer's text) is formatted through log_quote, which escapes what could forge a line.
 * The job and VM of the calling thread are added by themselves once set. Under systemd
 * (JOURNAL_STREAM) the time stamp is left out and the priority is prefixed.
 * Threads: any; settings of level are made before threads start.
 */
#ifndef VMMIG_BASE_LOG_H
#define VMMIG_BASE_LOG_H

#include <stdbool.h>

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

void log_set_level(enum log_level level);
/* "error", "warn", "info", "debug"; false if it is none of these. */
bool log_level_parse(const char *name, enum log_level *ret_level);
/* Job id and VM name for the lines of this thread; copied; NULL for none. */
void log_set_thread_context(const char *job, const char *vm);

void log_write(enum log_level level, const char *msg, const char *fields_fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define LOG_QUOTE_MAX 256
/* `text` as a quoted logfmt value in `out`; control characters escaped, cut at the size. Returns out. */
const char *log_quote(const char *text, char out[LOG_QUOTE_MAX]);
#define log_q(text) log_quote(text, (char[LOG_QUOTE_MAX]){0})

#define log_error(msg, ...) log_write(LOG_LEVEL_ERROR, msg, "" __VA_ARGS__)
#define log_warn(msg, ...) log_write(LOG_LEVEL_WARN, msg, "" __VA_ARGS__)
#define log_info(msg, ...) log_write(LOG_LEVEL_INFO, msg, "" __VA_ARGS__)
#define log_debug(msg, ...) log_write(LOG_LEVEL_DEBUG, msg, "" __VA_ARGS__)

#endif
