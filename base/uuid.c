/* SPDX-License-Identifier: Apache-2.0 */
#include "base/uuid.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

struct uuid uuid_new(void)
{
    struct uuid u;
    if (getrandom(u.bytes, sizeof(u.bytes), 0) != sizeof(u.bytes))
        abort();
    u.bytes[6] = (u.bytes[6] & 0x0f) | 0x40;
    u.bytes[8] = (u.bytes[8] & 0x3f) | 0x80;
    return u;
}

static bool dash_before(int byte)
{
    return byte == 4 || byte == 6 || byte == 8 || byte == 10;
}

const char *uuid_format(const struct uuid *u, char out[UUID_TEXT_SIZE])
{
    char *o = out;
    for (int i = 0; i < 16; i++) {
        if (dash_before(i))
            *o++ = '-';
        o += sprintf(o, "%02x", u->bytes[i]);
    }
    return out;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool uuid_parse(const char *text, struct uuid *ret_uuid)
{
    struct uuid u;
    const char *t = text;
    for (int i = 0; i < 16; i++) {
        if (dash_before(i) && *t++ != '-')
            return false;
        int high = hex_digit(t[0]);
        int low = high < 0 ? -1 : hex_digit(t[1]);
        if (low < 0)
            return false;
        u.bytes[i] = (uint8_t)(high << 4 | low);
        t += 2;
    }
    if (*t)
        return false;
    *ret_uuid = u;
    return true;
}
