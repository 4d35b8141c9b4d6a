/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"

#include "base/text.h"
#include "proto/control.h"
#include "tools/cli_print.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MAX_WORDS 16

static char copies[MAX_WORDS][100];
static char *argv[MAX_WORDS + 1];

/* Split `line` at blanks and parse it. */
static int parse(const char *line, const struct cli_command **command, struct cli *c,
                 struct vm_error **err)
{
    char text[512];
    int argc = 0;
    snprintf(text, sizeof(text), "%s", line);
    for (char *w = strtok(text, " "); w; w = strtok(NULL, " ")) {
        argv[argc] = strcpy(copies[argc], w);
        argc++;
    }
    argv[argc] = NULL;
    return cli_parse(argc, argv, command, c, err);
}

static void a_send_with_everything(void **state)
{
    (void)state;
    const struct cli_command *command;
    struct cli c;
    assert_int_equal(parse("send web1 --to host2:7 --downtime-limit 50 --max-bandwidth 1gbit "
                           "--connections=4 --compress zstd --assume-shared --background --json",
                           &command, &c, NULL), 0);
    assert_string_equal(command->name, "send");
    assert_string_equal(c.args.list[0], "web1");
    assert_string_equal(c.to, "host2:7");
    assert_int_equal(c.downtime_limit_ms, 50);
    assert_int_equal(c.max_bandwidth, 125000000);
    assert_int_equal(c.connections, 4);
    assert_int_equal(c.compress, VMMIG__CONTROL__COMPRESS__COMPRESS_ZSTD);
    assert_true(c.assume_shared && c.background && c.json);
    assert_string_equal(c.at.socket, CLI_DEFAULT_SOCKET);
}

/* The words of --compress are numbered as the protocol's enum. */
static void compressions_have_the_protocols_numbers(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        unsigned number;
    } cases[] = {{"send a --to b --compress auto", VMMIG__CONTROL__COMPRESS__COMPRESS_AUTO},
                 {"send a --to b --compress none", VMMIG__CONTROL__COMPRESS__COMPRESS_NONE},
                 {"send a --to b --compress lz4", VMMIG__CONTROL__COMPRESS__COMPRESS_LZ4},
                 {"send a --to b --compress zstd", VMMIG__CONTROL__COMPRESS__COMPRESS_ZSTD},
                 {"send a --to b", VMMIG__CONTROL__COMPRESS__COMPRESS_AUTO}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        const struct cli_command *command;
        struct cli c;
        assert_int_equal(parse(cases[i].line, &command, &c, NULL), 0);
        assert_int_equal(c.compress, cases[i].number);
    }
}

static void assert_rest(const char *line, const char *name, bool json, const char *expected)
{
    const struct cli_command *command;
    struct cli c;
    char rest[200] = "";
    assert_int_equal(parse(line, &command, &c, NULL), 0);
    assert_string_equal(command->name, "run");
    assert_string_equal(c.args.list[0], name);
    assert_int_equal(c.json, json);
    for (int i = 0; i < c.args.n_rest; i++) {
        strcat(rest, c.args.rest[i]);
        strcat(rest, " ");
    }
    assert_string_equal(rest, expected);
    assert_null(c.args.rest[c.args.n_rest]);
}

static void a_command_line_is_not_looked_into(void **state)
{
    (void)state;
    assert_rest("run web1 -- qemu -m 4G --json", "web1", false, "qemu -m 4G --json ");
    assert_rest("run --json web1 -- qemu --help", "web1", true, "qemu --help ");
    assert_rest("run web1 --json -- qemu -- x", "web1", true, "qemu -- x ");
    assert_rest("run web1 qemu -m 4G --json", "web1", false, "qemu -m 4G --json ");
    assert_rest("--json run --socket /s web1 qemu -x", "web1", true, "qemu -x ");
}

static void options_may_stand_before_the_command(void **state)
{
    (void)state;
    const struct cli_command *command;
    struct cli c;
    assert_int_equal(parse("--socket /x --json pki issue dir host --days 5", &command, &c, NULL),
                     0);
    assert_string_equal(command->name, "pki issue");
    assert_string_equal(c.at.socket, "/x");
    assert_null(c.at.agent);
    assert_true(c.json);
    assert_int_equal(c.args.n, 2);
    assert_string_equal(c.args.list[1], "host");
    assert_int_equal(c.days, 5);
    assert_int_equal(parse("--help", &command, &c, NULL), 0);
    assert_null(command);
    assert_true(c.help);
}

static void the_agent_of_another_host_may_be_named_anywhere(void **state)
{
    const struct cli_command *command;
    struct cli c;
    (void)state;
    assert_int_equal(parse("--agent host2:1 list", &command, &c, NULL), 0);
    assert_string_equal(command->name, "list");
    assert_string_equal(c.at.agent, "host2:1");
    assert_int_equal(parse("send web1 --to host3 --agent host2", &command, &c, NULL), 0);
    assert_string_equal(c.at.agent, "host2");
    assert_string_equal(c.at.socket, CLI_DEFAULT_SOCKET);
    assert_rest("run --agent host2 web1 qemu --agent x", "web1", false, "qemu --agent x ");
}

/* `attach` has a --socket of its own: the agent's can only stand before the command. */
static void a_commands_own_option_hides_the_common_one(void **state)
{
    (void)state;
    const struct cli_command *command;
    struct cli c;
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(parse("--json --socket /agent attach web1 --socket /vmm", &command, &c, NULL), 0);
    assert_string_equal(c.at.socket, "/agent");
    assert_string_equal(c.vmm_socket, "/vmm");
    assert_true(c.json);
    assert_int_equal(parse("attach web1 --socket /vmm --json", &command, &c, NULL), 0);
    assert_string_equal(c.at.socket, CLI_DEFAULT_SOCKET);
    assert_string_equal(c.vmm_socket, "/vmm");
    assert_true(c.json);
    assert_int_equal(parse("attach web1 --socket /vmm --socket /agent", &command, &c, &err), -1);
}

