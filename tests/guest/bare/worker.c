/* SPDX-License-Identifier: Apache-2.0 */
#include "worker.h"

#include <stddef.h>

#include "memory.h"
#include "options.h"
#include "pages.h"
#include "text.h"
#include "writer.h"

enum {
    BATCH = 64,
    MAX_BAD_LINES = 16,
    CATCH_UP_MS = 100,
    FIRST_SEQUENCE = 1,
    GAP_MS = 1,
    COUNTERS_EVERY = 10,
};

#define NO_HEADER UINT64_MAX /* as a sequence number that was found */

/* A rate as a budget: time flows in, and each page costs some. */
struct budget {
    uint64_t cost; /* TSC ticks per page; 0: none is due ever */
    uint64_t credit;
    uint64_t updated;
};

/* One vCPU's work. Others read the counters only. */
struct vcpu {
    struct memory_cursor dirty;
    struct memory_cursor scan;
    struct budget dirty_budget;
    struct budget scan_budget;
    uint64_t passes[MEMORY_MAX_REGIONS]; /* complete rewrites of its worked pages in each region */
    uint64_t cycles;                     /* of all regions */
    uint64_t checked;
    uint64_t errors;
    uint64_t verify_asked; /* the newest request that this vCPU has seen, and has done */
    uint64_t verify_done;
    uint64_t verified; /* pages, for the newest request */
    bool filled;
    uint64_t expected[PAGES_WORDS];
};

static struct options options;
static struct memory memory;
static struct vcpu vcpus[PLATFORM_MAX_VCPUS];
static uint64_t verify_request;
static uint64_t verify_pages; /* that each vCPU checks for it */
static uint64_t set_back; /* TSC ticks by which `back` has set the clock back */
static bool filled_all;

static uint64_t clock_now(void)
{
    return platform_tsc() - __atomic_load_n(&set_back, __ATOMIC_RELAXED);
}

static void print(const struct text *line)
{
    static volatile bool busy;

    while (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE))
        platform_relax();
    platform_console_write(line->bytes, line->length);
    __atomic_clear(&busy, __ATOMIC_RELEASE);
}

static void field(struct text *line, const char *name, uint64_t value)
{
    text_string(line, name);
    text_decimal(line, value);
}

/* ---- one page ---- */

static uint64_t *words_of(const struct memory_page *page)
{
    return (uint64_t *)(uintptr_t)page->address;
}

static void report_bad_words(uint64_t address, uint64_t expected, uint64_t found, unsigned word)
{
    static unsigned lines;
    struct text line = {.length = 0};

    if (__atomic_fetch_add(&lines, 1, __ATOMIC_RELAXED) >= MAX_BAD_LINES)
        return;
    text_string(&line, "BAD page=");
    text_hex(&line, address);
    field(&line, " expected=", expected);
    if (found == NO_HEADER)
        text_string(&line, " found=none");
    else
        field(&line, " found=", found);
    field(&line, " word=", word);
    text_string(&line, "\n");
    print(&line);
}

static void report_bad(const struct memory_page *page, uint64_t expected, unsigned word)
{
    const uint64_t *words = words_of(page);
    bool header = words[0] == PAGES_MAGIC && words[1] == page->address;

    report_bad_words(page->address, expected, header ? words[3] : NO_HEADER, word);
}

/* Writes what differs only: the other cache lines, and in shared memory the other halves, stay as
 * they are. */
static void write_page(uint64_t *words, const uint64_t *contents)
{
    for (unsigned i = 0; i < PAGES_WORDS; i++) {
        if (words[i] != contents[i])
            words[i] = contents[i];
    }
}

static void check_page(struct vcpu *vcpu, const struct memory_page *page, uint64_t expected)
{
    uint64_t owner = vcpu->dirty.vcpu;
    unsigned word;

    pages_render(&options.style, page->address, owner, expected, vcpu->expected);
    word = pages_compare(words_of(page), vcpu->expected);
    vcpu->checked++;
    if (word == PAGES_WORDS)
        return;
    vcpu->errors++;
    report_bad(page, expected, word);
    write_page(words_of(page), vcpu->expected);
}

