/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source half of the attach driver: one thread that walks through the dirty bitmap, round by round.
 *
 * Why the last write to every page is followed by a copy of it:
 *
 *   No bit is ever nowhere. HARVEST moves bits from KVM's log into the shared bitmap, `take_bitmap` adds them
 *   to `todo`, and CLEAR takes them out of the shared bitmap only for the piece that is given out next. The VMM
 *   writes the bitmap before it answers, and the answer comes through a socket: the words are read after it.
 *   A vCPU's write. A page is write protected again (by CLEAR; the ring and plain drivers do so while they
 *   harvest, before they report it) before it is read: a write that the copy missed faults, is logged, and
 *   is in the next harvest. One that came before the protection is in the copy.
 *   A device's write is marked after it was done, so a copy that missed it is older than the mark, and the mark,
 *   unless it is in this harvest already, is in the next.
 *   A hole is looked for after CLEAR, and anew for each piece: what the guest puts there later is logged.
 *   A copy that was torn by a write is a copy that missed that write.
 *   Private memory is copied through the VMM's own page tables, as its vCPUs see it, when a batch is full: still
 *   after the CLEAR of each of its pages.
 *   Before the pause all of this may be repeated without end; PAUSE is answered when no vCPU runs, no device
 *   writes and every mark is made, `paused` is set after that, and the harvest of copy_rest begins after it.
 *   What `todo` still holds of the round that the pause broke off is given out with it.
 *   Saving the state writes memory (a VMM's marks; KVM itself, when it puts a vCPU away): SAVED comes after
 *   those writes, and one more harvest after SAVED.
 *
 * A test breaks each of these rules and sees that pages are lost (tests/flow/attach/test_vmm.py).
 */
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/attach_private.h"
#include "vmm/attach_reader.h"
#include "vmm/attach_steering.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

enum { CHANNELS_MAX = 64, STATE_CHUNK = 256 << 10 };

#define PIECE_PAGES (ATTACH_PIECE / GUEST_PAGE_SIZE)

struct source_region {
    const struct attach_region *memory;
    unsigned number;      /* for page addresses: the engine's */
    uint64_t *todo;       /* harvested, and not given out yet: our own copy */
    uint64_t *worked;     /* written at least once since the first round */
};

struct attach_source {
    struct attach *attach;
    struct attach_memory_map memory;
    struct attach_reader *reader; /* of private memory; NULL: there is none */
    struct source_region regions[ATTACH_SLOTS_MAX];
    unsigned channels;
    const struct guest_source_events *events;
    void *arg;
    struct page_batch *open[CHANNELS_MAX]; /* being filled */
    const struct attach_region *open_from[CHANNELS_MAX]; /* whose pages those are */
    unsigned round;
    struct attach_steering steering;
    uint64_t sent_in_round;
    int64_t round_started_ns;
    int64_t rtt_ns; /* of the link, as far as it is known */
    bool tracks, complete;
    pthread_t thread;
    bool thread_started;
    int stop_fd; /* latch: `stop` is set */

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    bool stop, paused;
    struct guest_source_progress progress;
};

enum walk { WALK_FAILED = -1, WALK_DONE = 0, WALK_PAUSED = 1 };

static uint64_t words_of(const struct attach_region *r)
{
    return (r->pages + 63) / 64;
}

static bool is_paused(struct attach_source *s)
{
    SCOPE_LOCK(&s->lock);
    return s->paused;
}

static int check_stop(struct attach_source *s, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    return s->stop ? error_set(err, VM_ERROR_CANCELLED, "the copy was stopped") : 0;
}

/* ---- Batches ---- */

/* Of private memory, which cannot be mapped here: with room for copies of its pages, whose place is `data`. */
struct copied_batch {
    struct page_batch batch; /* first */
    uint8_t bytes[PAGE_BATCH_MAX * GUEST_PAGE_SIZE];
};

static void release_batch(struct page_batch *batch)
{
    free(batch);
}

static struct page_batch *make_batch(const struct attach_region *r, unsigned channel, struct vm_error **err)
{
    struct page_batch *batch = malloc(r->region.base ? sizeof(*batch) : sizeof(struct copied_batch));
    if (!batch) {
        error_nomem(err);
        return NULL;
    }
    atomic_init(&batch->refs, 1);
    batch->release = release_batch;
    batch->channel = channel;
    batch->n = 0;
    batch->file = r->region.base ? r->fd : 0;
    batch->file_offset = r->offset;
    batch->file_start = r->region.base;
    return batch;
}

/* Pages that follow one another are read at once. */
static int copy_pages(struct attach_source *s, struct page_batch *batch, const struct attach_region *r,
                      struct vm_error **err)
{
    struct copied_batch *copied = (struct copied_batch *)(void *)batch;
    struct attach_stretch stretches[PAGE_BATCH_MAX];
    unsigned n = 0;
    for (unsigned i = 0; i < batch->n; i++) {
        if (i && batch->pages[i].addr == batch->pages[i - 1].addr + 1)
            stretches[n - 1].size += GUEST_PAGE_SIZE;
        else
            stretches[n++] = (struct attach_stretch){
                r->offset + page_addr_number(batch->pages[i].addr) * GUEST_PAGE_SIZE, GUEST_PAGE_SIZE};
    }
    return attach_reader_read(s->reader, stretches, n, copied->bytes, s->stop_fd, err);
}

static int flush(struct attach_source *s, unsigned channel, struct vm_error **err)
{
    struct page_batch *batch = steal_ptr(&s->open[channel]);
    const struct attach_region *from = s->open_from[channel];
    if (!batch)
        return 0;
    if (!from->region.base && copy_pages(s, batch, from, err) < 0) {
        page_batch_unref(batch);
        return -1;
    }
    return s->events->pages(s->arg, batch, err);
}

static int flush_all(struct attach_source *s, struct vm_error **err)
{
    for (unsigned i = 0; i < s->channels; i++)
        if (flush(s, i, err) < 0)
            return -1;
    return 0;
}

/* Bounded by the engine's queues: it takes a batch only when it has room. */
static int add_page(struct attach_source *s, const struct attach_region *r, uint64_t addr,
                    const uint8_t *data, struct vm_error **err)
{
    unsigned channel = page_stripe_channel(addr, s->channels);
    if (s->open[channel] && s->open_from[channel] != r && flush(s, channel, err) < 0)
        return -1;
    struct page_batch *batch = s->open[channel];
    if (!batch) {
        batch = s->open[channel] = make_batch(r, channel, err);
        if (!batch)
            return -1;
        s->open_from[channel] = r;
    }
    if (!r->region.base)
        data = ((struct copied_batch *)(void *)batch)->bytes + (size_t)batch->n * GUEST_PAGE_SIZE;
    batch->pages[batch->n++] = (struct page_ref){addr, data};
    return batch->n == PAGE_BATCH_MAX ? flush(s, channel, err) : 0;
}

/* ---- Walking through a piece ---- */

static int clear(struct attach_source *s, const struct source_region *r, uint64_t first, uint64_t n,
                 struct vm_error **err)
{
    Vmmig__Attach__Clear m = VMMIG__ATTACH__CLEAR__INIT;
    m.slot = (uint32_t)(r->memory - s->memory.regions);
    m.first = first;
    m.pages = n;
    return attach_order(&s->attach->client, VMMIG__ATTACH__TYPE__CLEAR, &m.base, err);
}

static uint64_t count_bits(const uint64_t *words, uint64_t n)
{
    uint64_t bits = 0;
    for (uint64_t i = 0; i < n; i++)
        bits += (uint64_t)__builtin_popcountll(words[i]);
    return bits;
}

/* Give out the pages of one word of the bitmap. */
static int give_word(struct attach_source *s, const struct source_region *r, uint64_t word,
                     struct attach_holes *holes, uint64_t *zero, struct vm_error **err)
{
    uint64_t bits = r->todo[word];
    r->todo[word] = 0;
    while (bits) {
        uint64_t page = word * 64 + (unsigned)__builtin_ctzll(bits);
        const uint8_t *base = r->memory->region.base; /* NULL: private */
        const uint8_t *data = base ? base + page * GUEST_PAGE_SIZE : NULL;
        bits &= bits - 1;
        if (holes && !attach_holes_has(holes, page)) {
            data = NULL;
            ++*zero;
        }
        if (add_page(s, r->memory, page_addr(r->number, page), data, err) < 0)
            return -1;
    }
    return 0;
}

/* For a test's fault: a run of the piece gets lost. */
static void lose_run(const struct source_region *r, uint64_t start, uint64_t words)
{
    while (words && !r->todo[start + words - 1])
        words--;
    while (words && r->todo[start + words - 1])
        r->todo[start + --words] = 0;
}

/* Clear, and then copy. `holes` in the first pass only: what the guest wrote since is no hole. */
static int give_piece(struct attach_source *s, const struct source_region *r, uint64_t first,
                      uint64_t n, struct attach_holes *holes, struct vm_error **err)
{
    uint64_t words = (n + 63) / 64, start = first / 64, zero = 0;
    uint64_t pages = count_bits(r->todo + start, words);
    if (!pages)
        return 0;
    bool late = FAULT("attach.clear") == FAULT_DROP;
    if (check_stop(s, err) < 0 || (!late && clear(s, r, first, n, err) < 0))
        return -1;
    if (holes)
        attach_holes_renew(holes, first);
    if ((is_paused(s) ? FAULT("attach.paused.run") : FAULT("attach.live.run")) == FAULT_DROP)
        lose_run(r, start, words);
    for (uint64_t i = 0; i < words; i++)
        if (give_word(s, r, start + i, holes, &zero, err) < 0)
            return -1;
    if (late && clear(s, r, first, n, err) < 0)
        return -1;
    s->sent_in_round += pages;
    SCOPE_LOCK(&s->lock);
    s->progress.remaining -= pages * GUEST_PAGE_SIZE;
    s->progress.zero_pages += zero;
    s->progress.bytes_out += (pages - zero) * GUEST_PAGE_SIZE;
    return 0;
}

static enum walk give_region(struct attach_source *s, const struct source_region *r, bool to_the_end,
                             struct vm_error **err)
{
    struct attach_holes holes = {0};
    bool looks = s->round == 1 && r->memory->region.base; /* of private memory nobody can say */
    if (looks && attach_holes_init(&holes, r->memory, err) < 0)
        return WALK_FAILED;
    enum walk result = WALK_DONE;
    for (uint64_t first = 0; first < r->memory->pages && result == WALK_DONE; first += PIECE_PAGES) {
        uint64_t left = r->memory->pages - first;
        if (!to_the_end && is_paused(s))
            result = WALK_PAUSED;
        else if (give_piece(s, r, first, left < PIECE_PAGES ? left : PIECE_PAGES,
                            holes.region ? &holes : NULL, err) < 0)
            result = WALK_FAILED;
    }
    attach_holes_finish(&holes);
    return result;
}

/* All that is to be done, or, unless to_the_end, until the engine has paused the guest. */
static enum walk give_all(struct attach_source *s, bool to_the_end, struct vm_error **err)
{
    for (unsigned i = 0; i < s->memory.n; i++) {
        enum walk w = give_region(s, &s->regions[i], to_the_end, err);
        if (w == WALK_FAILED)
            return WALK_FAILED;
        if (w == WALK_PAUSED)
            return flush_all(s, err) < 0 ? WALK_FAILED : WALK_PAUSED;
    }
    return flush_all(s, err) < 0 ? WALK_FAILED : WALK_DONE;
}

/* ---- Harvest ---- */

/* The VMM may write the shared bitmap at any time: each word is read once, and only bits of pages count. */
static uint64_t take_bitmap(struct source_region *r, bool first_round)
{
    const struct attach_region *m = r->memory;
    uint64_t words = words_of(m), found = 0;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t bits = __atomic_load_n(&m->dirty[i], __ATOMIC_RELAXED);
        if (i == words - 1 && m->pages % 64)
            bits &= (1ULL << (m->pages % 64)) - 1;
        if (!first_round) /* that one is everything */
            r->worked[i] |= bits;
        r->todo[i] |= bits;
        found += (uint64_t)__builtin_popcountll(r->todo[i]);
    }
    return found;
}

