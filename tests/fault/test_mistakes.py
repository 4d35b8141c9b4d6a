# SPDX-License-Identifier: Apache-2.0
"""The matrix notices mistakes: four plausible shortcuts, compiled into the test build, each make a case of it fail that
passes without."""
import os

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, VmmPair, read_table

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'matrix.table')
CASES = {case.name: case for case in read_table(TABLE)}
# The mistake, a case that it must break, what the judge says, and the VMM with which the default run has it.
MISTAKES = [
    ('resume-without-never', 'handover.after.RUN destination delay:4000', 'TWO COPIES RAN', QemuPair),
    ('run-on-loaded', 'handover.before.COMMIT source crash', 'TWO COPIES RAN|ended as|not within', VmmPair),
    ('running-before-run', 'handover.before.RUN destination crash', 'not within', QemuPair),
    ('journal-not-synced', 'handover.after.COMMIT source crash', 'not within|ended as', VmmPair),
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
    harness = Harness(cluster, driver, prefix=mistake, mistakes=f'mistake.{mistake}=mistake@*', limit=8)
    with pytest.raises((AssertionError, TimeoutError), match=verdict):
        harness.run(CASES[case])
    harness.broken()
    for agent in cluster.agents:
        agent.stop()
