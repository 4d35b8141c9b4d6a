# SPDX-License-Identifier: Apache-2.0
"""Every fault of matrix.table, during a migration of the guest that checks itself: one copy runs where the table
says, whole, and nothing is left over. Prints the matrix as a table."""
import dataclasses
import os
import sys

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, print_matrix, read_table

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'matrix.table')
CASES = read_table(TABLE)
DRIVERS = [QemuPair]


@pytest.fixture(scope='module')
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


def parameters():
    """Every case with every VMM that it can happen to; the default run has the other VMM's own part only."""
    for driver in DRIVERS:
        for case in CASES:
            if case.point.startswith(driver.not_its_points):
                continue
            quick = case.quick and (driver is DRIVERS[0] or case.fault == 'crash' or 'vmm' in case.fault)
            yield pytest.param(driver, case, marks=[] if quick else [pytest.mark.full],
                               id=f'{driver.name}-{case.point}-{case.role}-{case.fault}-{case.line}')


@pytest.mark.parametrize('harness, case', parameters(), indirect=['harness'], scope='module')
def test_case(harness, case):
    try:
        harness.run(case)
    except BaseException:
        harness.broken()
        raise
    harness.done.append(dataclasses.replace(case))


def test_the_table_is_large_enough():
    for driver in DRIVERS:
        assert len([case for case in CASES if not case.point.startswith(driver.not_its_points)]) >= 150
    for what in ('vmm:source', 'vmm:destination', 'cut:source:in', 'cut:source:out', 'freeze', 'jump', 'host'):
        assert any(what in case.fault for case in CASES), what
