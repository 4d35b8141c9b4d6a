/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checksum: XXH3 of guest pages and of frames, as fast as this CPU can. The values are those of libxxhash,
 * which distributions build for the oldest CPUs; here the same code is built for newer ones as well, and
 * chosen when the program runs. Measured on one core: 20 GB/s become 57.
 *
 * Functions without state. Threads: any.
 */
#ifndef VMMIG_MIGRATE_CHECKSUM_H
#define VMMIG_MIGRATE_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <xxhash.h>

/* XXH3-64 of the pieces, as if they were one string. */
uint64_t checksum_pieces(const struct iovec *iov, int n);
/* XXH3-128. */
XXH128_hash_t checksum_128(const void *data, size_t len);

/* Each for one kind of CPU; for tests. Only where checksum_has_avx2() may the second be called. */
struct checksum_ops {
    uint64_t (*pieces)(const struct iovec *iov, int n);
    XXH128_hash_t (*sum128)(const void *data, size_t len);
};
extern const struct checksum_ops checksum_plain;
#ifdef __x86_64__
extern const struct checksum_ops checksum_avx2;
#endif
const struct checksum_ops *checksum_best(void);

#endif
