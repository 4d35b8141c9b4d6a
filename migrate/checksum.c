/* SPDX-License-Identifier: Apache-2.0 */
#define XXH_STATIC_LINKING_ONLY /* the state's size */
#define CHECKSUM_NAME checksum_plain
#include "migrate/checksum_code.h"

const struct checksum_ops *checksum_best(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return &checksum_avx2;
#endif
    return &checksum_plain;
}

uint64_t checksum_pieces(const struct iovec *iov, int n)
{
    return checksum_best()->pieces(iov, n);
}

XXH128_hash_t checksum_128(const void *data, size_t len)
{
    return checksum_best()->sum128(data, len);
}
