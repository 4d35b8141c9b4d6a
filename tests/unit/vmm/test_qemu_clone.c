/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cleanup.h"
#include "vmm/qemu_clone.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char *copy(const char *text)
{
    char *made = strdup(text);
    assert_non_null(made);
    return made;
}

/* A saved VM of that command line, with one disk, /x/web1.raw, in node d0. */
static void fill(struct qemu_json *vm, const char *const *words, unsigned n)
{
    struct qemu_definition *d = &vm->definition;
    strcpy(vm->name, "web1");
    d->argv = calloc(n + 1, sizeof(*d->argv));
    memcpy(d->argv, words, n * sizeof(*words));
    d->state = GUEST_RUNNING;
    d->memory = 1 << 20;
    *qemu_definition_add_ram(d) = (struct qemu_ram){copy("pc.ram"), copy("pc.ram"), 1 << 20, 4096};
    *qemu_definition_add_disk(d) = (struct qemu_disk){
        copy("d0"), copy("d0"), copy("/x/web1.raw"), copy("file"), copy("raw"), true, false};
    assert_int_equal(qemu_json_name_files(vm, NULL), 0);
}

static const char *const rams[] = {"/m/memory.raw"}, *const overlays[] = {"/c/disk0.qcow2"};

static char *make(const char *const *words, unsigned n, const struct qemu_name_map *taps,
                  unsigned n_taps, struct qemu_clone_notes *notes, struct vm_error **err)
{
    cleanup_qemu_json struct qemu_json vm = {0};
    cleanup_free char **argv = NULL;
    char *line = calloc(1, 8192);
    fill(&vm, words, n);
    struct qemu_clone_params p = {.name = "c7", .vm = &vm, .ram_paths = rams,
                                  .disk_paths = overlays, .taps = taps, .n_taps = n_taps,
                                  .state_fd = 9};
    if (qemu_clone_argv(&p, notes, &argv, err) < 0) {
        free(line);
        return NULL;
    }
    for (char **a = argv; *a; a++)
        strcat(strcat(line, *a), " ");
    return line;
}

#define MAKE(notes, err, ...)                                                                      \
    ({                                                                                             \
        static const char *const words_[] = {"qemu", __VA_ARGS__};                                 \
        make(words_, sizeof(words_) / sizeof(*words_), NULL, 0, notes, err);                       \
    })

static void has(const char *line, const char *part)
{
    if (!strstr(line, part))
        fail_msg("%s lacks %s", line, part);
}

static void lacks(const char *line, const char *part)
{
    if (strstr(line, part))
        fail_msg("%s has %s", line, part);
}

static void memory_and_disk_are_the_template_s(void **state)
{
    struct qemu_clone_notes notes;
    (void)state;
    cleanup_free char *line = MAKE(
        &notes, NULL, "-object", "memory-backend-file,id=pc.ram,size=1048576,share=on", "-blockdev",
        "driver=raw,node-name=d0,file.driver=file,file.filename=/x/web1.raw", "-device",
        "virtio-blk-pci,drive=d0");
    has(line, "mem-path=/m/memory.raw");
    has(line, "share=off");
    lacks(line, "share=on");
    has(line, "qcow2,node-name=d0,file.driver=file,file.filename=/c/disk0.qcow2");
    lacks(line, "/x/web1.raw");
    has(line, "-incoming fd:9");
    assert_int_equal(notes.n, 1);
}

static void a_disk_of_two_nodes_and_a_drive(void **state)
{
    struct qemu_clone_notes notes;
    (void)state;
    cleanup_free char *two = MAKE(&notes, NULL, "-blockdev",
                                  "driver=file,node-name=lower,filename=/x/web1.raw", "-blockdev",
                                  "driver=raw,node-name=top,file=lower");
    has(two, "-blockdev qcow2,node-name=top,file.driver=file,file.filename=/c/disk0.qcow2");
    lacks(two, "lower"); /* nothing that a random identity could hold */
    cleanup_free char *drive =
        MAKE(&notes, NULL, "-drive", "file=/x/web1.raw,format=raw,if=virtio,cache=none");
    has(drive, "file=/c/disk0.qcow2,format=qcow2,if=virtio,cache=none");
}

