# SPDX-License-Identifier: Apache-2.0
"""The matrix notices mistakes: four plausible shortcuts, compiled into the test build, each make a case of it fail that
passes without."""
import os

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, read_table

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'matrix.table')
CASES = {case.name: case for case in read_table(TABLE)}
# The mistake, a case that it must break, and what the judge says.
MISTAKES = [
    ('resume-without-never', 'handover.after.RUN destination delay:4000', 'TWO COPIES RAN'),
    ('run-on-loaded', 'handover.before.COMMIT source crash', 'TWO COPIES RAN|ended as|not within'),
    ('running-before-run', 'handover.before.RUN destination crash', 'not within'),
    ('journal-not-synced', 'handover.after.COMMIT source crash', 'not within|ended as'),
]


@pytest.fixture(scope='module')
def cluster():
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    with Cluster(start=False) as made:
        yield made


@pytest.mark.parametrize('mistake, case, verdict', MISTAKES, ids=[mistake for mistake, _, _ in MISTAKES])
def test_the_matrix_catches(cluster, mistake, case, verdict):
    harness = Harness(cluster, QemuPair, prefix=mistake, mistakes=f'mistake.{mistake}=mistake@*', limit=8)
    with pytest.raises((AssertionError, TimeoutError), match=verdict):
        harness.run(CASES[case])
    harness.broken()
    for agent in cluster.agents:
        agent.stop()