static void help_needs_no_arguments(void **state)
{
    (void)state;
    const struct cli_command *command;
    struct cli c;
    assert_int_equal(parse("send --help", &command, &c, NULL), 0);
    assert_true(c.help);
    assert_int_equal(parse("run --help", &command, &c, NULL), 0);
    assert_true(c.help);
}

static void bad_lines_get_one_clear_line(void **state)
{
    (void)state;
    static const struct {
        const char *line, *message;
    } cases[] = {
        {"lst", "there is no command 'lst'; did you mean 'list'?"},
        {"frobnicate", "there is no command 'frobnicate'; see vmmig --help"},
        {"pki isue x y", "there is no command 'pki isue'; did you mean 'pki issue'?"},
        {"pki", "pki needs one of: init, issue, revoke"},
        {"pki --json", "pki needs one of: init, issue, revoke"},
        {"send web1", "--to HOST[:PORT] is required"},
        {"send --to h", "usage: vmmig send NAME --to HOST"},
        {"send web1 web2 --to h",
         "unexpected argument 'web2'; usage: vmmig send NAME --to HOST"},
        {"list x", "unexpected argument 'x'; usage: vmmig list"},
        {"list -- x", "vmmig list takes nothing behind --"},
        {"run web1", "usage: vmmig run NAME -- VMM [ARGUMENT]..."},
        {"run web1 --", "usage: vmmig run NAME -- VMM [ARGUMENT]..."},
        {"status web1 --to h", "there is no option --to"},
        {"send web1 --to h --downtime-limit 0",
         "--downtime-limit 0: at least 1 is allowed"},
        {"send web1 --to h --connections 17", "--connections 17: at most 8 is allowed"},
        {"send web1 --to h --background=no", "--background takes no value"},
        {"send web1 --bakground --to h",
         "there is no option --bakground; did you mean --background?"},
        {"--jsn list", "there is no option --jsn; did you mean --json?"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        const struct cli_command *command;
        struct cli c;
        assert_int_equal(parse(cases[i].line, &command, &c, &err), -1);
        assert_string_equal(error_message(err), cases[i].message);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

static void progress_is_one_line(void **state)
{
    (void)state;
    char line[400], tiny[8];
    Vmmig__Control__Job job = VMMIG__CONTROL__JOB__INIT;
    Vmmig__Control__Pages zero = VMMIG__CONTROL__PAGES__INIT, lz4 = VMMIG__CONTROL__PAGES__INIT;
    Vmmig__Control__Pages *pages[] = {&zero, &lz4};
    char phase[] = "copying", z[] = "zero", l[] = "lz4", note[] = "throttling", vm[] = "web1";
    job.vm = vm;
    job.phase = phase;
    job.round = 3;
    job.total = 1 << 30;
    job.remaining = 64 << 20;
    job.dirty_rate = 10 << 20;
    job.link_rate = 100 << 20;
    job.wire_bytes = 1;
    job.predicted_pause_ns = 120000000;
    zero.encoding = z;
    zero.pages = 100;
    lz4.encoding = l;
    lz4.pages = 100;
    lz4.wire_bytes = 204800;
    job.pages = pages;
    job.n_pages = 2;
    job.throttle_percent = 20;
    job.note = note;
    cli_format_progress(&job, line, sizeof(line));
    assert_string_equal(line,
                        "copying round 3, 64.0 MiB left, dirty 10.0 MiB/s, link 100 MiB/s, pause "
                        "~120 ms, throttle 20%, saved zero 50% lz4 25% (throttling)");
    cli_format_progress(&job, tiny, sizeof(tiny)); /* cut, never written past */
    assert_int_equal(strlen(tiny), sizeof(tiny) - 1);
}

static void repository_progress_is_one_line(void **state)
{
    (void)state;
    char line[400];
    Vmmig__Control__Job job = VMMIG__CONTROL__JOB__INIT;
    char kind[] = "import", peer[] = "debian12";
    job.kind = kind;
    job.peer = peer;
    cli_format_progress(&job, line, sizeof(line));
    assert_string_equal(line, "import debian12");
    job.total = 2048ULL << 20;
    job.remaining = 1024ULL << 20;
    job.stored_bytes = 256 << 20;
    job.elapsed_ns = 2000000000;
    cli_format_progress(&job, line, sizeof(line));
    assert_string_equal(line, "import debian12 [#####     ]  50% of 2.0 GiB, 512 MiB/s, 4.0:1, "
                              "256 MiB stored");
    char gc[] = "gc", nobody[] = "";
    job.kind = gc;
    job.peer = nobody;
    job.stored_bytes = 0;
    job.total = 3;
    job.remaining = 1;
    cli_format_progress(&job, line, sizeof(line));
    assert_string_equal(line, "gc [######    ]  67% of 3 objects, 1 object/s");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_send_with_everything),
        cmocka_unit_test(compressions_have_the_protocols_numbers),
        cmocka_unit_test(a_command_line_is_not_looked_into),
        cmocka_unit_test(options_may_stand_before_the_command),
        cmocka_unit_test(the_agent_of_another_host_may_be_named_anywhere),
        cmocka_unit_test(a_commands_own_option_hides_the_common_one),
        cmocka_unit_test(help_needs_no_arguments),
        cmocka_unit_test(bad_lines_get_one_clear_line),
        cmocka_unit_test(progress_is_one_line),
        cmocka_unit_test(repository_progress_is_one_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
