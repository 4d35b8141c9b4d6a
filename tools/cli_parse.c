/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"

#include "base/cleanup.h"
#include "base/text.h"

#include <stddef.h>
#include <string.h>

enum { COMMANDS_MAX = 96, COMMAND_COLUMN = 19 };

static int parse_agent(const struct option *o, const char *value, void *member, struct vm_error **err)
{
    struct endpoint e;
    return endpoint_parse(value, DEFAULT_PEER_PORT, &e, err) < 0 ? -1 : option_parse_text(o, value, member, err);
}

const struct option cli_common_options[] = {
    {"json", NULL, option_parse_flag, .offset = offsetof(struct cli, json),
     .text = "Print one JSON object instead of text, also for an error"},
    {"socket", "PATH", option_parse_text, .offset = offsetof(struct cli, at.socket),
     .def = CLI_DEFAULT_SOCKET, .text = "The agent's control socket"},
    {"agent", "HOST[:PORT]", parse_agent, .offset = offsetof(struct cli, at.agent),
     .text = "Drive the agent of that host, through the one of this host, as root; a `control-peer` line there "
             "has to name this host. Paths are that host's"},
    {"help", NULL, option_parse_flag, .offset = offsetof(struct cli, help),
     .text = "Print the help of this command"},
    {NULL}};

/* The command that the words begin with, the longest name first; *ret_words: how many it took. */
static const struct cli_command *find_command(int n, char **words, int *ret_words)
{
    char two[128];
    snprintf(two, sizeof(two), "%s %s", words[0], n > 1 ? words[1] : "");
    for (const struct cli_family *const *f = cli_families; *f; f++)
        for (const struct cli_command *c = (*f)->commands; c->name; c++) {
            bool is_two = strchr(c->name, ' ');
            if (strcmp(c->name, is_two ? two : words[0]))
                continue;
            *ret_words = is_two ? 2 : 1;
            return c;
        }
    return NULL;
}

static size_t command_names(const char *names[COMMANDS_MAX + 1])
{
    size_t count = 0;
    for (const struct cli_family *const *f = cli_families; *f; f++)
        for (const struct cli_command *c = (*f)->commands; c->name && count < COMMANDS_MAX; c++)
            names[count++] = c->name;
    names[count] = NULL;
    return count;
}

/* The second words of the commands that begin with `first`, as a list; "" if there are none. */
static void second_words(const char *const *names, const char *first, char *out, size_t size)
{
    size_t k = strlen(first), used = 0;
    *out = '\0';
    for (; *names; names++)
        if (!strncmp(*names, first, k) && (*names)[k] == ' ' && used < size)
            used += (size_t)snprintf(out + used, size - used, "%s%s", used ? ", " : "",
                                     *names + k + 1);
}

static int no_such_command(int n, char **words, struct vm_error **err)
{
    const char *names[COMMANDS_MAX + 1];
    char said[128], seconds[256];
    command_names(names);
    second_words(names, words[0], seconds, sizeof(seconds));
    if (*seconds && (n < 2 || words[1][0] == '-'))
        return error_set(err, VM_ERROR_USAGE, "%.60s needs one of: %s", words[0], seconds);
    snprintf(said, sizeof(said), *seconds ? "%.40s %.40s" : "%.60s", words[0],
             *seconds ? words[1] : "");
    const char *nearest = text_nearest(said, names);
    if (nearest)
        return error_set(err, VM_ERROR_USAGE, "there is no command '%s'; did you mean '%s'?", said,
                         nearest);
    return error_set(err, VM_ERROR_USAGE, "there is no command '%s'; see vmmig --help", said);
}

/* Has the command an option of that name itself? Then the common one can only stand before the command. */
static bool has_own(const struct cli_command *command, const char *name)
{
    for (const struct option *o = command->options; o && o->name; o++)
        if (!strcmp(o->name, name))
            return true;
    return false;
}

/* The command's options and the common ones in one table; true if it hides one of the latter. */
static bool join_options(const struct cli_command *command, struct option rows[OPTIONS_MAX])
{
    size_t n = 0;
    bool hides = false;
    for (const struct option *o = command->options; o && o->name; o++)
        rows[n++] = *o;
    for (const struct option *o = cli_common_options; o->name; o++) {
        hides |= has_own(command, o->name);
        if (!has_own(command, o->name))
            rows[n++] = *o;
    }
    rows[n] = (struct option){NULL};
    return hides;
}

