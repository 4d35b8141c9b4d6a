/* SPDX-License-Identifier: Apache-2.0 */
/*
 * certs: the credentials of two clusters in a folder of their own, and peers that speak TLS as no
 * vmmig agent would. Made once per test program.
 */
#ifndef VMMIG_TESTS_CHANNEL_CERTS_H
#define VMMIG_TESTS_CHANNEL_CERTS_H

#include "migrate/conn.h"

#include <stdbool.h>

/* Where certs_setup put it: cluster a has hosts localhost (and 127.0.0.1, ::1) and elsewhere. */
extern char certs_dir[64];

int certs_setup(void **state);
int certs_teardown(void **state);

/* A context of the host's credentials, trusting the CA of `ca_cluster`. "a", "b". */
struct conn_context *certs_context(const char *ca_cluster, const char *cluster, const char *host);
/* Replace the validity of a host's certificate: it ended yesterday, or begins tomorrow. */
void certs_make_expired(const char *cluster, const char *host);
void certs_make_early(const char *cluster, const char *host);

/*
 * One handshake over fd as a stranger: TLS 1.2 only, or 1.3; with cluster a's credentials of
 * `host`, or none (NULL). Returns whether it was completed; fd is closed.
 */
bool certs_stranger(int fd, bool dial, int tls_minor, const char *host);

#endif
