# SPDX-License-Identifier: Apache-2.0
"""Snapshots, templates, clones and restored VMs of a repository in Ceph, while one of its OSDs is away."""
import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
from agents import Cluster, eventually
from lab import BareGuest
from lab.guests import built

from repo.conftest import ceph_with

from .test_clone import content, kill, start_agent, write

MIB = 1 << 20
AWAY = 10  # seconds
OSDS = 2


@pytest.fixture(scope='module')
def cluster():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield cluster


@pytest.fixture(scope='module')
def ceph(cluster, tmp_path_factory):
    """In the first host's network."""
    with ceph_with('images', tmp_path_factory.mktemp('ceph'), osds=OSDS, network_of=cluster.hosts[0].pid) as ceph:
        yield ceph


@pytest.fixture(scope='module')
def agent(cluster, ceph):
    agent = cluster.agents[0]
    agent.options['repository'] = f'rados:images?conf={ceph.conf}'
    agent.host.run([built('tests/unit/repo/repo_tool'), agent.options['repository'], 'init'])
    return start_agent(agent)


@pytest.fixture(scope='module')
def source(agent):
    """A guest that runs all the time, and its disk."""
    vm = BareGuest('web1', mem_mib=64, dirty_mib=4, rate_mbps=1)
    disk = os.path.join(agent.cluster.shared, 'web1.raw')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'raw', disk, '32M'], check=True)
    subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write -P 0x11 1M 3M', disk], check=True, capture_output=True)
    vm.options = ['-blockdev', f'driver=raw,node-name=d0,file.driver=file,file.filename={disk}',
                  '-device', 'virtio-blk-pci,drive=d0']
    console = agent.cluster.console('web1')
    agent.host.popen(vm.argv(), name='web1')
    console.wait_for('ready', timeout=60)
    agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
    return console


@contextlib.contextmanager
def osd_is_away(ceph, killed=True):
    """For AWAY seconds from now: killed and started again, or so that it answers nobody. Until it is back."""
    number = OSDS - 1
    if killed:
        ceph.kill(f'osd.{number}')
    else:
        ceph.daemons[f'osd.{number}'].send_signal(signal.SIGSTOP)

    def back():
        time.sleep(AWAY)  # that is how long it is away, whatever happens meanwhile
        if killed:
            ceph.start_osd(number)
        else:
            ceph.daemons[f'osd.{number}'].send_signal(signal.SIGCONT)
    thread = threading.Thread(target=back)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        ceph.wait_osds(OSDS)
        ceph.wait_clean()


def disk_of(agent, name):
    return content(agent, agent.host.path(f'/var/lib/vmmig/clones/{name}/disk0.qcow2'))


def run_through(agent, source, ceph, name, killed=True, apart=False):
    """Each step while an OSD is away: all in one absence, or each in its own."""
    def away():
        return osd_is_away(ceph, killed) if apart else contextlib.nullcontext()
    whole = bytes(MIB) + b'\x11' * (3 * MIB) + bytes(28 * MIB)
    folder = os.path.join(agent.cluster.shared, name)
    os.mkdir(folder)
    with contextlib.nullcontext() if apart else osd_is_away(ceph, killed):
        mark = source.mark()
        with away():
            agent.vmmig('snapshot', 'web1', name)
        source.wait_ticks(3)
        assert source.check(mark) == ['h1']
        with away():
            agent.vmmig('template', 'publish', f'web1@{name}', f'{name}:v1')
        console = agent.cluster.console(f'{name}-c')
        with away():
            made, = agent.json('clone', f'{name}:v1', '--as', f'{name}-c')['clones']
            console.wait_ticks(3)
            console.verify(120)  # every page comes
        assert disk_of(agent, f'{name}-c') == whole
        with away():
            agent.vmmig('restore', f'web1@{name}', '--as', f'{name}-r', '--disk-dir', folder)
            restored = agent.json('status', f'{name}-r')
            assert restored['state'] == 'running'
            kill(agent, restored)
    with open(f'{folder}/{name}-r-disk0.raw', 'rb') as file:
        assert file.read() == whole
    console.wait_ticks(3)
    console.verify()
    kill(agent, made)


def test_an_osd_is_away_all_the_while(agent, source, ceph):
    run_through(agent, source, ceph, 'away')


def test_a_clone_that_runs_waits_for_its_store(agent, source, ceph):
    """Nobody answers for a while: its memory comes later, what it has written meanwhile stays, and it goes on."""
    agent.vmmig('snapshot', 'web1', 'waits')
    agent.vmmig('template', 'publish', 'web1@waits', 'waits:v1')
    console = agent.cluster.console('waits-c')
    made, = agent.json('clone', 'waits:v1', '--as', 'waits-c')['clones']
    console.wait_ticks(3)
    write(agent, 'waits-c', '-P 0x22 8M 64k')
    daemons = [ceph.daemons[f'osd.{number}'] for number in range(OSDS)]
    for daemon in daemons:
        daemon.send_signal(signal.SIGSTOP)
    try:
        console.send('verify')  # touches what is not there
        assert agent.json('mount', '/run/vmmig/images')['failed_reads'] == 0
        time.sleep(3)  # of silence
    finally:
        for daemon in daemons:
            daemon.send_signal(signal.SIGCONT)
    ceph.wait_osds(OSDS)
    console.verify(120)
    assert agent.json('mount', '/run/vmmig/images')['failed_reads'] == 0
    assert disk_of(agent, 'waits-c')[8 * MIB:8 * MIB + 65536] == b'\x22' * 65536
    kill(agent, made)


@pytest.mark.full
@pytest.mark.parametrize('killed', [True, False], ids=['killed', 'silent'])
def test_an_osd_is_away_at_each_step(agent, source, ceph, killed):
    run_through(agent, source, ceph, 'killed' if killed else 'silent', killed, apart=True)
