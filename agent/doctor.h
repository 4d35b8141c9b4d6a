/* SPDX-License-Identifier: Apache-2.0 */
/*
 * doctor: which host owns each VM, and why, from the journal, the registry, and whether the
 * recorded VMM lives. docs/hand-over.md, "Who owns it", is the reasoning in words.
 *
 *     cleanup_diagnosis struct diagnosis d = {0};
 *     if (doctor_examine(agent, "", &d, &err) < 0) ...
 *     control_reply(s, VMMIG__CONTROL__TYPE__DIAGNOSIS, &d.message.base, &err);
 *
 * One finding per VM, sorted by name: of its hand-over that is not settled, if there is one; else
 * of the VM as the registry has it; else of the newest attempt in the journal. A damaged record of
 * the journal is a finding without a name; then a VM of the registry that does not run may have
 * been sent, and is undecided. Nothing is changed; no VMM is asked but for that. NOT_FOUND if a
 * name was given that nobody knows. Bound: CONTROL_FINDINGS_MAX. Threads: any.
 */
#ifndef VMMIG_AGENT_DOCTOR_H
#define VMMIG_AGENT_DOCTOR_H

#include "agent/agent.h"
#include "migrate/conn.h"
#include "proto/control.h"

/* What the message points to lives as long as the diagnosis. */
struct diagnosis {
    Vmmig__Control__Diagnosis message;
    struct finding **list;
    size_t n;
    char certificate[CONN_COMPLAINT_MAX];
};

int doctor_examine(struct agent *agent, const char *vm, struct diagnosis *ret_diagnosis,
                   struct vm_error **err);
void diagnosis_finish(struct diagnosis *d);
static inline void diagnosis_cleanup(struct diagnosis *d)
{
    diagnosis_finish(d);
}
#define cleanup_diagnosis __attribute__((cleanup(diagnosis_cleanup)))

#endif
