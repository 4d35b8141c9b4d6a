/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/repo/repo_test.h"

static void assert_url(const char *text, const char *path, const char *pool, const char *space,
                       const char *conf, const char *id)
{
    struct vm_error *err = NULL;
    struct repo_url url = {0};
    repo_url_parse(text, &url, &err);
    assert_ok(err);
    const char *want[] = {path, pool, space, conf, id};
    const char *got[] = {url.path, url.pool, url.name_space, url.conf, url.id};
    for (int i = 0; i < 5; i++) {
        assert_int_equal(!want[i], !got[i]);
        if (want[i])
            assert_string_equal(got[i], want[i]);
    }
    assert_string_equal(url.text, text);
    repo_url_finish(&url);
}

static void every_form_is_understood(void **state)
{
    (void)state;
    assert_url("dir:/var/lib/vmmig/repo", "/var/lib/vmmig/repo", NULL, NULL, NULL, NULL);
    assert_url("dir:/a%20b%3f", "/a b?", NULL, NULL, NULL, NULL);
    assert_url("rados:images", NULL, "images", "", NULL, "admin");
    assert_url("rados:images/tenant1", NULL, "images", "tenant1", NULL, "admin");
    assert_url("rados:images?id=vmmig", NULL, "images", "", NULL, "vmmig");
    assert_url("rados:p/n?conf=/etc/ceph/a.conf&id=u", NULL, "p", "n", "/etc/ceph/a.conf", "u");
}

static void what_makes_no_sense_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"", "repository URL \"\": it begins with neither dir: nor rados:"},
        {"/var/lib/repo",
         "repository URL \"/var/lib/repo\": it begins with neither dir: nor rados:"},
        {"dir:relative",
         "repository URL \"dir:relative\": the folder must be an absolute path (dir:/PATH)"},
        {"dir:/x?id=1", "repository URL \"dir:/x?id=1\": a dir: repository has no parameters"},
        {"rados:", "repository URL \"rados:\": it names no pool; rados:POOL[/NAMESPACE] is meant"},
        {"rados:p/", "repository URL \"rados:p/\": the namespace behind \"/\" is empty"},
        {"rados:p/a/b", "repository URL \"rados:p/a/b\": it has more than POOL/NAMESPACE"},
        {"rados:p?key=1", "repository URL \"rados:p?key=1\": \"key=1\" is no parameter of a rados: "
                          "repository; conf=FILE and id=USER are"},
        {"rados:p?id=", "repository URL \"rados:p?id=\": \"id=\" is no parameter of a rados: "
                        "repository; conf=FILE and id=USER are"},
        {"rados:p?id=a&id=b",
         "repository URL \"rados:p?id=a&id=b\": parameter \"id\" is given twice"},
        {"dir:/%0", "repository URL \"dir:/%0\": \"/%0\" has a bad % escape"},
        {"dir:/%00", "repository URL \"dir:/%00\": \"/%00\" has a bad % escape"},
        {"dir:/%", "repository URL \"dir:/%\": \"/%\" has a bad % escape"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        struct repo_url url;
        assert_int_equal(repo_url_parse(bad[i].text, &url, &err), -1);
        assert_string_equal(error_message(err), bad[i].message);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_is_understood),
        cmocka_unit_test(what_makes_no_sense_is_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