/* What is dirty now joins what was not given out yet. *ret_pages: both. */
static int harvest(struct attach_source *s, uint64_t *ret_pages, struct vm_error **err)
{
    if (attach_request(&s->attach->client, VMMIG__ATTACH__TYPE__HARVEST, NULL, -1,
                       VMMIG__ATTACH__TYPE__HARVESTED, NULL, err) < 0)
        return -1;
    uint64_t pages = 0, worked = 0;
    for (unsigned i = 0; i < s->memory.n; i++) {
        pages += take_bitmap(&s->regions[i], s->round == 0);
        worked += count_bits(s->regions[i].worked, words_of(s->regions[i].memory));
    }
    if (s->round == 0 && pages * GUEST_PAGE_SIZE != s->progress.total)
        return error_set(err, VM_ERROR_PROTOCOL, "the VMM's first harvest is not all of the guest's memory");
    *ret_pages = pages;
    SCOPE_LOCK(&s->lock);
    s->progress.remaining = pages * GUEST_PAGE_SIZE;
    s->progress.working_set = worked * GUEST_PAGE_SIZE;
    return 0;
}

/* ---- Rounds ---- */

static int set_throttle(struct attach_source *s, unsigned percent, struct vm_error **err)
{
    Vmmig__Attach__Throttle m = VMMIG__ATTACH__THROTTLE__INIT;
    m.percent = percent;
    if (attach_order(&s->attach->client, VMMIG__ATTACH__TYPE__THROTTLE, &m.base, err) < 0)
        return -1;
    log_info("throttling the guest", "percent=%u", percent);
    SCOPE_LOCK(&s->lock);
    s->progress.throttle_percent = percent;
    return 0;
}

