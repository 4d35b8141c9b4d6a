# SPDX-License-Identifier: Apache-2.0
"""The matrix notices mistakes: four plausible shortcuts, compiled into the test build, each make a case of it fail that
passes without."""
import os

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, VmmPair, read_table

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'matrix.table')
CASES = {case.name: case for case in read_table(TABLE)}
TWICE, NO_END = 'TWO COPIES RAN', ': an end: not within'
# The mistake, a case that it must break, what the judge says, and the VMM with which the default run has it.
MISTAKES = [
    ('resume-without-never', 'handover.after.RUN destination delay:4000', TWICE, QemuPair),
    ('run-on-loaded', 'handover.before.COMMIT source crash', f'{TWICE}|ended as|{NO_END}', VmmPair),
    ('running-before-run', 'handover.before.RUN destination crash', NO_END, QemuPair),
    ('journal-not-synced', 'attempt.resumed destination hold+host:destination', f'{TWICE}|ended as source, not ended', VmmPair),
]


@pytest.fixture(scope='module')
def cluster():
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    with Cluster(start=False) as made:
        yield made


def parameters():
    for mistake, case, verdict, first in MISTAKES:
        for driver in (QemuPair, VmmPair):
            yield pytest.param(driver, mistake, case, verdict, id=f'{driver.name}-{mistake}',
                               marks=[] if driver is first else [pytest.mark.full])


@pytest.mark.parametrize('driver, mistake, case, verdict', parameters())
def test_the_matrix_catches(cluster, driver, mistake, case, verdict):
    for made in ('', mistake):
        harness = Harness(cluster, driver, prefix=f'{mistake[:8]}{"m" if made else "c"}', limit=8,
                          mistakes=f'mistake.{made}=mistake@*' if made else '')
        if made:
            with pytest.raises((AssertionError, TimeoutError), match=verdict):
                harness.run(CASES[case])
        else:
            harness.run(CASES[case])  # which passes without
        harness.broken()
        for agent in cluster.agents:
            agent.stop()
