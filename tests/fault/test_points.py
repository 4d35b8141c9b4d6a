# SPDX-License-Identifier: Apache-2.0
"""Fault points: a build for tests lists and arms them; what is released has none."""
import json
import os
import re
import subprocess

import pytest
from agents import Cluster, eventually, fault_build
from harness import Harness, QemuPair, VmmPair, read_table
from lab.guests import built

TABLES = ('matrix.table', 'attach.table')
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
# Points at which no case of the tables fails, and why.
EXCUSES = {
    r'(snapshot|restore|clone|repo|import|template|gc)\..*': 'of snapshots and the repository: tests/flow has theirs',
    r'(attach\.(send|receive)|library\.\w+)\.MAP_FILE': 'asked for by restore and clone alone',
    r'(attach\.(send|receive)|library\.\w+)\.THROTTLE': 'asked for when a guest outruns its link, which these do not',
    r'((attach\.(send|receive)|library\.\w+)\.RELEASE|library\.\w+\.release)':
        'said of a guest that is to stand, and these run: tests/flow/attach',
    r'attach\.(clear|first\.harvest|live\.run|paused\.run|saved\.pass|mark)':
        'loses pages, on purpose: tests that the guest notices',
    r'mistake\..*': 'test_mistakes.py',
    r'fault\.self-test': 'tells a build with fault points from one without',
}


# What a case of each point must be, in each role in which it fails: one of these.
KINDS = {'crash': {'crash'}, 'error': {'error', 'drop', 'corrupt'}, 'delay': {'delay', 'hang'}}
# Those that cannot be, and why.
LESS = {
    r'(handover\.after\.\w+|attempt\.(born|recorded|ready|killed)|journal\.written|library\.called\.\w+)=error':
        'nothing is done there that could fail',
    r'clock\.wall=.*': 'a clock goes wrong, and does nothing else',
    r'stream\.opaque=(crash|delay)': 'chooses how the stream is read, before there is one',
}
# What a delay at a point must be longer than, in milliseconds, as the agents of the matrix have it: a VMM that waits
# is there within 6 s; a guest is loaded within 3 s and a lost copy waited for for 2 s; of a VMM that links the library
# an answer comes within 1.5 s, and a callback is done within one.
LIMITS = {
    r'handover\.(before|after)\.PREPARING|handover\.send\.(PREPARE|PREPARED)|handover\.receive\.PREPARED|'
    r'attempt\.(spawn|born|recorded|ready)': 6000,
    r'library\..*': 1500,
    r'.*': 3000,
}


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


def cases():
    for name in TABLES:
        yield from read_table(os.path.join(os.path.dirname(os.path.abspath(__file__)), name))


def specs_of(case):
    """(point, role, fault) of all that a case arms."""
    other = {'source': 'destination', 'destination': 'source'}[case.role]
    yield case.point, case.role, case.fault
    for role, key in ((case.role, 'with'), (other, 'peer')):
        for name, fault in (spec.split('=', 1) for spec in case.options.get(key, '').split(',') if spec):
            yield name, role, fault


def faults_of(case):
    """The same with the kind of the fault."""
    for point, role, fault in specs_of(case):
        yield point, role, case.kind if fault == case.fault else re.match('[a-z]+', fault).group()


def longest_delays():
    """The longest delay in milliseconds at each (point, role) that has one."""
    longest = {}
    for case in cases():
        for point, role, fault in specs_of(case):
            found = re.match(r'delay:(\d+)', fault)
            if found:
                longest[point, role] = max(longest.get((point, role), 0), int(found.group(1)))
    return longest


def test_each_point_has_a_crash_an_error_and_a_delay():
    kinds = {}
    for case in cases():
        for point, role, kind in faults_of(case):
            kinds.setdefault((point, role), set()).add(kind)
    lacks = {f'{point}={kind} {role}' for (point, role), found in kinds.items() for kind, those in KINDS.items()
             if not found & those and not any(re.fullmatch(less, f'{point}={kind}') for less in LESS)}
    assert not lacks, sorted(lacks)
    short = {f'{point} {role}: {longest} ms' for (point, role), longest in longest_delays().items()
             if longest <= next(limit for those, limit in LIMITS.items() if re.fullmatch(those, point))}
    assert not short, f'delays that nobody notices: {sorted(short)}'
    every = {kind for found in kinds.values() for kind in found}
    assert every >= {'crash', 'error', 'delay', 'hang', 'drop', 'duplicate', 'corrupt', 'jump'}
    assert any('ENOSPC' in case.fault for case in cases())