/* The round that has ended carried sent_in_round pages; as many as `found` were written meanwhile. */
static int steer(struct attach_source *s, uint64_t found, int64_t took_ns, struct vm_error **err)
{
    struct attach_round ended = {
        .number = s->round, .carried = s->sent_in_round, .left = found, .took_ns = took_ns, .rtt_ns = s->rtt_ns};
    unsigned before = s->steering.percent, now = attach_steer(&s->steering, &ended);
    return now == before ? 0 : set_throttle(s, now, err);
}

/* A round takes a while even if it has nothing to do; a pause ends the wait. */
static void wait_a_while(struct attach_source *s)
{
    int64_t due = s->round_started_ns + ATTACH_ROUND_MIN_MS * NSEC_PER_MSEC;
    SCOPE_LOCK(&s->lock);
    while (!s->stop && !s->paused && cond_wait_until(&s->changed, &s->lock, due))
        ;
}

static void announce_round(struct attach_source *s, uint64_t found, int64_t took_ns)
{
    pthread_mutex_lock(&s->lock);
    s->progress.round = s->round;
    if (s->round > 1 && took_ns > 0)
        s->progress.dirty_rate =
            (uint64_t)((double)(found * GUEST_PAGE_SIZE) * 1e9 / (double)took_ns);
    pthread_mutex_unlock(&s->lock);
    if (s->round > 1 && s->events->round)
        s->events->round(s->arg, s->round);
}

