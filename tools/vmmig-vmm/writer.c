/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <string.h>
#include <time.h>

enum { TICK_US = 1000, CATCH_UP_MS = 100, WORDS = PAGE / 8 };

/* ---- Writing ---- */

/* vmmig: KVM does not see what a device writes. The page is marked after it was written. */
static void write_page(struct writer *w, uint64_t address, uint64_t first_word)
{
    uint64_t *words = memory_at(w->memory, address, PAGE), sum = first_word + address;
    if (!words)
        return;
    words[0] = first_word;
    words[1] = address;
    for (unsigned i = 2; i < WORDS - 1; i++) {
        words[i] = (first_word * 0x9e3779b97f4a7c15u + address + i) * 0xbf58476d1ce4e5b9u;
        sum += words[i];
    }
    words[WORDS - 1] = sum;
    vmmig_mark_dirty(*w->attach, address, PAGE);
}

static void write_next(struct writer *w)
{
    struct writer_state *t = &w->state;
    uint32_t sequence = t->completed + 1;
    write_page(w, t->address + (1 + (uint64_t)(sequence % t->pages)) * PAGE, sequence);
    t->completed = sequence;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Pages that are due, with a fraction left over; not more than CATCH_UP_MS worth of them. */
static void *writer_main(void *arg)
{
    struct writer *w = arg;
    const struct timespec tick = {.tv_nsec = TICK_US * 1000};
    const uint64_t page_ns = 1000000000u / w->rate, limit_ns = CATCH_UP_MS * 1000000u + page_ns;
    uint64_t last = now_ns(), due_ns = 0;
    while (!atomic_load(&w->end)) {
        nanosleep(&tick, NULL);
        uint64_t now = now_ns();
        due_ns += now - last;
        due_ns = due_ns > limit_ns ? limit_ns : due_ns;
        last = now;
        pthread_mutex_lock(&w->lock);
        for (; due_ns >= page_ns; due_ns -= page_ns)
            if (w->going && w->state.pages)
                write_next(w);
        pthread_mutex_unlock(&w->lock);
    }
    return NULL;
}

/* ---- Life ---- */

int writer_start(struct writer *w, const struct memory *memory, struct vmmig_attach *const *attach,
                 uint64_t rate)
{
    *w = (struct writer){.rate = rate, .memory = memory, .attach = attach};
    pthread_mutex_init(&w->lock, NULL);
    if (rate > 1000000)
        return complain("--writer is at most a million pages a second");
    if (!rate)
        return 0;
    w->started = pthread_create(&w->thread, NULL, writer_main, w) == 0;
    return w->started ? 0 : complain("cannot start the writer's thread");
}

void writer_stop(struct writer *w)
{
    atomic_store(&w->end, true);
    if (w->started)
        pthread_join(w->thread, NULL);
    w->started = false;
}

static void set_going(struct writer *w, bool going)
{
    pthread_mutex_lock(&w->lock);
    w->going = going;
    pthread_mutex_unlock(&w->lock);
}

void writer_pause(struct writer *w)
{
    set_going(w, false);
}

void writer_resume(struct writer *w)
{
    set_going(w, true);
}

/* ---- Registers ---- */

/* The guest may ask for anything. */
static bool pages_fit(const struct writer *w, uint64_t address, uint32_t pages)
{
    return address % PAGE == 0 && pages <= WRITER_PAGES_MAX &&
           memory_at(w->memory, address, (1 + (uint64_t)pages) * PAGE);
}

static void begin(struct writer *w, uint32_t pages)
{
    struct writer_state *t = &w->state;
    t->pages = pages && pages_fit(w, t->address, pages) ? pages : 0;
    t->completed = t->saves = 0;
    if (!t->pages)
        return;
    write_page(w, t->address, t->saves);
    for (uint32_t i = 0; i < t->pages; i++)
        write_next(w);
}

uint32_t writer_read(struct writer *w, unsigned reg)
{
    const struct writer_state *t = &w->state;
    uint32_t value = UINT32_MAX;
    if (!w->rate)
        return value;
    pthread_mutex_lock(&w->lock);
    switch (reg) {
    case WRITER_ID:
        value = WRITER_ID_VALUE;
        break;
    case WRITER_ADDRESS:
        value = (uint32_t)(t->address / PAGE);
        break;
    case WRITER_PAGES:
        value = t->pages;
        break;
    case WRITER_COMPLETED:
        value = t->completed;
        break;
    case WRITER_SAVES:
        value = t->saves;
        break;
    default:
        break;
    }
    pthread_mutex_unlock(&w->lock);
    return value;
}

void writer_write(struct writer *w, unsigned reg, uint32_t value)
{
    if (!w->rate)
        return;
    pthread_mutex_lock(&w->lock);
    if (reg == WRITER_ADDRESS && !w->state.pages)
        w->state.address = (uint64_t)value * PAGE;
    if (reg == WRITER_PAGES)
        begin(w, value);
    pthread_mutex_unlock(&w->lock);
}

/* ---- State ---- */

/* vmmig: saving writes guest memory here, which is allowed if it is marked. */
void writer_save(struct writer *w, struct state *state)
{
    pthread_mutex_lock(&w->lock);
    w->state.saves++;
    if (w->state.pages)
        write_page(w, w->state.address, w->state.saves);
    state_put(state, STATE_WRITER, 0, &w->state, sizeof(w->state));
    pthread_mutex_unlock(&w->lock);
}

int writer_load(struct writer *w, const struct state *state)
{
    struct writer_state t;
    if (state_copy(state, STATE_WRITER, 0, &t, sizeof(t)) < 0)
        return -1;
    if (t.pages && (!w->rate || !pages_fit(w, t.address, t.pages)))
        return complain("the guest's state is damaged: the writer's pages are no memory");
    pthread_mutex_lock(&w->lock);
    w->state = t;
    pthread_mutex_unlock(&w->lock);
    return 0;
}