static void fill_page(struct vcpu *vcpu, uint64_t owner, const struct memory_page *page)
{
    uint64_t sequence = page->worked ? FIRST_SEQUENCE : PAGES_BASE;

    if (page->worked)
        *page->sequence = sequence;
    else if (options.style.fill == PAGES_FILL_ZERO)
        return; /* as it came */
    pages_render(&options.style, page->address, owner, sequence, vcpu->expected);
    write_page(words_of(page), vcpu->expected);
}

/* Checks the next worked page against the number of passes, and gives it its next contents. */
static void dirty_step(struct vcpu *vcpu)
{
    struct memory_page page;
    unsigned former = vcpu->dirty.region;
    uint64_t expected;

    if (!memory_next(&memory, &vcpu->dirty, &page)) {
        vcpu->passes[former]++;
        vcpu->cycles++;
        return;
    }
    for (; former < page.region; former++)
        vcpu->passes[former]++;
    expected = FIRST_SEQUENCE + vcpu->passes[page.region];
    if (*page.sequence != expected) {
        vcpu->errors++;
        report_bad(&page, expected, PAGES_WORDS);
    }
    check_page(vcpu, &page, expected);
    *page.sequence = expected + 1;
    pages_render(&options.style, page.address, vcpu->dirty.vcpu, expected + 1, vcpu->expected);
    write_page(words_of(&page), vcpu->expected);
}

/* Checks the next page of all against the table. False after the last one. */
static bool scan_step(struct vcpu *vcpu)
{
    struct memory_page page;

    if (!memory_next(&memory, &vcpu->scan, &page))
        return false;
    check_page(vcpu, &page, page.worked ? *page.sequence : PAGES_BASE);
    return true;
}

/* ---- pace ---- */

static void init_budget(struct budget *budget, uint64_t mbps)
{
    uint64_t pages_per_second = mbps * 1000000 / MEMORY_PAGE / options.vcpus;

    *budget = (struct budget){.updated = clock_now()};
    if (mbps)
        budget->cost = options.tsc_khz * 1000 / (pages_per_second ? pages_per_second : 1);
    if (mbps && budget->cost == 0)
        budget->cost = 1;
}

static void update_budget(struct budget *budget, uint64_t now)
{
    uint64_t limit = CATCH_UP_MS * options.tsc_khz;
    uint64_t passed = now - budget->updated;

    if (limit < budget->cost)
        limit = budget->cost;
    if ((int64_t)passed < 0)
        passed = 0;
    budget->updated = now;
    budget->credit = passed > limit - budget->credit ? limit : budget->credit + passed;
}

static bool spend(struct budget *budget)
{
    if (budget->cost == 0 || budget->credit < budget->cost)
        return false;
    budget->credit -= budget->cost;
    return true;
}

/* ---- vCPU 0: heartbeat and commands ---- */

static void check_writer(bool all)
{
    if (options.writer_pages)
        vcpus[0].errors += writer_check(all, report_bad_words, &vcpus[0].checked);
}

static void errors_field(struct text *line, uint64_t errors)
{
    if (options.writer_pages)
        field(line, " written=", writer_completed());
    field(line, " errors=", errors);
}

static void counters(struct text *line)
{
    uint64_t cycles = vcpus[0].cycles, checked = 0, errors = 0;

    for (unsigned i = 0; i < options.vcpus; i++) {
        cycles = vcpus[i].cycles < cycles ? vcpus[i].cycles : cycles;
        checked += vcpus[i].checked;
        errors += vcpus[i].errors;
    }
    field(line, " cycles=", cycles);
    field(line, " checked=", checked);
    errors_field(line, errors);
}

/* Each byte costs the guest an exit: the line is short. */
static void heartbeat(uint64_t now, uint64_t gap)
{
    static uint64_t number;
    struct text line = {.length = 0};

    field(&line, "hb ", number);
    text_string(&line, " ");
    text_hex(&line, now);
    if (number % COUNTERS_EVERY == 0)
        counters(&line);
    if (gap >= GAP_MS * options.tsc_khz)
        field(&line, " gap=", gap * 1000 / options.tsc_khz);
    text_string(&line, "\n");
    number++;
    print(&line);
}