/* Of the options that may stand before the command. */
static bool takes_value(const char *word)
{
    return !strcmp(word, "--socket") || !strcmp(word, "--agent");
}

static int check_arguments(const struct cli_command *command, const struct cli *c,
                           struct vm_error **err)
{
    const char *name = command->name;
    if (c->args.n < command->min_args)
        return error_set(err, VM_ERROR_USAGE, "usage: vmmig %s %s", name, command->arguments);
    if (c->args.n > command->max_args)
        return error_set(err, VM_ERROR_USAGE, "unexpected argument '%.64s'; usage: vmmig %s%s%s",
                         c->args.list[command->max_args], name, *command->arguments ? " " : "",
                         command->arguments);
    if (!command->takes_rest && c->args.rest)
        return error_set(err, VM_ERROR_USAGE, "vmmig %s takes nothing behind --", name);
    if (command->takes_rest && !c->args.rest)
        return error_set(err, VM_ERROR_USAGE, "usage: vmmig %s %s", name, command->arguments);
    return 0;
}

/*
 * `run NAME QEMU ARG...` may leave `--` out: what follows the name is the rest, whatever it looks
 * like. Returns where the rest begins, argc if there is none.
 */
static int find_rest(const struct cli_command *command, int argc, char **argv)
{
    int seen = 0;
    for (int i = 0; i < argc; i++) {
        if (!strcmp(argv[i], "--"))
            return i;
        if (takes_value(argv[i]))
            i++;
        else if (argv[i][0] != '-' && seen++ == command->max_args)
            return i;
    }
    return argc;
}

/* argv: the options that stood before the command, `lead` of them, then the rest of the line. */
static int parse_command(const struct cli_command *command, int argc, char **argv, int lead,
                         struct cli *c, struct vm_error **err)
{
    struct option rows[OPTIONS_MAX];
    struct positionals none;
    bool hides = join_options(command, rows);
    if (options_set_defaults(cli_common_options, c, err) < 0 ||
        options_set_defaults(rows, c, err) < 0)
        return -1;
    if (hides) {
        if (options_parse(cli_common_options, lead, argv, c, &none, err) < 0)
            return -1;
        argc -= lead;
        argv += lead;
    }
    int end = command->takes_rest ? find_rest(command, argc, argv) : argc;
    /* A missing required option is no reason to refuse the help. */
    for (int i = 0; i < end && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help")) {
            c->help = true;
            return 0;
        }
    struct positionals args;
    if (options_parse(rows, end, argv, c, &args, err) < 0)
        return -1;
    if (end < argc) {
        args.rest = argv + end + !strcmp(argv[end], "--");
        args.n_rest = (int)(argv + argc - args.rest);
        if (!args.n_rest)
            args.rest = NULL;
    }
    c->args = args;
    return check_arguments(command, c, err);
}

char *cli_resolve(const struct cli *c, const char *path)
{
    return c->at.agent ? strdup(path) : realpath(path, NULL);
}

int cli_parse(int argc, char **argv, const struct cli_command **ret_command, struct cli *ret_cli,
              struct vm_error **err)
{
    struct cli c = {0};
    int lead = 0; /* options that stand before the command */
    while (lead < argc && !strncmp(argv[lead], "--", 2))
        lead += takes_value(argv[lead]) ? 2 : 1;
    *ret_command = NULL;
    if (lead >= argc) {
        struct positionals none;
        if (options_parse(cli_common_options, argc, argv, &c, &none, err) < 0)
            return -1;
        *ret_cli = c;
        return 0;
    }
    int words;
    const struct cli_command *command = find_command(argc - lead, argv + lead, &words);
    if (!command)
        return no_such_command(argc - lead, argv + lead, err);
    /* The words of the command go, its options and those before it become one list. */
    cleanup_free char **rest = calloc((size_t)argc + 1, sizeof(*rest));
    if (!rest)
        return error_nomem(err);
    memcpy(rest, argv, (size_t)lead * sizeof(*rest));
    memcpy(rest + lead, argv + lead + words, (size_t)(argc - lead - words) * sizeof(*rest));
    if (parse_command(command, argc - words, rest, lead, &c, err) < 0)
        return -1;
    /* The rest has to outlive the list. */
    if (c.args.rest)
        c.args.rest = argv + argc - c.args.n_rest;
    *ret_command = command;
    *ret_cli = c;
    return 0;
}

