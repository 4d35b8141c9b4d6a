/* SPDX-License-Identifier: Apache-2.0 */
/* The agent's side against a VMM that does not link the library, and tells it what is not so. */
#include "base/io.h"
#include "proto/attach.h"
#include "vmm/attach.h"
#include "vmm/attach_private.h"
#include "vmm/guest_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

enum { SIZE = 4 << 20 };

struct liar {
    struct sockaddr_un address;
    int listener;
    pthread_t thread;
    uint64_t size, page_size; /* as it says */
    bool forgets;             /* of its first harvest, a page */
    int memory, bitmap, pipe[2];
};

static void say(int fd, unsigned type, const ProtobufCMessage *message, const int *fds, int n_fds)
{
    cleanup_buffer struct buffer out = {0};
    assert_int_equal(attach_pack(type, message, &out, NULL), 0);
    io_send_fds(fd, out.data, out.len, fds, n_fds, NULL);
}

static void welcome(int fd)
{
    Vmmig__Attach__Welcome m = VMMIG__ATTACH__WELCOME__INIT;
    m.version = ATTACH_VERSION_MAX;
    m.pid = 1;
    m.n_vcpus = 1;
    m.vmm = m.machine = m.tracking = (char[]){"liar"};
    say(fd, VMMIG__ATTACH__TYPE__WELCOME, &m.base, NULL, 0);
}

static void tell_memory(const struct liar *l, int fd)
{
    Vmmig__Attach__Memory m = VMMIG__ATTACH__MEMORY__INIT;
    Vmmig__Attach__Slot slot = VMMIG__ATTACH__SLOT__INIT, *slots[] = {&slot};
    int fds[] = {l->memory, l->bitmap};
    slot.name = (char[]){"low"};
    slot.size = l->size;
    slot.page_size = l->page_size;
    m.slots = slots;
    m.n_slots = 1;
    m.bitmap_size = l->size / 4096 / 8;
    say(fd, VMMIG__ATTACH__TYPE__MEMORY, &m.base, fds, 2);
}

static void answer(const struct liar *l, int fd, unsigned type)
{
    Vmmig__Attach__State now = VMMIG__ATTACH__STATE__INIT;
    Vmmig__Attach__Harvested none = VMMIG__ATTACH__HARVESTED__INIT;
    Vmmig__Attach__Saved saved = VMMIG__ATTACH__SAVED__INIT;
    now.state = VMMIG__ATTACH__RUN_STATE__RUN_PAUSED;
    uint8_t all[SIZE / 4096 / 8];
    const size_t n = l->size / 4096 / 8;
    saved.size = 8;
    switch (type) {
    case VMMIG__ATTACH__TYPE__HELLO:
        return welcome(fd);
    case VMMIG__ATTACH__TYPE__STATUS:
        return say(fd, VMMIG__ATTACH__TYPE__STATE, &now.base, NULL, 0);
    case VMMIG__ATTACH__TYPE__GET_MEMORY:
        return tell_memory(l, fd);
    case VMMIG__ATTACH__TYPE__HARVEST:
        memset(all, 0xff, sizeof(all));
        all[n - 1] = l->forgets ? 0x7f : 0xff;
        assert_int_equal(pwrite(l->bitmap, all, n, 0), n);
        return say(fd, VMMIG__ATTACH__TYPE__HARVESTED, &none.base, NULL, 0);
    case VMMIG__ATTACH__TYPE__SAVE:
        return say(fd, VMMIG__ATTACH__TYPE__SAVED, &saved.base, l->pipe, 1);
    default:
        return say(fd, VMMIG__ATTACH__TYPE__OK, NULL, NULL, 0);
    }
}

static void *liar_main(void *arg)
{
    struct liar *l = arg;
    static uint8_t packet[ATTACH_PACKET_MAX];
    int fd = accept(l->listener, NULL, NULL), n_fds;
    for (ssize_t n; (n = io_recv_fds(fd, packet, sizeof(packet), NULL, 0, &n_fds, NULL)) > 0;) {
        cleanup_attach_message struct attach_message m = {0};
        assert_int_equal(attach_unpack(packet, (size_t)n, &m, NULL), 0);
        answer(l, fd, m.type);
    }
    close(fd);
    return NULL;
}

static int seal(int fd, size_t size)
{
    assert_return_code(ftruncate(fd, (off_t)size), errno);
    assert_return_code(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), errno);
    return fd;
}

static int sealed(size_t size)
{
    return seal(memfd_create("liar", MFD_CLOEXEC | MFD_ALLOW_SEALING), size);
}

/* One page of a size of which a system keeps none, unless it was told to; or of the usual size. */
static int huge(size_t *ret_size)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB;
    int fd = memfd_create("liar", flags | MFD_HUGE_1GB);
    *ret_size = fd < 0 ? 2u << 20 : 1u << 30;
    return seal(fd < 0 ? memfd_create("liar", flags | MFD_HUGE_2MB) : fd, *ret_size);
}

static struct attach *begin_with(struct liar *l, int memory, uint64_t size, uint64_t page_size)
{
    struct vm_error *err = NULL;
    *l = (struct liar){.address = {.sun_family = AF_UNIX},
                       .listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0),
                       .size = size,
                       .page_size = page_size,
                       .memory = memory,
                       .bitmap = sealed(size / 4096 / 8)};
    assert_return_code(pipe(l->pipe), errno);
    snprintf(l->address.sun_path, sizeof(l->address.sun_path), "/tmp/vmmig-liar-%d", getpid());
    assert_return_code(bind(l->listener, (struct sockaddr *)&l->address, sizeof(l->address)), errno);
    assert_return_code(listen(l->listener, 1), errno);
    assert_int_equal(pthread_create(&l->thread, NULL, liar_main, l), 0);
    struct attach *a = attach_connect(l->address.sun_path, 5000, &err);
    assert_string_equal(error_message(err), "no error");
    return a;
}

