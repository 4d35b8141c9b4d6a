# SPDX-License-Identifier: Apache-2.0
"""Every fault of matrix.table and attach.table, during a migration of the guest that checks itself: one copy runs where
the table says, whole, the doctors know, and nothing is left over. Prints the matrix as a table."""
import dataclasses
import os
import sys

import pytest
from agents import Cluster, fault_build
from harness import Harness, QemuPair, VmmPair, print_matrix, read_table

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = [case for name in ('matrix.table', 'attach.table') for case in read_table(os.path.join(HERE, name))]
DRIVERS = [QemuPair, VmmPair]


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


# What the agents do in the same way whatever the VMM is.
SHARED = ('handover.', 'journal.', 'channel.', 'vms.', 'clock.')


def is_quick(driver, case):
    """The default run has each quick case once, but deaths of VMMs: what is shared with the VMM that starts and ends
    faster, what the VMM has a part in with QEMU, or with the VMM whose part it is."""
    if 'vmm' in case.fault or case.point.startswith(QemuPair.not_its_points):
        return case.quick
    shared = case.point.startswith(SHARED) and not case.fault.startswith('hold+')
    return case.quick and driver is (VmmPair if shared else QemuPair)


def applies(driver, case):
    """Has that VMM the points that fail?"""
    specs = [case.options[key] for key in ('with', 'peer') if key in case.options]
    return not any(point.startswith(driver.not_its_points) for point in [case.point, *specs])


def parameters():
    for driver in DRIVERS:
        for case in CASES:
            if not applies(driver, case):
                continue
            yield pytest.param(driver, case, marks=[] if is_quick(driver, case) else [pytest.mark.full],
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
        assert len([case for case in CASES if applies(driver, case)]) >= 150
    for what in ('vmm:source', 'vmm:destination', 'cut:source:in', 'cut:source:out', 'freeze', 'jump', 'host'):
        assert any(what in case.fault for case in CASES), what
