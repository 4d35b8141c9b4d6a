# SPDX-License-Identifier: Apache-2.0
"""The agent dies while a snapshot is taken: the guest runs on, no half snapshot is visible, nothing is left."""
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