/* Which disk stands first there, of /x/web1.raw (0), /x/data.raw (1) and /x/cd.iso (2, which cannot be written). */
static int first_of(const char *const *words, unsigned n, struct vm_error **err)
{
    cleanup_qemu_json struct qemu_json vm = {0};
    unsigned disk;
    fill(&vm, words, n);
    struct qemu_definition *d = &vm.definition;
    *qemu_definition_add_disk(d) = (struct qemu_disk){
        copy("data"), copy("d1"), copy("/x/data.raw"), copy("file"), copy("raw"), true, false};
    *qemu_definition_add_disk(d) = (struct qemu_disk){
        copy("cd"), copy("d2"), copy("/x/cd.iso"), copy("file"), copy("raw"), false, false};
    free(vm.ram_files);
    free(vm.disk_files);
    assert_int_equal(qemu_json_name_files(&vm, NULL), 0);
    return qemu_clone_first_disk(&vm, &disk, err) < 0 ? -1 : (int)disk;
}

static void the_first_disk_is_the_command_line_s(void **state)
{
    static const char web1[] = "driver=raw,node-name=d0,file.driver=file,file.filename=/x/web1.raw",
                      data[] = "file=/x/data.raw,format=raw,if=virtio", cd[] = "file=/x/cd.iso,media=cdrom";
    static const char *const one[] = {"qemu", "-drive", cd, "-drive", data, "-blockdev", web1};
    static const char *const two[] = {"qemu", "-blockdev", web1, "-drive", data, "-drive", cd};
    static const char *const none[] = {"qemu", "-drive", cd};
    cleanup_error struct vm_error *err = NULL;
    (void)state;
    assert_int_equal(first_of(one, 7, NULL), 1);
    assert_int_equal(first_of(two, 7, NULL), 0);
    assert_int_equal(first_of(none, 3, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
}

static void identity_is_fresh(void **state)
{
    static const char old[] = "11111111-2222-3333-4444-555555555555";
    struct qemu_clone_notes notes;
    (void)state;
    cleanup_free char *line =
        MAKE(&notes, NULL, "-name", "web1", "-uuid", "11111111-2222-3333-4444-555555555555",
             "-device", "vmgenid,guid=11111111-2222-3333-4444-555555555555", "-netdev",
             "user,id=n0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01");
    lacks(line, old);
    lacks(line, "52:54:00:00:00:01");
    has(line, "-name c7 ");
    has(line, "mac=52:54:00:");
    assert_int_equal(notes.n, 0);
    assert_int_equal(notes.n_macs, 1); /* it does not look at its MAC again */
    assert_string_equal(notes.macs[0].from, "52:54:00:00:00:01");
    has(line, notes.macs[0].to);
    cleanup_free char *named = MAKE(&notes, NULL, "-name", "guest=web1,debug-threads=on");
    has(named, "c7,debug-threads=on");
    lacks(named, "web1");
}

static void paths_are_the_clone_s_own(void **state)
{
    struct qemu_clone_notes notes;
    (void)state;
    cleanup_free char *line =
        MAKE(&notes, NULL, "-qmp", "unix:/run/web1.qmp,server=on,wait=off", "-chardev",
             "socket,id=a,path=/run/web1.a", "-chardev", "socket,id=b,path=/run/b,server=on",
             "-chardev", "socket,id=c,path=/run/collector", "-chardev", "file,id=d,path=/log/out");
    has(line, "unix:/run/c7.qmp,server=on,wait=off");
    has(line, "path=/run/c7.a");
    has(line, "path=/run/c7-b");
    has(line, "path=/run/collector");
    has(line, "path=/log/c7-out");
}

static void a_tap_is_not_shared(void **state)
{
    static const char *const words[] = {"qemu", "-netdev", "tap,id=n0,ifname=tap0"};
    const struct qemu_name_map map = {"n0", "tap7"};
    struct qemu_clone_notes notes;
    cleanup_error struct vm_error *err = NULL;
    (void)state;
    assert_null(make(words, 3, NULL, 0, &notes, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    has(err->message, "--set n0=TAP");
    cleanup_free char *line = make(words, 3, &map, 1, &notes, NULL);
    has(line, "ifname=tap7");
}

static void what_cannot_move_is_refused(void **state)
{
    struct qemu_clone_notes notes;
    cleanup_error struct vm_error *err = NULL;
    (void)state;
    assert_null(MAKE(&notes, &err, "-device", "vfio-pci,host=01:00.0"));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    has(err->message, "vfio-pci");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_and_disk_are_the_template_s),
        cmocka_unit_test(a_disk_of_two_nodes_and_a_drive),
        cmocka_unit_test(the_first_disk_is_the_command_line_s),
        cmocka_unit_test(identity_is_fresh),
        cmocka_unit_test(paths_are_the_clone_s_own),
        cmocka_unit_test(a_tap_is_not_shared),
        cmocka_unit_test(what_cannot_move_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
