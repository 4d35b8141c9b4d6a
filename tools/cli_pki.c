/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"
#include "tools/cli_local.h"
#include "tools/cli_print.h"

#include "proto/control.h"

static int say_pki(const struct cli *c, const char *host, struct vm_error **err)
{
    const char *dir = c->args.list[0];
    char certificate[FIELD_PATH_MAX + 1], key[FIELD_PATH_MAX + 1];
    snprintf(certificate, sizeof(certificate), "%s/%s.crt", dir, host);
    snprintf(key, sizeof(key), "%s/%s.key", dir, host);
    if (c->json)
        return cli_print_json(json_pack("{s:s, s:s}", "certificate", certificate, "key", key), err);
    printf("wrote %s and %s\n", certificate, key);
    return 0;
}

static int run_pki_init(const struct cli *c, struct vm_error **err)
{
    return cli_local_pki_init(c, c->args.list[0], err) < 0 ? -1 : say_pki(c, "ca", err);
}

static int run_pki_issue(const struct cli *c, struct vm_error **err)
{
    struct pki_host host = {
        .name = c->args.list[1],
        .ips = c->ips.list,
        .n_ips = c->ips.n,
        .days = (unsigned)c->days,
        .replace = c->replace,
    };
    return cli_local_pki_issue(c, c->args.list[0], &host, err) < 0 ? -1 : say_pki(c, host.name, err);
}

static int run_pki_revoke(const struct cli *c, struct vm_error **err)
{
    const char *dir = c->args.list[0], *host = c->args.list[1];
    char list[FIELD_PATH_MAX + 1];
    if (cli_local_pki_revoke(c, dir, host, err) < 0)
        return -1;
    snprintf(list, sizeof(list), "%s/ca.crl", dir);
    if (c->json)
        return cli_print_json(json_pack("{s:s}", "list", list), err);
    printf("wrote %s; it holds once each host has it where its `crl` says\n", list);
    return 0;
}

static int parse_ip(const struct option *o, const char *value, void *member, struct vm_error **err)
{
    struct cli_ips *ips = member;
    (void)o;
    if (ips->n == CLI_IPS_MAX)
        return error_set(err, VM_ERROR_USAGE, "more than %d addresses", CLI_IPS_MAX);
    ips->list[ips->n++] = value;
    return 0;
}

static const struct option pki_issue_options[] = {
    {"ip", "ADDRESS", parse_ip, .offset = offsetof(struct cli, ips), .repeatable = true,
     .text = "An address by which the host is dialled besides its name"},
    {"days", "N", option_parse_u64, .offset = offsetof(struct cli, days), .min = 1, .max = PKI_CA_DAYS, .unit = "days",
     .def = "825", .text = "How long the certificate is valid"},
    {"replace", NULL, option_parse_flag, .offset = offsetof(struct cli, replace),
     .text = "Renew: replace the files if they exist"},
    {NULL}};

static const struct cli_command commands[] = {
    {"pki init", "DIR", 1, 1, false, NULL, "make a certificate authority for a new cluster",
     "Make the certificate authority of a cluster: ca.crt and ca.key in DIR. Whoever has ca.key "
     "can admit hosts; keep it off the hosts.",
     run_pki_init},
    {"pki issue", "DIR HOST", 2, 2, false, pki_issue_options, "issue a host's certificate",
     "Issue HOST.crt and HOST.key, with which that host's agent is admitted to the cluster. Copy "
     "them and ca.crt to the host.\n\n"
     "    vmmig pki issue pki host2 --ip 10.0.0.2 --ip fd00::2",
     run_pki_issue},
    {"pki revoke", "DIR HOST", 2, 2, false, NULL, "shut a host out of the cluster",
     "Add HOST.crt to the list of revoked certificates, ca.crl in DIR: of a host that was stolen or taken out of "
     "service. Copy the list to each host, where `crl` in vmmigd.conf names it: agents read it again when it changes, "
     "and refuse that host from then on. Revoke before the certificate is replaced.\n\n"
     "    vmmig pki revoke pki host2",
     run_pki_revoke},
    {NULL}};

static const struct cli_object objects[] = {
    {"pki init, pki issue", "certificate, key"},
    {"pki revoke", "list"},
    {NULL}};

const struct cli_family cli_family_pki = {"Certificates", commands, objects};
