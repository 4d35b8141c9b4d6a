/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/page.h"
#include "repo/sha256_pair.h"

#include <openssl/evp.h>

int page_hasher_init(struct page_hasher *h, struct vm_error **err)
{
    h->context = EVP_MD_CTX_new();
    h->digest = EVP_MD_fetch(NULL, "SHA256", NULL);
    h->in_pairs = sha256_pair_is_there();
    if (h->context && h->digest)
        return 0;
    page_hasher_finish(h);
    return error_set(err, VM_ERROR_SYSTEM, "OpenSSL offers no SHA-256");
}

void page_hasher_finish(struct page_hasher *h)
{
    EVP_MD_CTX_free(h->context);
    EVP_MD_free(h->digest);
    *h = (struct page_hasher){0};
}

int page_hasher_hash(struct page_hasher *h, const void *data, size_t n, struct page_id *ret_id,
                     struct vm_error **err)
{
    if (EVP_DigestInit_ex2(h->context, h->digest, NULL) &&
        EVP_DigestUpdate(h->context, data, n) &&
        EVP_DigestFinal_ex(h->context, ret_id->bytes, NULL))
        return 0;
    return error_set(err, VM_ERROR_SYSTEM, "OpenSSL failed to hash");
}

int page_hasher_pages(struct page_hasher *h, const void *pages, unsigned n, struct page_id *ret_ids,
                      struct vm_error **err)
{
    const uint8_t *page = pages;
    unsigned i = 0;
    for (; h->in_pairs && i + 2 <= n; i += 2, page += 2 * PAGE_BYTES)
        sha256_pair(page, page + PAGE_BYTES, &ret_ids[i], &ret_ids[i + 1]);
    for (; i < n; i++, page += PAGE_BYTES)
        if (page_hasher_hash(h, page, PAGE_BYTES, &ret_ids[i], err) < 0)
            return -1;
    return 0;
}

int page_hasher_extent(struct page_hasher *h, const struct page_id *ids, uint16_t mask,
                       struct page_id *ret_id, struct vm_error **err)
{
    struct page_id all[EXTENT_PAGES];
    memset(all, 0, sizeof(all));
    for (int i = 0; i < EXTENT_PAGES; i++)
        if (mask & 1u << i)
            all[i] = *ids++;
    return page_hasher_hash(h, all, sizeof(all), ret_id, err);
}
