/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pack_writer: new records become packs: compressed by the workers, laid out in order, stored by
 * threads of its own, and once they are durable entered into the index: those of several packs at
 * once, the last ones in pack_writer_finish.
 *
 *     emit records (one thread, the one that owns the footer cache)
 *     pack_writer_wait_laid     where a record is: offset and length in its footer
 *     pack_writer_finish        all packs are durable
 *
 * A pack is closed when its records have 4 to 6 MiB. At most PACKS_IN_FLIGHT packs are open or being
 * stored, and at most RECORDS_IN_FLIGHT records wait for compression: emit waits. Memory: 6 MiB and
 * the footer per pack, on rados one pack more (while librados copies it), and 64 KiB per record.
 *
 * Errors: the first is kept in `failure`; emit and the waits return it from then on.
 */
#ifndef VMMIG_REPO_PACK_WRITER_H
#define VMMIG_REPO_PACK_WRITER_H

#include "base/uuid.h"
#include "repo/footer_cache.h"
#include "repo/index.h"
#include "repo/workers.h"

struct pack_writer;

struct pack_writer_setup {
    struct store *store;
    struct index *index;
    struct footer_cache *cache;
    struct workers *workers;
    struct failure *failure;
    struct uuid repository;
    uint64_t writer; /* its number: the packs' numbers begin with it */
};

struct pack_writer *pack_writer_create(const struct pack_writer_setup *setup,
                                       struct vm_error **err);
/* Also in mid-work: ends the threads; packs that are not stored by then never are. */
void pack_writer_destroy(struct pack_writer *pw);
DEFINE_CLEANUP(pack_writer, struct pack_writer *, pack_writer_destroy)

/*
 * A record to fill: memory for sixteen pages. Waits while too many are in flight; NULL on failure.
 */
uint8_t *pack_writer_page_memory(struct pack_writer *pw, struct vm_error **err);
void pack_writer_return_memory(struct pack_writer *pw, uint8_t *pages);

struct record_place {
    struct cached_footer *footer;
    uint32_t record;
};

/* Is the next record the last one that the pack being filled is sure to take, or is it full? */
bool pack_writer_is_last(struct pack_writer *pw);
/*
 * Hand over a record: `pages` from pack_writer_page_memory with n pages, their identities, and for
 * an extent that is stored whole its mask and identity (0 and NULL otherwise).
 */
int pack_writer_emit(struct pack_writer *pw, uint8_t *pages, const struct page_id *ids, unsigned n,
                     uint16_t mask, const struct page_id *extent, struct record_place *ret_place,
                     struct vm_error **err);

static inline bool record_is_laid(const struct cached_footer *f, uint32_t record)
{
    return record < f->n_laid;
}
/* Until the record has its offset and length, which is soon: it waits for compression alone. */
int pack_writer_wait_laid(struct pack_writer *pw, const struct cached_footer *f, uint32_t record,
                          struct vm_error **err);
/* No more records: the last pack is stored as soon as all of its are laid out. */
void pack_writer_close(struct pack_writer *pw);
/* pack_writer_close, and wait until all packs are durable and indexed. */
int pack_writer_finish(struct pack_writer *pw, struct vm_error **err);

struct pack_writer_stat {
    uint64_t packs, records, pages, bytes; /* stored; bytes with headers and footers */
};
void pack_writer_stat(struct pack_writer *pw, struct pack_writer_stat *ret_stat);

#endif
