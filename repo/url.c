/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/url.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

enum { URL_MAX = 4096 };

void repo_url_finish(struct repo_url *url)
{
    free(url->path);
    free(url->pool);
    free(url->name_space);
    free(url->conf);
    free(url->id);
    free(url->text);
    *url = (struct repo_url){0};
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)tolower((unsigned char)c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The percent-decoded n bytes at `from`. */
static char *decode(const char *from, size_t n, struct vm_error **err)
{
    char *out = malloc(n + 1);
    if (!out) {
        error_nomem(err);
        return NULL;
    }
    size_t len = 0;
    for (size_t i = 0; i < n; i++) {
        char c = from[i];
        if (c == '%') {
            int high = n - i > 2 ? hex_value(from[i + 1]) : -1;
            int low = high >= 0 ? hex_value(from[i + 2]) : -1;
            if (low < 0 || (high == 0 && low == 0)) {
                free(out);
                error_set(err, VM_ERROR_USAGE, "\"%.*s\" has a bad %% escape", (int)n, from);
                return NULL;
            }
            c = (char)(high * 16 + low);
            i += 2;
        }
        out[len++] = c;
    }
    out[len] = 0;
    return out;
}

static int parse_parameter(struct repo_url *url, const char *p, size_t n, struct vm_error **err)
{
    static const char conf[] = "conf=", id[] = "id=";
    char **field = NULL;
    size_t skip = 0;
    if (n > strlen(conf) && !strncmp(p, conf, strlen(conf))) {
        field = &url->conf;
        skip = strlen(conf);
    } else if (n > strlen(id) && !strncmp(p, id, strlen(id))) {
        field = &url->id;
        skip = strlen(id);
    }
    if (!field)
        return error_set(
            err, VM_ERROR_USAGE,
            "\"%.*s\" is no parameter of a rados: repository; conf=FILE and id=USER are", (int)n,
            p);
    if (*field)
        return error_set(err, VM_ERROR_USAGE, "parameter \"%.*s\" is given twice", (int)skip - 1,
                         p);
    *field = decode(p + skip, n - skip, err);
    return *field ? 0 : -1;
}

static int parse_rados(struct repo_url *url, const char *rest, struct vm_error **err)
{
    size_t names = strcspn(rest, "?");
    size_t pool = strcspn(rest, "/?");
    if (!pool)
        return error_set(err, VM_ERROR_USAGE, "it names no pool; rados:POOL[/NAMESPACE] is meant");
    if (!(url->pool = decode(rest, pool, err)))
        return -1;
    const char *space = rest + pool + (rest[pool] == '/');
    size_t space_len = names - (size_t)(space - rest);
    if (rest[pool] == '/' && !space_len)
        return error_set(err, VM_ERROR_USAGE, "the namespace behind \"/\" is empty");
    if (memchr(space, '/', space_len))
        return error_set(err, VM_ERROR_USAGE, "it has more than POOL/NAMESPACE");
    if (!(url->name_space = decode(space, space_len, err)))
        return -1;
    for (const char *p = rest + names; *p;) {
        p++;
        size_t n = strcspn(p, "&");
        if (parse_parameter(url, p, n, err) < 0)
            return -1;
        p += n;
    }
    if (!url->id && !(url->id = strdup("admin")))
        return error_nomem(err);
    return 0;
}

static int parse_dir(struct repo_url *url, const char *rest, struct vm_error **err)
{
    if (rest[0] != '/')
        return error_set(err, VM_ERROR_USAGE, "the folder must be an absolute path (dir:/PATH)");
    if (rest[strcspn(rest, "?")])
        return error_set(err, VM_ERROR_USAGE, "a dir: repository has no parameters");
    url->path = decode(rest, strlen(rest), err);
    return url->path ? 0 : -1;
}

static int parse(const char *text, struct repo_url *url, struct vm_error **err)
{
    if (strlen(text) > URL_MAX)
        return error_set(err, VM_ERROR_USAGE, "it is longer than %d bytes", URL_MAX);
    if (!(url->text = strdup(text)))
        return error_nomem(err);
    if (!strncmp(text, "dir:", 4)) {
        url->scheme = REPO_URL_DIR;
        return parse_dir(url, text + 4, err);
    }
    if (!strncmp(text, "rados:", 6)) {
        url->scheme = REPO_URL_RADOS;
        return parse_rados(url, text + 6, err);
    }
    return error_set(err, VM_ERROR_USAGE, "it begins with neither dir: nor rados:");
}

int repo_url_parse(const char *text, struct repo_url *ret_url, struct vm_error **err)
{
    struct repo_url url = {0};
    if (parse(text, &url, err) < 0) {
        repo_url_finish(&url);
        return error_wrap(err, "repository URL \"%.200s\"", text);
    }
    *ret_url = url;
    return 0;
}
