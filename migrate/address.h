/* SPDX-License-Identifier: Apache-2.0 */
/*
 * address: from HOST[:PORT] or unix:PATH to a connected or listening socket.
 *
 * Names are resolved in a thread of their own, because the system's resolver knows neither
 * deadlines nor cancelling; one that is given up ends by itself later.
 */
#ifndef VMMIG_MIGRATE_ADDRESS_H
#define VMMIG_MIGRATE_ADDRESS_H

#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

#define ADDRESS_HOST_MAX 256
#define ADDRESS_TEXT_MAX 320 /* "[HOST]:PORT" */

struct address {
    bool is_unix;
    char host[ADDRESS_HOST_MAX]; /* or the path; without brackets */
    char port[6];
};

/* HOST, HOST:PORT, IPv4, IPv6, [IPv6]:PORT, unix:PATH. USAGE if it is none of these. */
int address_parse(const char *text, const char *default_port, struct address *ret_address,
                  struct vm_error **err);
/* A connected, non-blocking stream socket. */
int address_connect(const struct address *a, int64_t deadline_ns, int cancel_fd,
                    struct vm_error **err);
/* A listening, non-blocking one. "::" is every address of the host, whether it has IPv6 or not. */
int address_listen(const struct address *a, struct vm_error **err);
/* Who is at the other end of a socket, for messages. */
void address_of_peer(int fd, char ret_text[ADDRESS_TEXT_MAX]);

#endif
