/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fields: what the validators of all messages, the configuration and the command line agree on:
 * names of VMs, host addresses, text that is shown. Pure functions; any thread.
 */
#ifndef VMMIG_PROTO_FIELDS_H
#define VMMIG_PROTO_FIELDS_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VM_NAME_MAX 64      /* bytes, without the NUL */
#define ENDPOINT_HOST_MAX 253
#define ENDPOINT_TEXT_MAX (ENDPOINT_HOST_MAX + 8) /* [host]:port, without the NUL */
#define DEFAULT_PEER_PORT 16550
#define FIELD_PATH_MAX 4095
#define FIELD_ARGV_MAX 4096         /* arguments */
#define FIELD_ARGV_BYTES (512 << 10) /* of all of them together */

/* A VM's name: [A-Za-z0-9._-]{1,64}, not beginning with '-' or '.'. So it is also a file name. */
bool vm_name_is_valid(const char *name);
int vm_name_check(const char *name, struct vm_error **err); /* USAGE, with the rule */

/* Where an agent listens or is dialled. */
struct endpoint {
    char host[ENDPOINT_HOST_MAX + 1]; /* name or address, without brackets */
    uint16_t port;
};

/* HOST, HOST:PORT, [V6], [V6]:PORT, or a bare V6 address. USAGE if it is none of these. */
int endpoint_parse(const char *text, uint16_t default_port, struct endpoint *ret_endpoint,
                   struct vm_error **err);
/* The text again, with port, brackets around a V6 address, in `out`; returns out. */
const char *endpoint_format(const struct endpoint *e, char out[ENDPOINT_TEXT_MAX + 1]);
#define endpoint_text(e) endpoint_format(e, (char[ENDPOINT_TEXT_MAX + 1]){0})

/*
 * Text of min to max bytes, valid UTF-8, without control characters. `what` names the field in the
 * error (PROTOCOL: what a peer sends; callers that read user input change the kind to USAGE).
 */
int field_check_text(const char *what, const char *text, size_t min, size_t max,
                     struct vm_error **err);
/* Make `text` pass field_check_text: what is not printable becomes '?', what is beyond max is cut
 * off. */
void field_make_text(char *text, size_t max);
/* An absolute path of at most FIELD_PATH_MAX bytes; any bytes but NUL and newline. */
int field_check_path(const char *what, const char *path, struct vm_error **err);
/*
 * 1 to FIELD_ARGV_MAX arguments, FIELD_ARGV_BYTES together, the first an absolute path or a name.
 */
int field_check_argv(const char *what, char *const *argv, size_t n, struct vm_error **err);
int field_check_uuid(const char *what, const void *data, size_t len, struct vm_error **err);

#endif
