/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pki: certificates for a new cluster, behind `vmmig pki init DIR`, `vmmig pki issue DIR HOST` and
 * `vmmig pki revoke DIR HOST`.
 *
 * DIR holds ca.crt and ca.key (the key that admits hosts to the cluster: keep it off the hosts),
 * and HOST.crt and HOST.key for each host; ca.crl, once a certificate was revoked. Keys are EC
 * P-256, key files of mode 0600; DIR is made with 0700. Every host's certificate serves both ends
 * of a connection (EKU serverAuth and clientAuth) and names HOST in its SAN, as an IP address if
 * HOST is one.
 *
 * A file that exists is never replaced unless asked: CONFLICT. Writes are durable, the key before
 * its certificate; a crash between the two leaves a key alone, which the next call with
 * `replace` (for a CA: removing the file by hand) gets past.
 *
 * Errors: USAGE (a host name that is none, days out of range), NOT_FOUND (no CA in DIR, no
 * certificate to revoke), CONFLICT, CORRUPT (a CA file that does not parse, or whose key is
 * another's), and those of the file system. Threads: any.
 */
#ifndef VMMIG_TOOLS_PKI_H
#define VMMIG_TOOLS_PKI_H

#include "base/error.h"

#include <stdbool.h>

#define PKI_CA_DAYS 3650
#define PKI_HOST_DAYS 825 /* default; at most PKI_CA_DAYS, and never beyond the CA's own end */

struct pki_host {
    const char *name;        /* DNS name or IP address */
    const char *const *ips;  /* further IP addresses by which the host is dialled */
    unsigned n_ips;
    unsigned days;           /* 0: PKI_HOST_DAYS */
    bool replace;            /* renew: replace HOST.crt and HOST.key */
};

/* Make the CA. */
int pki_init(const char *dir, struct vm_error **err);
/* Issue the certificate and key of a host. */
int pki_issue(const char *dir, const struct pki_host *host, struct vm_error **err);
/*
 * Add HOST.crt of DIR to the list of revoked certificates, DIR/ca.crl, which is made with the first and
 * valid as long as the CA. CONFLICT if it is in there. Certificates that were replaced before are not.
 */
int pki_revoke(const char *dir, const char *host, struct vm_error **err);

#endif
