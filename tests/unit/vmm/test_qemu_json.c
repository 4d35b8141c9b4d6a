/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cleanup.h"
#include "vmm/qemu_json.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <string.h>
#include <cmocka.h>

static char *copy(const char *text)
{
    char *made = strdup(text);
    assert_non_null(made);
    return made;
}

static void fill(struct qemu_json *vm)
{
    static const char *const words[] = {
        "qemu-system-x86_64", "-machine", "memory-backend=pc.ram", "-object",
        "memory-backend-file,id=pc.ram,size=1048576,share=on", "-object",
        "memory-backend-file,id=more,size=2097152,share=on", NULL};
    struct qemu_definition *d = &vm->definition;
    strcpy(vm->name, "web1");
    d->argv = calloc(1, sizeof(words));
    memcpy(d->argv, words, sizeof(words));
    d->boot = uuid_new();
    d->binary = copy("qemu-system-x86_64");
    d->cwd = copy("/");
    d->version[0] = 7, d->version[1] = 2;
    d->machine = copy("pc-q35-7.2");
    d->accel = copy("tcg");
    d->cpu_model = copy("qemu64-x86_64-cpu");
    d->cpu_features = copy("");
    d->n_cpus = 2;
    d->state = GUEST_RUNNING;
    d->memory = 3 << 20;
    *qemu_definition_add_ram(d) = (struct qemu_ram){copy("pc.ram"), copy("pc.ram"), 1 << 20, 4096};
    *qemu_definition_add_ram(d) = (struct qemu_ram){copy("/objects/more"), copy("more"), 2 << 20, 4096};
    *qemu_definition_add_disk(d) = (struct qemu_disk){.name = copy("disk"), .node = copy("#b0"),
        .file = copy("/behind"), .driver = copy("file"), .format = copy(""), .backing = true};
    *qemu_definition_add_disk(d) = (struct qemu_disk){
        copy("disk"), copy("#b1"), copy("/x \"y\""), copy("file"), copy("qcow2"), true, false};
    *qemu_definition_add_nic(d) = (struct qemu_nic){copy("net0"), copy("tap"), copy("tap0")};
    *qemu_definition_add_device(d) = (struct qemu_device){copy("/machine/a"), copy("child<b>")};
    assert_int_equal(qemu_json_name_files(vm, NULL), 0);
}

static void comes_back_as_it_was(void **state)
{
    (void)state;
    cleanup_qemu_json struct qemu_json vm = {0}, back = {0};
    fill(&vm);
    cleanup_free char *text = qemu_json_write(&vm, NULL);
    assert_non_null(text);
    cleanup_error struct vm_error *err = NULL;
    if (qemu_json_read(text, strlen(text), &back, &err) < 0)
        fail_msg("%s", error_message(err));
    cleanup_free char *again = qemu_json_write(&back, NULL);
    assert_string_equal(text, again);
    assert_string_equal(back.ram_files[0], "memory.raw");
    assert_string_equal(back.ram_files[1], "memory.more.raw");
    /* A backing file is neither numbered nor written. */
    assert_string_equal(vm.disk_files[0], "");
    assert_int_equal(back.definition.n_disks, 1);
    assert_string_equal(back.disk_files[0], "disk0.raw");
    assert_string_equal(back.definition.disks[0].file, "/x \"y\"");
}

/* Whatever is cut off or changed, it is an error with a message, never a definition. */
static void damage_is_told(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *says;
    } cases[] = {
        {"vmmig-vm", "vmmig-xx", "not a VM's definition"},
        {"\"version\": 1", "\"version\": 2", "later version"},
        {"\"qemu\"", "\"bhyve\"", "another kind"},
        {"\"qemu\"", "\"attach\"", "do not agree"},
        {"\"memory.raw\"", "\"../../etc\"", "no name of a file"},
        {"\"memory.more.raw\"", "\"memory.raw\"", "twice"},
        {"\"size\": 1048576", "\"size\": 1048577", "impossible size"},
        {"\"argv\"", "\"argw\"", "no command line"},
    };
    cleanup_qemu_json struct qemu_json vm = {0};
    fill(&vm);
    cleanup_free char *text = qemu_json_write(&vm, NULL);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        char changed[8192];
        const char *at = strstr(text, cases[i].from);
        assert_non_null(at);
        snprintf(changed, sizeof(changed), "%.*s%s%s", (int)(at - text), text, cases[i].to,
                 at + strlen(cases[i].from));
        cleanup_error struct vm_error *err = NULL;
        struct qemu_json back;
        assert_int_equal(qemu_json_read(changed, strlen(changed), &back, &err), -1);
        if (!strstr(error_message(err), cases[i].says))
            fail_msg("%s: %s", cases[i].to, error_message(err));
    }
    for (size_t n = 0; n + 1 < strlen(text); n += 7) {
        struct qemu_json back;
        assert_int_equal(qemu_json_read(text, n, &back, NULL), -1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(comes_back_as_it_was),
        cmocka_unit_test(damage_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
