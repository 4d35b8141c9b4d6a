/* SPDX-License-Identifier: Apache-2.0 */
/* Whichever CPU this is and whichever the peer has: the sums are the same, those of libxxhash. */
#include "migrate/checksum.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { SIZE = 300 << 10 };

static void expect_same(const struct checksum_ops *ops, const uint8_t *data)
{
    static const size_t lengths[] = {0, 1, 16, 17, 128, 129, 240, 241, 1024, 4096, 70001, SIZE};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
        size_t n = lengths[i], first = n / 3, second = n / 5;
        struct iovec pieces[] = {{(void *)(uintptr_t)data, first},
                                 {(void *)(uintptr_t)(data + first), second},
                                 {(void *)(uintptr_t)(data + first + second), n - first - second}};
        struct iovec whole = {(void *)(uintptr_t)data, n};
        assert_true(ops->pieces(pieces, 3) == XXH3_64bits(data, n));
        assert_true(ops->pieces(&whole, 1) == XXH3_64bits(data, n));
        assert_true(XXH128_isEqual(ops->sum128(data, n), XXH3_128bits(data, n)));
    }
    assert_true(ops->pieces(NULL, 0) == XXH3_64bits(NULL, 0));
}

static void every_kind_of_cpu_gives_the_same_sums(void **state)
{
    uint8_t *data = malloc(SIZE);
    (void)state;
    for (size_t i = 0; i < SIZE; i++)
        data[i] = (uint8_t)(i * i >> 3 ^ i);
    expect_same(&checksum_plain, data);
    expect_same(checksum_best(), data);
#ifdef __x86_64__
    assert_true(checksum_best() == (__builtin_cpu_supports("avx2") ? &checksum_avx2 : &checksum_plain));
#endif
    free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_kind_of_cpu_gives_the_same_sums)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