static int begin_round(struct attach_source *s, struct vm_error **err)
{
    uint64_t found;
    if (harvest(s, &found, err) < 0)
        return -1;
    int64_t now = clock_mono_ns(), took = now - s->round_started_ns;
    if (steer(s, found, took, err) < 0)
        return -1;
    s->round++;
    s->round_started_ns = now;
    s->sent_in_round = 0;
    announce_round(s, found, took);
    return 0;
}

static int settle(struct attach_source *s, struct vm_error **err)
{
    return s->events->settle && !is_paused(s) ? s->events->settle(s->arg, &s->rtt_ns, err) : 0;
}

/* Round after round until the engine pauses the guest; what is dirty then is still to be done. */
static int copy_live(struct attach_source *s, struct vm_error **err)
{
    while (!is_paused(s)) {
        if (check_stop(s, err) < 0 || begin_round(s, err) < 0 || give_all(s, false, err) == WALK_FAILED ||
            settle(s, err) < 0)
            return -1;
        wait_a_while(s);
    }
    return 0;
}

static int copy_rest(struct attach_source *s, struct vm_error **err)
{
    uint64_t found;
    if (s->round == 0)
        return begin_round(s, err) < 0 ? -1 : (int)give_all(s, true, err);
    return harvest(s, &found, err) < 0 ? -1 : (int)give_all(s, true, err);
}

/* ---- The end ---- */

static int give_state(struct attach_source *s, struct attach_answer *saved, struct vm_error **err)
{
    cleanup_free uint8_t *chunk = malloc(STATE_CHUNK);
    if (!chunk)
        return error_nomem(err);
    uint64_t size = saved->message.saved->size;
    /* Memory, and no file of the VMM's own, which could keep us waiting for ever. */
    if (fcntl(saved->fds[0], F_GET_SEALS) < 0)
        return error_set(err, VM_ERROR_PROTOCOL, "the file with the guest's state is no memfd");
    for (uint64_t at = 0; at < size;) {
        size_t want = size - at < STATE_CHUNK ? (size_t)(size - at) : STATE_CHUNK;
        ssize_t n = pread(saved->fds[0], chunk, want, (off_t)at);
        if (n <= 0)
            return error_set(err, VM_ERROR_PROTOCOL, "the VMM's state is shorter than it said");
        if (s->events->bytes(s->arg, chunk, (size_t)n, err) < 0)
            return -1;
        at += (uint64_t)n;
    }
    return 0;
}