static struct attach *begin(struct liar *l, uint64_t page_size)
{
    return begin_with(l, sealed(SIZE), SIZE, page_size);
}

static void end(struct liar *l, struct attach *a)
{
    attach_destroy(a);
    pthread_join(l->thread, NULL);
    int fds[] = {l->listener, l->memory, l->bitmap, l->pipe[0], l->pipe[1]};
    for (unsigned i = 0; i < 5; i++)
        close(fds[i]);
    unlink(l->address.sun_path);
}

/* ---- An engine that takes anything ---- */

struct engine {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
    struct vm_error *error;
};

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    page_batch_unref(batch);
    return 0;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    return 0;
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    return 0;
}

static void on_done(void *arg, struct vm_error *err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    e->done = true;
    e->error = err;
    pthread_cond_broadcast(&e->changed);
}

static const struct guest_source_events events = {
    .pages = on_pages, .bytes = on_bytes, .memory_done = on_memory_done, .done = on_done};

static int copy(struct attach *a, struct engine *e, struct vm_error **err)
{
    struct guest_region region = {.name = "low", .size = SIZE, .page_size = 4096};
    struct guest_source_params params = {.channels = 1, .regions = &region, .n_regions = 1};
    *e = (struct engine){.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    return guest_source_start(attach_guest(a), &params, &events, e, err);
}

static void pages_are_as_large_as_the_files(void **state)
{
    struct liar l;
    struct engine e;
    struct vm_error *err = NULL;
    struct attach *a = begin(&l, 2 << 20);
    assert_int_equal(copy(a, &e, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    assert_string_equal(error_message(err), "low: its memory has pages of 4096 bytes, the VMM says 2097152");
    error_free(err);
    end(&l, a);
}

static void end_of_copy(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    while (!e->done)
        pthread_cond_wait(&e->changed, &e->lock);
    pthread_mutex_unlock(&e->lock);
}

/* Nothing else would tell that the copy is not whole. */
static void a_first_harvest_that_is_not_everything_is_refused(void **state)
{
    struct liar l;
    struct engine e;
    struct vm_error *err = NULL;
    struct attach *a = begin(&l, 4096);
    l.forgets = true;
    assert_int_equal(copy(a, &e, &err), 0);
    end_of_copy(&e);
    assert_int_equal(e.error->kind, VM_ERROR_PROTOCOL);
    assert_string_equal(error_message(e.error), "the VMM's first harvest is not all of the guest's memory");
    error_free(e.error);
    assert_int_equal(guest_source_stop(attach_guest(a), NULL), 0);
    end(&l, a);
}

/* Reading it would never end. */
static void state_that_is_no_memory_is_not_read(void **state)
{
    struct liar l;
    struct engine e;
    struct vm_error *err = NULL;
    struct attach *a = begin(&l, 4096);
    assert_int_equal(copy(a, &e, &err), 0);
    end_of_copy(&e);
    assert_int_equal(e.error->kind, VM_ERROR_PROTOCOL);
    assert_string_equal(error_message(e.error), "the file with the guest's state is no memfd");
    error_free(e.error);
    assert_int_equal(guest_source_stop(attach_guest(a), NULL), 0);
    end(&l, a);
}

static void memory_at_another_place_is_another_machine(void **state)
{
    struct liar l;
    struct vm_error *err = NULL;
    cleanup_qemu_definition struct qemu_definition d = {0};
    struct attach *a = begin(&l, 4096);
    uint64_t generation;
    assert_int_equal(attach_define_memory(a, &d, &generation, &err), 0);
    assert_int_equal(attach_check_slots(a, &d, &generation, &err), 0);
    d.ram[0].guest_address += 1ull << 32;
    assert_int_equal(attach_check_slots(a, &d, &generation, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_string_equal(error_message(err), "memory slot low of the guest is not that of the VMM prepared for it");
    error_free(err);
    end(&l, a);
}

/* The pool is empty: to touch a hole in a mapping would be the agent's end. */
static void a_hole_of_huge_pages_is_an_error_and_no_signal(void **state)
{
    static const uint8_t zero[GUEST_PAGE_SIZE];
    uint8_t room[GUEST_PAGE_SIZE];
    const uint8_t *seen;
    struct liar l;
    struct stat st;
    struct attach_memory_map map;
    struct vm_error *err = NULL;
    size_t size;
    int memory = huge(&size);
    struct attach *a = begin_with(&l, memory, size, size);
    assert_int_equal(attach_memory_map(&map, &a->client, true, &err), 0);
    const struct guest_region *r = &map.list[0];
    assert_int_equal(guest_region_look(r, 8192, room, &seen, &err), 0);
    assert_memory_equal(seen, zero, sizeof(zero));
    assert_int_equal(guest_region_write(r, 8192, zero, sizeof(zero), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NO_SPACE);
    assert_string_equal(error_message(err), "no memory for the guest's pages of low");
    error_free(err);
    assert_return_code(fstat(l.memory, &st), errno);
    assert_int_equal(st.st_blocks, 0);
    attach_memory_unmap(&map);
    end(&l, a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_are_as_large_as_the_files),
        cmocka_unit_test(a_first_harvest_that_is_not_everything_is_refused),
        cmocka_unit_test(state_that_is_no_memory_is_not_read),
        cmocka_unit_test(memory_at_another_place_is_another_machine),
        cmocka_unit_test(a_hole_of_huge_pages_is_an_error_and_no_signal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
