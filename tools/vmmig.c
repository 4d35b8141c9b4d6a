/* SPDX-License-Identifier: Apache-2.0 */
/* vmmig: the command that drives an agent. See tools/cli.h for how it is put together. */
#include "tools/cli.h"
#include "tools/cli_local.h"
#include "tools/cli_print.h"

#include <locale.h>
#include <signal.h>
#include <string.h>

static bool wants(int argc, char **argv, const char *option)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], option))
            return true;
    return false;
}

/* What is asked without a command: --help, --version, --manual; or `vmmig help [COMMAND]`. */
static bool print_about(int argc, char **argv)
{
    const char *first = argc > 1 ? argv[1] : "";
    if (!strcmp(first, "--version")) {
        puts("vmmig " VMMIG_VERSION);
        return true;
    }
    if (!strcmp(first, "--manual")) {
        cli_print_manual(stdout);
        return true;
    }
    if (argc == 2 && (!strcmp(first, "help") || !strcmp(first, "--help") || !strcmp(first, "-h"))) {
        cli_print_usage(stdout);
        return true;
    }
    return false;
}

static int run(int argc, char **argv, struct vm_error **err)
{
    const struct cli_command *command;
    struct cli c;
    if (print_about(argc, argv))
        return 0;
    if (argc > 2 && !strcmp(argv[1], "help")) {
        /* `help COMMAND` is `COMMAND --help`. */
        static char help[] = "--help";
        memmove(argv + 1, argv + 2, (size_t)(argc - 2) * sizeof(*argv));
        argv[argc - 1] = help;
    }
    if (cli_parse(argc - 1, argv + 1, &command, &c, err) < 0)
        return -1;
    if (!command && !c.help)
        return error_set(err, VM_ERROR_USAGE, "a command is missing; see vmmig --help");
    if (!command) {
        cli_print_usage(stdout);
        return 0;
    }
    if (c.help) {
        cli_print_command_help(stdout, command);
        return 0;
    }
    c.argv = argv;
    if (c.repo && cli_local_enter(&c, err) < 0)
        return -1;
    return command->run(&c, err);
}

static void report(const struct vm_error *err, bool json)
{
    cleanup_error struct vm_error *ignored = NULL;
    if (!json || cli_print_json(cli_json_error(err), &ignored) < 0)
        fprintf(stderr, "vmmig: %s\n", error_message(err));
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    setlocale(LC_CTYPE, "");
    signal(SIGPIPE, SIG_IGN);
    int r = run(argc, argv, &err);
    if (r < 0) {
        report(err, wants(argc, argv, "--json"));
        r = error_kind_status(err ? err->kind : VM_ERROR_FAILED);
    }
    if (fflush(stdout) == EOF && r == 0)
        r = error_kind_status(VM_ERROR_SYSTEM);
    return r;
}
