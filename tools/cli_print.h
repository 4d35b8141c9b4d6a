/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_print: the agent's answers as text and as JSON. JSON field names are stable; times are
 * milliseconds, sizes bytes, rates bytes a second, instants RFC 3339 in UTC; what is not known is
 * null.
 */
#ifndef VMMIG_TOOLS_CLI_PRINT_H
#define VMMIG_TOOLS_CLI_PRINT_H

#include "base/error.h"
#include "proto/control.h"

#include <jansson.h>
#include <stddef.h>
#include <stdio.h>

/* Print the object with a newline; takes the reference over. A NULL (out of memory) is an error. */
int cli_print_json(json_t *object, struct vm_error **err);
/* A wall clock time as text. */
json_t *cli_json_instant(int64_t wall_ns);
json_t *cli_json_error(const struct vm_error *error);
json_t *cli_json_vm(const Vmmig__Control__Vm *vm);
json_t *cli_json_vms(const Vmmig__Control__Vms *vms);
json_t *cli_json_job(const Vmmig__Control__Job *job);
json_t *cli_json_jobs(const Vmmig__Control__JobList *jobs);
json_t *cli_json_diagnosis(const Vmmig__Control__Diagnosis *diagnosis);
json_t *cli_json_faults(const Vmmig__Control__FaultPoints *points);
json_t *cli_json_agent(const Vmmig__Control__Agent *agent);

void cli_print_vm(FILE *out, const Vmmig__Control__Vm *vm);
void cli_print_vms(FILE *out, const Vmmig__Control__Vms *vms);
void cli_print_jobs(FILE *out, const Vmmig__Control__JobList *jobs);
void cli_print_diagnosis(FILE *out, const Vmmig__Control__Diagnosis *diagnosis);
void cli_print_faults(FILE *out, const Vmmig__Control__FaultPoints *points);
void cli_print_agent(FILE *out, const Vmmig__Control__Agent *agent);
/* What a job that ended came to; several lines. */
void cli_print_summary(FILE *out, const Vmmig__Control__Job *job);
/* A job that runs, in one line without newline, of at most size - 1 bytes. */
void cli_format_progress(const Vmmig__Control__Job *job, char *out, size_t size);

#endif
