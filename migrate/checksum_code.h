/* SPDX-License-Identifier: Apache-2.0 */
/* The code of migrate/checksum.h, for a file that says for which CPU it is compiled and how it is called. */
#include "migrate/checksum.h"

static uint64_t pieces(const struct iovec *iov, int n)
{
    XXH3_state_t state;
    if (n == 1)
        return XXH3_64bits(iov->iov_base, iov->iov_len);
    XXH3_64bits_reset(&state);
    for (int i = 0; i < n; i++)
        XXH3_64bits_update(&state, iov[i].iov_base, iov[i].iov_len);
    return XXH3_64bits_digest(&state);
}

static XXH128_hash_t sum128(const void *data, size_t len)
{
    return XXH3_128bits(data, len);
}

const struct checksum_ops CHECKSUM_NAME = {pieces, sum128};
