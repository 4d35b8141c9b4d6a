/* SPDX-License-Identifier: Apache-2.0 */
/* After FIPS 180-4; the names of what is not ours are its. */
#include "repo/sha256_pair.h"

#include <stdlib.h>

#ifdef __x86_64__

#include "base/bytes.h"

#include <cpuid.h>
#include <immintrin.h>

enum { BLOCK = 64, ROUNDS = 64, CPUID_SSE41 = 1 << 19, CPUID_SHA = 1 << 29 };

#define TARGET __attribute__((target("sha,sse4.1")))
#define INLINE TARGET static inline __attribute__((always_inline))

static const uint32_t K[ROUNDS] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* What follows the 4096 bytes of a page: a one, zeros, the length in bits. */
static const uint8_t padding[BLOCK] = {[0] = 0x80, [BLOCK - 2] = PAGE_BYTES * 8 >> 8};

/* One of the two messages: its state, in the order that the instructions want, and W of sixteen rounds. */
struct message {
    __m128i abef, cdgh, w[4];
};

INLINE void load_block(struct message *m, const uint8_t *block)
{
    const __m128i big_endian =
        _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    for (int i = 0; i < 4; i++)
        m->w[i] =
            _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(block + 16 * i)), big_endian);
}

/* Four rounds, by w[i]; with `more` it becomes W of the four that are sixteen rounds later. */
INLINE void four_rounds(struct message *m, const uint32_t *k, int i, bool more)
{
    __m128i *w = m->w;
    __m128i wk = _mm_add_epi32(w[i], _mm_load_si128((const __m128i *)(k + 4 * i)));
    m->cdgh = _mm_sha256rnds2_epu32(m->cdgh, m->abef, wk);
    m->abef = _mm_sha256rnds2_epu32(m->abef, m->cdgh, _mm_shuffle_epi32(wk, 0x0e));
    if (!more)
        return;
    __m128i next = w[(i + 1) % 4], after = w[(i + 2) % 4], last = w[(i + 3) % 4];
    __m128i sum =
        _mm_add_epi32(_mm_sha256msg1_epu32(w[i], next), _mm_alignr_epi8(last, after, 4));
    w[i] = _mm_sha256msg2_epu32(sum, last);
}

/* As their rounds do not depend on each other the processor has those of both at work. */
INLINE void sixteen_rounds(struct message *a, struct message *b, const uint32_t *k, bool more)
{
    four_rounds(a, k, 0, more);
    four_rounds(b, k, 0, more);
    four_rounds(a, k, 1, more);
    four_rounds(b, k, 1, more);
    four_rounds(a, k, 2, more);
    four_rounds(b, k, 2, more);
    four_rounds(a, k, 3, more);
    four_rounds(b, k, 3, more);
}

INLINE void add_blocks(struct message *a, const uint8_t *from_a, struct message *b,
                       const uint8_t *from_b)
{
    const struct message was_a = *a, was_b = *b;
    load_block(a, from_a);
    load_block(b, from_b);
    for (int i = 0; i < ROUNDS - 16; i += 16)
        sixteen_rounds(a, b, K + i, true);
    sixteen_rounds(a, b, K + ROUNDS - 16, false);
    a->abef = _mm_add_epi32(a->abef, was_a.abef);
    a->cdgh = _mm_add_epi32(a->cdgh, was_a.cdgh);
    b->abef = _mm_add_epi32(b->abef, was_b.abef);
    b->cdgh = _mm_add_epi32(b->cdgh, was_b.cdgh);
}

TARGET static void write_id(const struct message *m, struct page_id *ret_id)
{
    uint32_t feba[4], hgdc[4];
    _mm_storeu_si128((__m128i *)feba, m->abef);
    _mm_storeu_si128((__m128i *)hgdc, m->cdgh);
    const uint32_t h[8] = {feba[3], feba[2], hgdc[3], hgdc[2], feba[1], feba[0], hgdc[1], hgdc[0]};
    for (int i = 0; i < 8; i++)
        put_be32(ret_id->bytes + 4 * i, h[i]);
}

TARGET void sha256_pair(const void *a, const void *b, struct page_id *ret_a, struct page_id *ret_b)
{
    const uint8_t *from_a = a, *from_b = b;
    struct message ma = {_mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c),
                         _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19)};
    struct message mb = ma;
    for (size_t i = 0; i < PAGE_BYTES; i += BLOCK)
        add_blocks(&ma, from_a + i, &mb, from_b + i);
    add_blocks(&ma, padding, &mb, padding);
    write_id(&ma, ret_a);
    write_id(&mb, ret_b);
}

bool sha256_pair_is_there(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & CPUID_SSE41))
        return false;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & CPUID_SHA);
}

#else

bool sha256_pair_is_there(void)
{
    return false;
}

void sha256_pair(const void *a, const void *b, struct page_id *ret_a, struct page_id *ret_b)
{
    abort();
}

#endif
