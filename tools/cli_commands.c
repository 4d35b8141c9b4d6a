/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"
#include "client/client.h"
#include "tools/cli_print.h"

static int run_version(const struct cli *c, struct vm_error **err)
{
    CLEANUP(client) struct client *client = client_open(&c->at, NULL);
    const char *agent = client ? client_software(client) : NULL;
    if (c->json)
        return cli_print_json(json_pack("{s:s, s:s?}", "vmmig", VMMIG_VERSION, "agent", agent),
                              err);
    printf("vmmig " VMMIG_VERSION "\nagent: %s\n", agent ? agent : "none answers");
    return 0;
}

static const struct cli_command commands[] = {
    {"version", "", 0, 0, false, NULL, "versions of this command and of the agent",
     "Print the versions of this command and of the agent, if one answers.", run_version},
    {NULL}};

static const struct cli_object objects[] = {
    {"version", "vmmig, agent (null if none answers)"},
    {NULL}};

static const struct cli_family about = {"About", commands, objects};

const struct cli_family *const cli_families[] = {
    &cli_family_vm,
    &cli_family_snapshot,
    &cli_family_image,
    &cli_family_repo,
    &cli_family_clone,
    &cli_family_pki,
    &cli_family_doctor,
    &about,
    NULL};
