# SPDX-License-Identifier: Apache-2.0
"""Fault points: a build for tests lists and arms them; what is released has none."""
import os

import pytest
from agents import Cluster, fault_build
from lab.guests import built

PROGRAMS = ['agent/vmmigd', 'tools/vmmig']
MUST_HAVE = {
    'agent': ['attempt.resume', 'attempt.kill', 'attempt.born', 'vms.record'],
    'hand-over': ['handover.before.COMMIT', 'handover.after.RUN', 'handover.send.COMMIT',
                  'handover.receive.RUNNING'],
    'journal': ['journal.write', 'journal.sync', 'journal.written', 'journal.record'],
    'QMP': ['qmp.cont', 'qmp.cont.answer', 'qmp.stop', 'qmp.connect'],
    'attach protocol': ['attach.send.HELLO', 'attach.send.PAUSE', 'attach.receive.RESUME'],
    'channels': ['channel.send', 'channel.ack', 'channel.connect', 'conn.read', 'conn.write', 'conn.dial'],
}


# Those of libvmmig-attach are in a VMM, which nobody can ask.
IN_VMM = ['library.receive.HARVEST', 'library.answer.CLEAR', 'library.call.pause', 'library.called.load']
LIBRARY = 'dirtylog/libvmmig-attach.so'


def held_by(path, names):
    """Which of these names a program file holds."""
    with open(path, 'rb') as file:
        data = file.read()
    return {name for name in names if name.encode() + b'\0' in data}


@pytest.fixture(scope='module')
def cluster():
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    with Cluster(hosts=1, start=False) as made:
        yield made


@pytest.fixture(scope='module')
def points(cluster):
    agent, = cluster.agents
    agent.start(build=fault_build())
    yield {point['name']: point for point in agent.json('debug', 'faults')['points']}
    if agent.process.poll() is None:
        agent.stop()


def test_a_test_build_lists_its_points(cluster, points):
    agent, = cluster.agents
    for where, names in MUST_HAVE.items():
        assert not set(names) - set(points), where
    assert len(points) > 90
    assert held_by(os.path.join(fault_build(), 'agent/vmmigd'), points) == set(points)
    assert not any(point['armed'] for point in points.values())
    said = agent.vmmig('debug', 'faults', '--arm', 'qmp.cont=delay:5@3').stdout
    assert 'qmp.cont=delay:5@3  acted 0 times\n' in said
    agent.vmmig('debug', 'faults', '--arm', 'none')
    bad = agent.vmmig('debug', 'faults', '--arm', 'qmp.kont=crash', check=False)
    assert bad.returncode == 2 and "no fault point is named 'qmp.kont'" in bad.stderr


def test_the_library_has_its_own():
    if not os.path.exists(os.path.join(fault_build(), LIBRARY)):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    assert held_by(os.path.join(fault_build(), LIBRARY), IN_VMM) == set(IN_VMM)
    assert not held_by(built(LIBRARY), IN_VMM)


def test_a_release_has_none(cluster, points):
    agent, = cluster.agents
    agent.stop()
    if held_by(built('agent/vmmigd'), ['fault.self-test']):
        pytest.skip(f'{built("agent/vmmigd")} IS NOT A RELEASE BUILD: set VMMIG_BUILD to one without -Dfaults')
    for program in PROGRAMS:
        assert held_by(built(program), points) == set()
    agent.start()
    said = agent.vmmig('debug', 'faults', check=False)
    assert said.returncode == 8 and 'no fault points' in said.stderr
    agent.stop()
    with pytest.raises(RuntimeError, match='VMMIG_FAULTS is set'):
        agent.start(faults='qmp.cont=crash', build=os.path.dirname(os.path.dirname(built('agent/vmmigd'))))
