/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/fields.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
}

bool vm_name_is_valid(const char *name)
{
    size_t n = 0;
    while (n <= VM_NAME_MAX && is_name_char(name[n]))
        n++;
    return n >= 1 && n <= VM_NAME_MAX && !name[n] && name[0] != '-' && name[0] != '.';
}

int vm_name_check(const char *name, struct vm_error **err)
{
    if (vm_name_is_valid(name))
        return 0;
    return error_set(err, VM_ERROR_USAGE,
                     "not a VM name: 1 to %d of A-Z a-z 0-9 . _ -, not beginning with . or -",
                     VM_NAME_MAX);
}

static int bad_endpoint(struct vm_error **err)
{
    return error_set(err, VM_ERROR_USAGE,
                     "not an address: HOST, HOST:PORT or [IPV6]:PORT expected");
}

static bool parse_port(const char *text, uint16_t *ret_port)
{
    unsigned long port = 0;
    if (!*text || strlen(text) > 5)
        return false;
    for (const char *p = text; *p; p++) {
        if (*p < '0' || *p > '9')
            return false;
        port = port * 10 + (unsigned long)(*p - '0');
    }
    if (port < 1 || port > UINT16_MAX)
        return false;
    *ret_port = (uint16_t)port;
    return true;
}

/* Letters of host names, IPv4 and IPv6 addresses, a zone behind '%'. */
static bool host_chars_ok(const char *host, size_t n)
{
    if (!n || n > ENDPOINT_HOST_MAX || host[0] == '-' || host[0] == '.')
        return false;
    for (size_t i = 0; i < n; i++)
        if (!is_name_char(host[i]) && host[i] != ':' && host[i] != '%')
            return false;
    return true;
}

int endpoint_parse(const char *text, uint16_t default_port, struct endpoint *ret_endpoint,
                   struct vm_error **err)
{
    struct endpoint e = {.port = default_port};
    const char *host = text, *port = NULL;
    size_t n = strlen(text);
    if (*text == '[') {
        const char *close = strchr(text, ']');
        if (!close || (close[1] && close[1] != ':'))
            return bad_endpoint(err);
        host = text + 1;
        n = (size_t)(close - host);
        port = close[1] ? close + 2 : NULL;
        if (!memchr(host, ':', n))
            return bad_endpoint(err);
    } else {
        const char *colon = strchr(text, ':');
        /* Two colons and no brackets: an IPv6 address without a port. */
        if (colon && colon == strrchr(text, ':')) {
            n = (size_t)(colon - text);
            port = colon + 1;
        }
    }
    if (!host_chars_ok(host, n) || (port && !parse_port(port, &e.port)))
        return bad_endpoint(err);
    memcpy(e.host, host, n);
    *ret_endpoint = e;
    return 0;
}

const char *endpoint_format(const struct endpoint *e, char out[ENDPOINT_TEXT_MAX + 1])
{
    bool v6 = strchr(e->host, ':');
    snprintf(out, ENDPOINT_TEXT_MAX + 1, v6 ? "[%s]:%u" : "%s:%u", e->host, e->port);
    return out;
}

/* Bytes of the UTF-8 sequence at p, or 0: malformed, over-long, a surrogate, or a control
 * character. */
static size_t utf8_length(const unsigned char *p)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (p[0] < 0x80)
        return p[0] >= 0x20 && p[0] != 0x7f;
    size_t n = p[0] >= 0xf8 ? 0 : p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : p[0] >= 0xc0 ? 2 : 0;
    if (!n)
        return 0;
    uint32_t c = p[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0;
        c = c << 6 | (p[i] & 0x3f);
    }
    bool control = c < 0xa0 || (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
    return c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) || control ? 0 : n;
}

int field_check_text(const char *what, const char *text, size_t min, size_t max,
                     struct vm_error **err)
{
    size_t len = strnlen(text, max + 1);
    if (len < min)
        return error_set(err, VM_ERROR_PROTOCOL, "%s is missing", what);
    if (len > max)
        return error_set(err, VM_ERROR_PROTOCOL, "%s is longer than %zu bytes", what, max);
    for (size_t i = 0; i < len;) {
        size_t n = utf8_length((const unsigned char *)text + i);
        if (!n)
            return error_set(err, VM_ERROR_PROTOCOL, "%s is not printable UTF-8", what);
        i += n;
    }
    return 0;
}

void field_make_text(char *text, size_t max)
{
    size_t i = 0;
    while (text[i]) {
        size_t n = utf8_length((const unsigned char *)text + i);
        if (i + (n ? n : 1) > max)
            break;
        if (!n)
            text[i] = '?';
        i += n ? n : 1;
    }
    text[i] = 0;
}

int field_check_path(const char *what, const char *path, struct vm_error **err)
{
    if (*path != '/')
        return error_set(err, VM_ERROR_PROTOCOL, "%s is not an absolute path", what);
    if (strnlen(path, FIELD_PATH_MAX + 1) > FIELD_PATH_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "%s is longer than %d bytes", what,
                         FIELD_PATH_MAX);
    if (strchr(path, '\n'))
        return error_set(err, VM_ERROR_PROTOCOL, "%s contains a line break", what);
    return 0;
}

int field_check_argv(const char *what, char *const *argv, size_t n, struct vm_error **err)
{
    size_t bytes = 0;
    if (!n || !*argv[0])
        return error_set(err, VM_ERROR_PROTOCOL, "%s is missing", what);
    if (n > FIELD_ARGV_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "%s has more than %d arguments", what,
                         FIELD_ARGV_MAX);
    for (size_t i = 0; i < n && bytes <= FIELD_ARGV_BYTES; i++)
        bytes += strnlen(argv[i], FIELD_ARGV_BYTES + 1) + 1;
    if (bytes > FIELD_ARGV_BYTES)
        return error_set(err, VM_ERROR_PROTOCOL, "%s is longer than %d bytes", what,
                         FIELD_ARGV_BYTES);
    return 0;
}

int field_check_uuid(const char *what, const void *data, size_t len, struct vm_error **err)
{
    if (!data || len != 16)
        return error_set(err, VM_ERROR_PROTOCOL, "%s is not 16 bytes", what);
    return 0;
}