void cli_print_usage(FILE *out)
{
    fputs("usage: vmmig COMMAND [OPTION]...\n\n", out);
    text_wrap(out,
              "Moves running virtual machines between hosts and keeps their images, through the agent "
              "(vmmigd) of this host.",
              0, 0);
    for (const struct cli_family *const *f = cli_families; *f; f++) {
        fprintf(out, "\n%s:\n", (*f)->title);
        for (const struct cli_command *c = (*f)->commands; c->name; c++) {
            int column = fprintf(out, "  %-*s ", COMMAND_COLUMN, c->name);
            text_wrap(out, c->summary, column, column);
        }
    }
    fputs("\nOptions of all commands:\n", out);
    options_print_help(out, cli_common_options, "--");
    fputs("\n`vmmig COMMAND --help` says more about a command.\n", out);
}

static void print_usage_line(FILE *out, const struct cli_command *command)
{
    fprintf(out, "vmmig %s%s%s%s", command->name, *command->arguments ? " " : "",
            command->arguments, command->options ? " [OPTION]..." : "");
}

void cli_print_command_help(FILE *out, const struct cli_command *command)
{
    fputs("usage: ", out);
    print_usage_line(out, command);
    fputs("\n\n", out);
    text_wrap(out, command->text, 0, 0);
    fputs("\nOptions:\n", out);
    struct option rows[OPTIONS_MAX];
    join_options(command, rows);
    options_print_help(out, rows, "--");
}

static void print_command_manual(FILE *out, const struct cli_command *c)
{
    fprintf(out, "\n### vmmig %s\n\n    ", c->name);
    print_usage_line(out, c);
    fputs("\n\n", out);
    text_wrap(out, c->text, 0, 0);
    if (c->options)
        options_print_manual(out, c->options, "--");
}

static const char manual_output[] =
    "Text is for people and may change; --json is stable: one object on standard output. Times "
    "are milliseconds, sizes bytes, rates bytes a second, instants RFC 3339 in UTC; null is what "
    "is not known. An error is one line on standard error, or with --json the object `{\"error\": "
    "{\"kind\": \"not-found\", \"message\": \"...\"}}` on standard output; a job that failed is "
    "its object, which has such an `error`, too.";

void cli_print_manual(FILE *out)
{
    fputs("<!-- Generated by `vmmig --manual`. -->\n\n# vmmig(1): drive the agent of a host\n\n"
          "    vmmig COMMAND [OPTION]...\n\n", out);
    text_wrap(out,
              "`vmmig` talks to `vmmigd`, the agent of this host (vmmigd(8)), which keeps virtual "
              "machines, moves them, running, to other hosts, and keeps images in a repository. The "
              "commands about images also work without an agent, with `--repo URL`.",
              0, 0);
    for (const struct cli_family *const *f = cli_families; *f; f++) {
        fprintf(out, "\n## %s\n", (*f)->title);
        for (const struct cli_command *c = (*f)->commands; c->name; c++)
            print_command_manual(out, c);
    }
    fputs("\n## Options of all commands\n", out);
    options_print_manual(out, cli_common_options, "--");
    fputs("\n## Output\n\n", out);
    text_wrap(out, manual_output, 0, 0);
    for (const struct cli_family *const *f = cli_families; *f; f++)
        for (const struct cli_object *o = (*f)->objects; o && o->of; o++) {
            fprintf(out, "\n%s\n:   ", o->of);
            text_wrap(out, o->fields, 4, 4);
        }
    fputs("\n## Exit status\n\n", out);
    fputs("| status | kind | meaning |\n|---|---|---|\n| 0 | | done |\n", out);
    for (int i = 0; i < VM_ERROR_KIND_COUNT; i++)
        fprintf(out, "| %d | %s | %s |\n", error_kind_status(i), error_kind_name(i),
                error_kind_text(i));
    fprintf(out, "| %d | | interrupted by Ctrl-C; what was under way goes on in the agent |\n",
            CLI_STATUS_INTERRUPTED);
}
