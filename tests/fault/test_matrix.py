# SPDX-License-Identifier: Apache-2.0
"""Every fault of matrix.table, during a migration of the guest that checks itself: one copy runs where the table says,
whole, and nothing is left over. Prints the matrix as a table."""
import os
import sys

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, print_matrix, read_table

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'matrix.table')
CASES = read_table(TABLE)
DRIVERS = [QemuPair]


@pytest.fixture(scope='module', params=DRIVERS, ids=lambda driver: driver.name)
def harness(request):
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    done = []
    with Cluster(start=False) as cluster:
        made = Harness(cluster, request.param)
        made.done = done
        yield made
        made.forget()
    capture = request.config.pluginmanager.getplugin('capturemanager')
    with capture.global_and_fixture_disabled():
        print(f'\nguests of {request.param.name}:', end='')
        if done:
            print_matrix(done, sys.stdout)


@pytest.mark.parametrize('case', [pytest.param(case, id=f'{case.point}-{case.role}-{case.fault}-{case.line}',
                                               marks=[] if case.quick else [pytest.mark.full]) for case in CASES])
def test_case(harness, case):
    try:
        harness.run(case)
    except BaseException:
        harness.broken()
        raise
    harness.done.append(case)


def test_the_table_is_large_enough():
    assert len(CASES) >= 150
    for what in ('vmm:source', 'vmm:destination', 'cut:source:in', 'cut:source:out', 'freeze', 'jump', 'host'):
        assert any(what in case.fault for case in CASES), what
