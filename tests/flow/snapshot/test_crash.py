# SPDX-License-Identifier: Apache-2.0
"""Something dies or fails while a snapshot is taken: the guest runs on, no half snapshot is visible, nothing is left."""
import os
import signal

import pytest
from agents import Cluster, eventually
from lab import BareGuest
from snapshots import disks, make_agent, start, untouched

# While memory is being copied QEMU itself cannot lose its reader: snapshot/snapshot.h says so.
BEFORE = ['snapshot.prepared', 'snapshot.paused', 'snapshot.switched', 'snapshot.copied', 'snapshot.commit']
AFTER = ['snapshot.committed']


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster, faults='snapshot.arrived=delay:0')


@pytest.fixture(scope='module')
def guest(agent):
    vm = BareGuest('web1', mem_mib=128, dirty_mib=4, rate_mbps=1)
    disks(agent.cluster, vm)
    return vm, start(agent, vm)


def names(agent):
    return [s['name'] for s in agent.json('snapshot', 'list', 'web1')['snapshots']]


def runs_on(agent, vm, console):
    eventually('a running guest', lambda: agent.json('status', 'web1')['state'] == 'running')
    untouched(vm, agent)
    console.wait_ticks(5)
    console.verify()


@pytest.mark.parametrize('point', BEFORE + AFTER)
def test_the_agent_dies(agent, guest, point):
    vm, console = guest
    name = point.replace('.', '-')
    agent.stop()
    agent.start(faults=f'{point}=crash')
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')
    assert agent.vmmig('snapshot', 'web1', name, check=False).returncode == 6
    agent.process.wait(20)
    agent.start(faults='snapshot.arrived=delay:0')
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')
    eventually('a running guest', lambda: agent.json('status', 'web1')['state'] == 'running')
    assert (name in names(agent)) == (point in AFTER)
    agent.vmmig('snapshot', 'web1', f'{name}-again')  # after which no bitmap of the dead one is left, either
    runs_on(agent, vm, console)


def is_nbdkit(pid):
    try:
        with open(f'/proc/{pid}/cmdline', 'rb') as file:
            words = file.read().split(b'\0')
    except OSError:
        return False
    return words[0] == b'nbdkit' and any(b'vmmig-plugin' in word for word in words)


def nbdkits():
    return [int(pid) for pid in os.listdir('/proc') if pid.isdigit() and is_nbdkit(pid)]


def restart(agent, faults):
    agent.stop()
    agent.start(faults=faults)
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')


def test_storing_fails(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.memory=error:ENOSPC')
    failed = agent.vmmig('snapshot', 'web1', 'full', check=False)
    assert failed.returncode == 11, failed
    runs_on(agent, vm, console)
    assert 'full' not in names(agent)


def test_a_cancelled_one(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.memory=delay:300@*')
    agent.vmmig('snapshot', 'web1', 'cancelled', '--background')
    conflict = agent.vmmig('send', 'web1', '--to', 'h1', check=False)
    assert conflict.returncode == 4 and 'snapshot' in conflict.stderr
    agent.vmmig('cancel', 'web1')
    assert agent.vmmig('watch', 'web1', check=False).returncode == 14
    runs_on(agent, vm, console)
    assert 'cancelled' not in names(agent)


def test_nbdkit_dies(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.memory=delay:50@*')
    agent.vmmig('snapshot', 'web1', 'nbdkit', '--background')
    for pid in eventually('nbdkit', nbdkits):
        os.kill(pid, signal.SIGKILL)
    failed = agent.vmmig('watch', 'web1', check=False)
    assert failed.returncode in (1, 5, 6) and 'web1@nbdkit' in failed.stderr.strip().splitlines()[-1], failed
    runs_on(agent, vm, console)
    assert 'nbdkit' not in names(agent)
