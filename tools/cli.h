/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli: the commands of `vmmig` as rows of tables, one table and one file (tools/cli_FAMILY.c) per
 * family. From a row come the parser, the help and the manual page; tests/unit/tools compares them.
 *
 * Output contract. Without --json: what a person reads on standard output; errors as one line
 * "vmmig: ..." on standard error. With --json: exactly one object on standard output, also for an
 * error: {"error": {"kind": ..., "message": ...}}. The exit status is that of the error's kind.
 */
#ifndef VMMIG_TOOLS_CLI_H
#define VMMIG_TOOLS_CLI_H

#include "base/error.h"
#include "base/options.h"
#include "client/client.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define CLI_DEFAULT_SOCKET "/run/vmmig/control.sock"
#define CLI_STATUS_INTERRUPTED 130

/* Everything that a command line can say. */
enum { CLI_IPS_MAX = 32 };

struct cli {
    char **argv; /* as it came, with the command's own name */
    struct positionals args;
    struct client_target at; /* the agent */
    bool json, help;
    const char *qmp;
    const char *vmm_socket;
    const char *to;
    uint64_t downtime_limit_ms, max_bandwidth, connections;
    unsigned compress; /* Vmmig__Control__Compress */
    const char *dest_qmp, *dest_socket;
    bool assume_shared, background, check;
    bool here, gone;
    const char *fenced;
    struct cli_ips {
        const char *list[CLI_IPS_MAX];
        unsigned n;
    } ips;
    uint64_t days;
    bool disk_only, dry_run, paused;
    const char *guest_agent, *as, *disk_dir;
    uint64_t keep_last, keep_daily, keep_weekly;
    bool replace;
    const char *arm;
    const char *repo, *format, *parent, *file, *data_pool;
    uint64_t fence_after_s, older_than_h;
    bool repack, heal;
    const char *set;
    uint64_t count, disk_size, memory;
};

struct cli_command {
    const char *name;      /* "send", "pki issue" */
    const char *arguments; /* "NAME", as the usage line says it */
    int min_args, max_args;
    bool takes_rest;       /* a command line behind `--` */
    const struct option *options;
    const char *summary;   /* one line of the list of commands */
    const char *text;      /* paragraphs of the help */
    /* 0, or -1 with an error; a positive value is the exit status, everything having been said. */
    int (*run)(const struct cli *c, struct vm_error **err);
};

/* What a JSON object of these commands is made of, for the manual; tests compare it. */
struct cli_object {
    const char *of, *fields;
};

/* Commands that belong together: a file of tools/, a block of the help, a chapter of the manual. */
struct cli_family {
    const char *title;
    const struct cli_command *commands; /* ended by a row without a name */
    const struct cli_object *objects;   /* ended by a row without `of`; may be NULL */
};

extern const struct cli_family cli_family_vm, cli_family_snapshot, cli_family_image, cli_family_clone,
    cli_family_repo, cli_family_pki, cli_family_doctor;
/* In the order of the help, ended by NULL. A new family is declared above and listed in
 * tools/cli_commands.c. */
extern const struct cli_family *const cli_families[];
/* --json, --socket, --agent, --help: what every command takes. */
extern const struct option cli_common_options[];

/*
 * Find and parse: *ret_command, *ret_cli. A first word that is no command is USAGE with the
 * nearest one; no word at all gives NULL in *ret_command. Options may also stand before the
 * command.
 */
int cli_parse(int argc, char **argv, const struct cli_command **ret_command, struct cli *ret_cli,
              struct vm_error **err);
/* A path of the user's as the agent is to be told it, allocated; NULL and errno. That of another
 * host stays as it is. */
char *cli_resolve(const struct cli *c, const char *path);
void cli_print_usage(FILE *out);
void cli_print_command_help(FILE *out, const struct cli_command *command);
void cli_print_manual(FILE *out);

#endif