/* The guest stands. Saving its state may write its memory: hence one more pass after it. */
static int finish_copy(struct attach_source *s, struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer saved = {.n_fds = 0};
    if (copy_rest(s, err) < 0 ||
        attach_request(&s->attach->client, VMMIG__ATTACH__TYPE__SAVE, NULL, -1,
                       VMMIG__ATTACH__TYPE__SAVED, &saved, err) < 0)
        return -1;
    if (saved.n_fds != 1)
        return error_set(err, VM_ERROR_PROTOCOL, "the VMM passed no file with the guest's state");
    if ((FAULT("attach.saved.pass") != FAULT_DROP && copy_rest(s, err) < 0) ||
        s->events->memory_done(s->arg, err) < 0)
        return -1;
    return give_state(s, &saved, err);
}

static void *source_main(void *arg)
{
    struct attach_source *s = arg;
    struct vm_error *err = NULL;
    if (copy_live(s, &err) == 0 && finish_copy(s, &err) == 0)
        s->complete = true;
    for (unsigned i = 0; i < s->channels; i++)
        page_batch_unref(steal_ptr(&s->open[i]));
    s->events->done(s->arg, err);
    return NULL;
}

/* ---- Life ---- */

static void destroy(struct attach_source *s)
{
    for (unsigned i = 0; i < ATTACH_SLOTS_MAX; i++) {
        free(s->regions[i].todo);
        free(s->regions[i].worked);
    }
    attach_reader_destroy(s->reader);
    attach_memory_unmap(&s->memory);
    close_fd(&s->stop_fd);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* The engine's regions are the destination's: each slot must be one of them, and the other way round. */
static int match_regions(struct attach_source *s, const struct guest_source_params *p,
                         struct vm_error **err)
{
    for (unsigned i = 0; i < s->memory.n; i++) {
        struct source_region *r = &s->regions[i];
        r->memory = &s->memory.regions[i];
        unsigned k = 0;
        while (k < p->n_regions && strcmp(p->regions[k].name, r->memory->region.name))
            k++;
        if (k == p->n_regions || p->regions[k].size != r->memory->region.size)
            return error_set(err, VM_ERROR_REFUSED,
                             "the destination has no memory like slot %s of %llu bytes",
                             r->memory->region.name, (unsigned long long)r->memory->region.size);
        r->number = k;
        r->todo = calloc(words_of(r->memory), sizeof(uint64_t));
        r->worked = calloc(words_of(r->memory), sizeof(uint64_t));
        if (!r->todo || !r->worked)
            return error_nomem(err);
        s->progress.total += r->memory->region.size;
    }
    return s->memory.n == p->n_regions
               ? 0
               : error_set(err, VM_ERROR_REFUSED, "the destination has %u memory slots, the guest %u",
                           p->n_regions, s->memory.n);
}

/* All of it is one process's. */
static int read_private(struct attach_source *s, struct vm_error **err)
{
    for (unsigned i = 0; i < s->memory.n; i++) {
        const struct attach_region *r = &s->memory.regions[i];
        if (r->region.base)
            continue;
        s->reader = attach_reader_create(s->attach->client.process.pid, r->fd, err);
        return s->reader ? 0 : -1;
    }
    return 0;
}

static int begin(struct attach_source *s, const struct guest_source_params *p, struct vm_error **err)
{
    struct attach_client *client = &s->attach->client;
    Vmmig__Attach__RunState state;
    if (p->channels < 1 || p->channels > CHANNELS_MAX)
        return error_set(err, VM_ERROR_USAGE, "%u channels", p->channels);
    s->stop_fd = io_latch_new(err);
    if (s->stop_fd < 0 || attach_query_state(s->attach, &state, NULL, err) < 0)
        return -1;
    if (state == VMMIG__ATTACH__RUN_STATE__RUN_INCOMING ||
        state == VMMIG__ATTACH__RUN_STATE__RUN_BROKEN)
        return error_set(err, VM_ERROR_REFUSED, "the VMM has no guest that could be sent");
    s->paused = state == VMMIG__ATTACH__RUN_STATE__RUN_PAUSED;
    s->progress.state_bytes = attach_info(s->attach)->state_bytes;
    if (attach_order(client, VMMIG__ATTACH__TYPE__TRACK, NULL, err) < 0)
        return -1;
    s->tracks = true;
    attach_client_pin(client, true);
    /* In this order: slots that change from here on end the tracking. Before, the bitmap would be
     * one that is no more. */
    if (attach_memory_map(&s->memory, client, false, err) < 0 || match_regions(s, p, err) < 0 ||
        read_private(s, err) < 0)
        return -1;
    s->progress.remaining = s->progress.total;
    /* Also a guest that stands already must be held, so that the VMM does not set it going. */
    if (s->paused && attach_order(client, VMMIG__ATTACH__TYPE__PAUSE, NULL, err) < 0)
        return -1;
    s->round_started_ns = clock_mono_ns();
    int failed = pthread_create(&s->thread, NULL, source_main, s);
    s->thread_started = !failed;
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

static int end_tracking(struct attach_source *s, struct vm_error **err)
{
    struct attach *a = s->attach;
    int r = 0;
    if (s->tracks && s->complete)
        atomic_store(&a->tracking_left_on, true);
    else if (s->tracks) /* while pinned: over a new connection there is nothing to end */
        r = attach_order(&a->client, VMMIG__ATTACH__TYPE__UNTRACK, NULL, err);
    s->tracks = false;
    attach_client_pin(&a->client, false);
    return r;
}

int attach_source_start(struct guest *g, const struct guest_source_params *params,
                        const struct guest_source_events *events, void *arg, struct vm_error **err)
{
    struct attach *a = attach_from_guest(g);
    struct attach_source *s = calloc(1, sizeof(*s));
    if (!s)
        return error_nomem(err);
    s->attach = a;
    s->stop_fd = -1;
    s->channels = params->channels;
    s->steering.limit_ns = params->downtime_limit_ns;
    s->events = events;
    s->arg = arg;
    pthread_mutex_init(&s->lock, NULL);
    cond_init(&s->changed);
    attach_source_release(a);
    if (atomic_exchange(&a->tracking_left_on, false))
        attach_order(&a->client, VMMIG__ATTACH__TYPE__UNTRACK, NULL, NULL);
    pthread_mutex_lock(&a->lock);
    bool busy = a->source != NULL;
    a->source = busy ? a->source : s;
    pthread_mutex_unlock(&a->lock);
    if (busy) {
        destroy(s);
        return error_set(err, VM_ERROR_CONFLICT, "this VM is being copied already");
    }
    if (begin(s, params, err) == 0)
        return 0;
    attach_source_stop(g, NULL);
    return -1;
}

int attach_source_progress(struct guest *g, struct guest_source_progress *ret_progress,
                           struct vm_error **err)
{
    struct attach *a = attach_from_guest(g);
    SCOPE_LOCK(&a->lock);
    if (!a->source)
        return error_set(err, VM_ERROR_USAGE, "this VM is not being copied");
    pthread_mutex_lock(&a->source->lock);
    *ret_progress = a->source->progress;
    pthread_mutex_unlock(&a->source->lock);
    return 0;
}

static void tell(struct attach_source *s, bool *flag)
{
    SCOPE_LOCK(&s->lock);
    if (flag == &s->paused && !s->progress.paused_at_ns)
        s->progress.paused_at_ns = clock_mono_ns();
    *flag = true;
    pthread_cond_broadcast(&s->changed);
}

void attach_source_paused(struct attach *a)
{
    SCOPE_LOCK(&a->lock);
    if (a->source)
        tell(a->source, &a->source->paused);
}

int attach_source_stop(struct guest *g, struct vm_error **err)
{
    struct attach *a = attach_from_guest(g);
    pthread_mutex_lock(&a->lock);
    struct attach_source *s = a->source;
    pthread_mutex_unlock(&a->lock);
    if (!s)
        return 0;
    tell(s, &s->stop);
    if (s->stop_fd >= 0)
        io_latch_set(s->stop_fd);
    if (s->thread_started)
        pthread_join(s->thread, NULL);
    pthread_mutex_lock(&a->lock);
    a->source = NULL;
    pthread_mutex_unlock(&a->lock);
    cleanup_error struct vm_error *failure = NULL;
    /* A VMM that is gone, or an agent's connection: then nothing is tracked either. */
    if (end_tracking(s, &failure) < 0)
        log_info("tracking ends with the connection", "error=%s", log_q(error_message(failure)));
    (void)err;
    if (!s->complete) {
        destroy(s);
        return 0;
    }
    attach_source_release(a);
    SCOPE_LOCK(&a->lock);
    a->spent = s;
    return 0;
}

void attach_source_release(struct attach *a)
{
    pthread_mutex_lock(&a->lock);
    struct attach_source *spent = steal_ptr(&a->spent);
    pthread_mutex_unlock(&a->lock);
    if (spent)
        destroy(spent);
}