static void finish_verify(void)
{
    static uint64_t reported;
    struct text line = {.length = 0};
    uint64_t checked = 0, errors = 0;

    if (reported == verify_request)
        return;
    for (unsigned i = 0; i < options.vcpus; i++) {
        if (__atomic_load_n(&vcpus[i].verify_done, __ATOMIC_ACQUIRE) != verify_request)
            return;
    }
    check_writer(true);
    for (unsigned i = 0; i < options.vcpus; i++) {
        checked += vcpus[i].checked;
        errors += vcpus[i].errors;
    }
    reported = verify_request;
    field(&line, "verified checked=", checked);
    errors_field(&line, errors);
    text_string(&line, "\n");
    print(&line);
}

/* Fills the memory, whoever will own its pages, and lets the others see it. */
static void add_memory(uint64_t start, uint64_t size)
{
    struct text line = {.length = 0};
    unsigned region = memory.region_count;

    if (start % MEMORY_PAGE || size % MEMORY_PAGE || start >= PLATFORM_MAPPED_END ||
        size > PLATFORM_MAPPED_END - start || !memory_add(&memory, start, start + size))
        platform_panic("add", start);
    for (uint64_t i = 0; i < memory.regions[region].pages; i++) {
        struct memory_page page;
        unsigned owner;

        memory_page_at(&memory, region, i, &owner, &page);
        fill_page(&vcpus[0], owner, &page);
    }
    memory_publish(&memory);
    text_string(&line, "added ");
    text_hex(&line, start);
    text_string(&line, " ");
    text_hex(&line, size);
    text_string(&line, "\n");
    print(&line);
}

/* What follows the word at the start of a command, or NULL. */
static const char *after_word(const char *command, const char *word)
{
    while (*word && *command == *word) {
        command++;
        word++;
    }
    return *word ? NULL : command;
}

static void ask_to_verify(uint64_t pages)
{
    verify_pages = pages;
    __atomic_store_n(&verify_request, verify_request + 1, __ATOMIC_RELEASE);
}

static void obey(const char *command)
{
    uint64_t start, size, ms;
    const char *at;

    if ((at = after_word(command, "verify")) && *at == '\0')
        ask_to_verify(UINT64_MAX);
    if ((at = after_word(command, "verify ")) && (at = options_number(at, &size)) && *at == '\0')
        ask_to_verify(size * MEMORY_CHUNK_PAGES);
    if ((at = after_word(command, "add ")) && (at = options_number(at, &start)) && *at == ' ' &&
        (at = options_number(at + 1, &size)) && *at == '\0')
        add_memory(start, size);
    if ((at = after_word(command, "back ")) && (at = options_number(at, &ms)) && *at == '\0')
        __atomic_fetch_add(&set_back, ms * options.tsc_khz, __ATOMIC_RELAXED);
}

static void poll_console(void)
{
    static char command[64];
    static unsigned length;
    int c;

    while ((c = platform_console_read()) >= 0) {
        if (c == '\n') {
            command[length] = '\0';
            length = 0;
            obey(command);
        } else if (length < sizeof(command) - 1) {
            command[length++] = (char)c;
        }
    }
}

/* Called in every turn of vCPU 0. Anything but a small time left is due: long past, or the clock
 * was set back. The longest time between two turns is what the guest itself can tell of a pause. */
static void lead(uint64_t now)
{
    static uint64_t due, former, gap;
    uint64_t interval = options.heartbeat_ms * options.tsc_khz;
    uint64_t left = due - now, turn = former ? now - former : 0;

    if ((int64_t)turn > (int64_t)gap)
        gap = turn;
    former = now;
    if (platform_console_waits())
        print(&(struct text){.length = 0});
    if (left != 0 && left <= interval)
        return;
    due = now + interval;
    heartbeat(now, gap); /* at once: a stop before its first byte would be the next one's gap */
    gap = 0;
    check_writer(false);
    poll_console();
    finish_verify();
}

/* ---- all vCPUs ---- */

static void follow_verify(struct vcpu *vcpu)
{
    uint64_t request = __atomic_load_n(&verify_request, __ATOMIC_ACQUIRE);

    if (request == vcpu->verify_asked)
        return;
    vcpu->verify_asked = request;
    vcpu->verified = 0;
    vcpu->scan.region = 0;
    vcpu->scan.page = 0;
}

