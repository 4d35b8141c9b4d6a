/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"
#include "client/client.h"
#include "tools/cli_print.h"

static int run_doctor(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Doctor m = VMMIG__CONTROL__DOCTOR__INIT;
    if (c->args.n) {
        m.vm = client_word(c->args.list[0]);
        if (vm_name_check(m.vm, err) < 0)
            return error_wrap(err, "'%.80s'", m.vm);
    }
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__DOCTOR, &m.base, VMMIG__CONTROL__TYPE__DIAGNOSIS,
                &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_diagnosis(answer.diagnosis), err);
    cli_print_diagnosis(stdout, answer.diagnosis);
    return 0;
}

static int run_debug_faults(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Faults m = VMMIG__CONTROL__FAULTS__INIT;
    if (c->arm) {
        m.set = true;
        m.arm = client_word(c->arm);
    }
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__FAULTS, &m.base,
                VMMIG__CONTROL__TYPE__FAULT_POINTS, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_faults(answer.fault_points), err);
    cli_print_faults(stdout, answer.fault_points);
    return 0;
}

static const struct option faults_options[] = {
    {"arm", "SPEC", option_parse_text, .offset = offsetof(struct cli, arm),
     .text = "NAME=ACTION[:ARGUMENT][@N], several separated by commas, instead of what is armed; "
             "`none` disarms all. Actions: crash, error, delay, hang, hold, drop, duplicate, "
             "corrupt, jump, mistake"},
    {NULL}};

static const struct cli_command commands[] = {
    {"doctor", "[NAME]", 0, 1, false, NULL, "which host owns each VM, and why",
     "Tell, for every VM that the agent or its journal knows, which host owns it, why, and what an "
     "operator can do; and whether this host's certificate is missing or about to expire. What is "
     "undecided the agents settle as soon as they reach each other; run it on both hosts to see "
     "both journals.",
     run_doctor},
    {"debug faults", "", 0, 0, false, faults_options, "fault points of a test build",
     "List the points at which an agent that was built for tests (-Dfaults=true) can be made to "
     "fail, and arm them. An agent as it is released has none, and says so.",
     run_debug_faults},
    {NULL}};

static const struct cli_object objects[] = {
    {"doctor",
     "host, findings (an array: vm, owner (here, peer, undecided, nobody, unknown), owner_host, "
     "why, advice, attempt, role (source, destination), record, state, peer, changed, pid, "
     "vmm_runs), certificate (what is wrong with this host's, or soon will be; null: nothing)"},
    {"debug faults", "points (an array: name, armed, acted, holds)"},
    {NULL}};

const struct cli_family cli_family_doctor = {"When something went wrong", commands, objects};