def library_points():
    """Names of the library's points, which nobody can list."""
    with open(os.path.join(fault_build(), LIBRARY), 'rb') as file:
        return {name.decode() for name in re.findall(rb'library\.[a-z]+\.[A-Za-z_]+(?=\0)', file.read())}


def test_every_point_of_a_hand_over_has_a_case(points):
    failing = {point for case in cases() for point, _, _ in faults_of(case)}
    known = set(points) | library_points()
    assert set(IN_VMM) < known
    assert not failing - known, 'points that do not exist'
    without = {name for name in known - failing if not any(re.fullmatch(excuse, name) for excuse in EXCUSES)}
    assert not without, f'no case of {" or ".join(TABLES)} fails at {sorted(without)}'
    for excuse in EXCUSES:
        assert not any(re.fullmatch(excuse, name) for name in failing), f'{excuse}: needs no excuse'
    assert all(any(re.fullmatch(excuse, name) for name in known) for excuse in EXCUSES), 'an excuse for nothing'


def programs(build):
    """Everything that is installed of a build and holds code."""
    found = json.loads(subprocess.run(['meson', 'introspect', '--installed', build], check=True,
                                      stdout=subprocess.PIPE).stdout)
    for path in found:
        if path.startswith(build) and os.path.isfile(path):
            with open(path, 'rb') as file:
                if file.read(4) == b'\x7fELF':
                    yield path


def test_a_release_has_none(cluster, points):
    agent, = cluster.agents
    agent.stop()
    if held_by(built('agent/vmmigd'), ['fault.self-test']):
        pytest.skip(f'{built("agent/vmmigd")} IS NOT A RELEASE BUILD: set VMMIG_BUILD to one without -Dfaults')
    release = os.path.dirname(os.path.dirname(built('agent/vmmigd')))
    searched = list(programs(os.path.realpath(release)))
    assert len(searched) >= 8, searched
    for program in searched:
        assert held_by(program, set(points) | library_points()) == set(), program
    agent.start()
    said = agent.vmmig('debug', 'faults', check=False)
    assert said.returncode == 8 and 'no fault points' in said.stderr
    agent.stop()
    with pytest.raises(RuntimeError, match='VMMIG_FAULTS is set'):
        agent.start(faults='qmp.cont=crash', build=os.path.dirname(os.path.dirname(built('agent/vmmigd'))))


def passes(harness, names, undone):
    """(point, role) of those points that agents pass while a guest moves, or comes back from where it cannot be
    loaded."""
    agents = harness.ready()
    for agent, role in zip(agents, ('source', 'destination')):
        fails = undone and role == 'destination'
        spec = [f'{name}=delay:0@*' for name in names if not (fails and name == 'attempt.loaded')]
        harness.arm(agent, ','.join(spec + ['attempt.loaded=error'] * fails))
    agents[0].vmmig('send', harness.vm.name, '--to', agents[1].host.name, check=False)
    eventually('an end', harness.place)
    found = set()
    for agent, role in zip(agents, ('source', 'destination')):
        said = agent.vmmig('debug', 'faults').stdout
        found |= {(name, role) for name, times in re.findall(r'^(\S+)=\S+  acted (\d+)', said, re.M) if int(times)}
    return found


@pytest.mark.full
@pytest.mark.parametrize('driver', [QemuPair, VmmPair])
def test_every_role_in_which_a_point_is_passed_has_a_case(driver):
    with Cluster(start=False) as cluster:
        harness = Harness(cluster, driver, prefix='p')
        names = [point['name'] for point in cluster.agents[0].json('debug', 'faults')['points']
                 if not any(re.fullmatch(excuse, point['name']) for excuse in EXCUSES)]
        passed = set()
        for at in range(0, len(names), 14):  # 16 can be armed
            for undone in (False, True):
                passed |= passes(harness, names[at:at + 14], undone)
        harness.forget()
    without = passed - {(point, role) for case in cases() for point, role, _ in faults_of(case)}
    assert len(passed) > 80 and not without, sorted(without)