static bool work(struct vcpu *vcpu, uint64_t now)
{
    bool verifying, busy = false;

    follow_verify(vcpu);
    update_budget(&vcpu->dirty_budget, now);
    update_budget(&vcpu->scan_budget, now);
    for (int i = 0; i < BATCH && spend(&vcpu->dirty_budget); i++) {
        dirty_step(vcpu);
        busy = true;
    }
    verifying = vcpu->verify_done != vcpu->verify_asked;
    for (int i = 0; i < BATCH && (verifying || spend(&vcpu->scan_budget)); i++) {
        busy = true;
        if (scan_step(vcpu) && !(verifying && ++vcpu->verified >= verify_pages))
            continue;
        __atomic_store_n(&vcpu->verify_done, vcpu->verify_asked, __ATOMIC_RELEASE);
        verifying = false;
    }
    return busy;
}

static void fill_own(struct vcpu *vcpu)
{
    struct memory_cursor cursor = {.vcpu = vcpu->dirty.vcpu};
    struct memory_page page;

    while (memory_next(&memory, &cursor, &page))
        fill_page(vcpu, cursor.vcpu, &page);
    __atomic_store_n(&vcpu->filled, true, __ATOMIC_RELEASE);
}

static void say_ready(void)
{
    struct text line = {.length = 0};
    uint64_t pages = 0;

    for (unsigned i = 0; i < memory.region_count; i++)
        pages += memory.regions[i].pages;
    field(&line, "vmmig-guest ready mem=", pages / MEMORY_CHUNK_PAGES);
    field(&line, " worked=", memory.worked_part * pages / memory.worked_whole);
    field(&line, " vcpus=", options.vcpus);
    field(&line, " tsc_khz=", options.tsc_khz);
    text_string(&line, "\n");
    print(&line);
}

void worker_boot(struct platform_machine *machine)
{
    uint64_t chunks = 0;

    options_parse(machine->command_line, machine->tsc_khz, &options);
    if (options.writer_pages)
        writer_init(machine, options.writer_pages);
    for (unsigned i = 0; i < machine->range_count; i++)
        chunks +=
            (machine->ranges[i].end - machine->ranges[i].start) / MEMORY_PAGE / MEMORY_CHUNK_PAGES;
    for (unsigned i = 0; i < options.extra_count; i++)
        chunks +=
            (options.extra[i].end - options.extra[i].start) / MEMORY_PAGE / MEMORY_CHUNK_PAGES;
    if (chunks == 0 || options.dirty_mib > chunks)
        platform_panic("working set", options.dirty_mib);
    memory.vcpus = (unsigned)options.vcpus;
    memory.worked_part = options.dirty_mib;
    memory.worked_whole = chunks;
    for (unsigned i = 0; i < machine->range_count; i++) {
        if (memory_add(&memory, machine->ranges[i].start, machine->ranges[i].end))
            memory_publish(&memory);
    }
    for (unsigned i = 0; i < options.extra_count; i++) {
        if (memory_add(&memory, options.extra[i].start, options.extra[i].end))
            memory_publish(&memory);
    }
    platform_start_vcpus(memory.vcpus);
}

void worker_run(unsigned number)
{
    struct vcpu *vcpu = &vcpus[number];

    vcpu->dirty = (struct memory_cursor){.vcpu = number, .worked_only = true};
    vcpu->scan = (struct memory_cursor){.vcpu = number};
    fill_own(vcpu);
    if (number == 0) {
        for (unsigned i = 0; i < memory.vcpus; i++) {
            while (!__atomic_load_n(&vcpus[i].filled, __ATOMIC_ACQUIRE))
                platform_relax();
        }
        say_ready();
        __atomic_store_n(&filled_all, true, __ATOMIC_RELEASE);
    }
    while (!__atomic_load_n(&filled_all, __ATOMIC_ACQUIRE))
        platform_relax();
    init_budget(&vcpu->dirty_budget, options.rate_mbps);
    init_budget(&vcpu->scan_budget, options.scan_mbps);
    for (;;) {
        uint64_t now = clock_now();

        if (number == 0)
            lead(now);
        if (!work(vcpu, now) && !options.spin)
            platform_idle();
    }
}
