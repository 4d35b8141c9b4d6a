/* SPDX-License-Identifier: Apache-2.0 */
/* Command lines before and after a disk was put elsewhere. */
#include "vmm/qemu_definition.h"
#include "vmm/qemu_disk_move.h"
#include "vmm/rbd_name.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* "qemu" and two words, which may hold blanks; the whole is one allocation, as that of a definition. */
static char **words(const char *option, const char *value)
{
    size_t n = strlen(option) + 1;
    char **argv = malloc(4 * sizeof(*argv) + 5 + n + strlen(value) + 1);
    char *text = (char *)(argv + 4);
    argv[0] = strcpy(text, "qemu");
    argv[1] = strcpy(text + 5, option);
    argv[2] = strcpy(text + 5 + n, value);
    argv[3] = NULL;
    return argv;
}

static void fill(struct qemu_definition *d, const char *option, const char *value, const char *file)
{
    d->argv = words(option, value);
    d->cwd = strdup("/vm");
    struct qemu_disk *k = qemu_definition_add_disk(d);
    *k = (struct qemu_disk){.name = strdup("root"), .node = strdup("n"), .file = strdup(file),
                            .driver = strdup(strstr(file, "rbd") ? "rbd" : "file"), .format = strdup("raw")};
}

static void it_is_named_where_it_goes(void **state)
{
    static const struct {
        const char *file, *option, *value, *to, *expected;
    } cases[] = {
        {"/a.img", "-drive", "file=/a.img,if=virtio", "/b.img", "file=/b.img,if=virtio"},
        {"a.img", "-hda", "a.img", "/b.img", "/b.img"},
        {"/vm/a.img", "-hda", "a.img", "rbd:p/i", "rbd:p/i"},
        {"/a.img", "-blockdev", "driver=file,filename=/a.img,node-name=n,aio=native", "/b.img",
         "file,filename=/b.img,node-name=n,aio=native"},
        /* A file becomes an image in Ceph: in one word where it was one, else member by member. */
        {"/a.img", "-drive", "file=/a.img,format=raw", "rbd:p/i:id=u",
         "file=rbd:p/i:id=u,format=raw"},
        {"/a.img", "-blockdev",
         "driver=file,filename=/a.img,node-name=n,aio=native,cache.direct=on",
         "rbd:p/s/i:id=u:conf=/c",
         "rbd,node-name=n,cache.direct=on,pool=p,namespace=s,image=i,user=u,conf=/c"},
        {"/a.img", "-blockdev",
         "driver=raw,node-name=n,file.driver=file,file.filename=/a.img,file.locking=off", "rbd:p/i",
         "raw,node-name=n,file.driver=rbd,file.pool=p,file.image=i"},
        {"/a.img", "-drive", "driver=qcow2,file.driver=file,file.filename=/a.img,id=d", "rbd:p/i",
         "driver=qcow2,file.driver=rbd,id=d,file.pool=p,file.image=i"},
        /* An image in Ceph becomes a file, or another image. */
        {"rbd:p/i:conf=/c", "-drive", "file=rbd:p/i:conf=/c,format=raw", "/b.img",
         "file=/b.img,format=raw"},
        {"json:{\"driver\": \"rbd\", \"pool\": \"p\", \"image\": \"i\"}", "-blockdev",
         "driver=rbd,pool=p,image=i,conf=/c,user=u,server.0.host=h,node-name=n", "/b.img",
         "file,node-name=n,filename=/b.img"},
        {"rbd:p/i", "-blockdev", "driver=raw,file.driver=rbd,file.pool=p,file.image=i,file.conf=/c",
         "rbd:q/j", "raw,file.driver=rbd,file.pool=q,file.image=j"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_qemu_definition struct qemu_definition d = {0};
        cleanup_error struct vm_error *err = NULL;
        fill(&d, cases[i].option, cases[i].value, cases[i].file);
        if (qemu_disk_move(&d, 0, cases[i].to, &err) < 0)
            fail_msg("%s: %s", cases[i].value, error_message(err));
        assert_string_equal(d.argv[2], cases[i].expected);
        assert_string_equal(d.disks[0].file, cases[i].to);
        assert_string_equal(d.disks[0].driver, *cases[i].to == '/' ? "file" : "rbd");
    }
}

static void what_cannot_go_elsewhere_is_refused(void **state)
{
    static const struct {
        const char *file, *value, *to, *says;
    } cases[] = {
        {"/a.img", "file=/other.img", "/b.img", "does not name it plainly"},
        {"/a.img", "file=json:{\"driver\": \"file\",, \"filename\": \"/a.img\"}", "/b.img", "does not name it plainly"},
        {"rbd:p/i", "file=rbd:p/other", "/b.img", "does not name it plainly"},
        {"/a.img", "file=/a.img", "b.img", "neither a path nor"},
        {"/a.img", "file=/a.img", "rbd:p", "neither a path nor"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_qemu_definition struct qemu_definition d = {0};
        cleanup_error struct vm_error *err = NULL;
        fill(&d, "-drive", cases[i].value, cases[i].file);
        assert_int_equal(qemu_disk_move(&d, 0, cases[i].to, &err), -1);
        if (!strstr(error_message(err), cases[i].says))
            fail_msg("%s: %s", cases[i].value, error_message(err));
        assert_string_equal(d.disks[0].file, cases[i].file);
    }
    cleanup_qemu_definition struct qemu_definition d = {0};
    cleanup_error struct vm_error *err = NULL;
    fill(&d, "-drive", "file=nbd://h", "nbd://h");
    free(d.disks[0].driver);
    d.disks[0].driver = strdup("nbd");
    assert_int_equal(qemu_disk_move(&d, 0, "/b.img", &err), -1);
    assert_string_equal(error_message(err), "disk root (nbd://h) cannot be put elsewhere: it is no file, but a nbd");
}

static void names_of_images_come_back(void **state)
{
    static const char *const texts[] = {"rbd:p/i", "rbd:p/n/i", "rbd:p/i@s", "rbd:p/i:id=u:conf=/a\\:b",
                                        "rbd:p\\/q/i\\:j"};
    for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
        struct rbd_name name, again;
        char text[RBD_NAME_TEXT_MAX];
        assert_true(rbd_name_parse(texts[i], &name));
        assert_true(rbd_name_format(&name, text));
        assert_true(rbd_name_parse(text, &again));
        assert_memory_equal(&name, &again, sizeof(name));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_is_named_where_it_goes),
        cmocka_unit_test(what_cannot_go_elsewhere_is_refused),
        cmocka_unit_test(names_of_images_come_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
